"""The PaCoRe part of a chat request and of its response."""

from collections.abc import Iterator, Sequence

from pacore_sched.answers.live import Answer
from pacore_sched.answers.rounds import compact, round_widths
from pacore_sched.serve.api.requests import MAX_ROUNDS, ChatRequest, PacoreOptions
from pacore_sched.serve.api.sampling import check_rollouts
from pacore_sched.serve.errors import refused
from pacore_sched.serve.jobs import Event, RolloutEnded, RoundStarted
from pacore_sched.serve.limits import Limits


def options_of(
    body: ChatRequest, widths_of_name: list[int] | None, limits: Limits
) -> PacoreOptions | None:
    """The PaCoRe options of a request: its own, or those that the model's name stands for.

    Raises ApiError if they exceed a limit, or do not go with the request's other parameters.
    """
    options = body.pacore
    if widths_of_name is not None:
        if options and "widths" in options.model_fields_set:
            raise refused(
                f"give the widths in the model's name ({body.model}) or in pacore.widths, not both",
                "pacore.widths",
            )
        options = (options or PacoreOptions()).model_copy(update={"widths": widths_of_name})
    if options is None:
        return None
    if len(options.widths) > MAX_ROUNDS:  # in the model's name
        raise refused(f"{body.model} has more than {MAX_ROUNDS} rounds", "model")
    for width in options.widths:
        check_rollouts(width, limits, "pacore.widths")
    if body.n > 1:
        raise refused("n must be 1 in a PaCoRe request: it has one answer", "n")
    if body.tools:
        raise refused("tools are not implemented in PaCoRe requests", "tools")
    return options


def events_of(event: Event, widths: Sequence[int]) -> Iterator[tuple[str, dict]]:
    """Names and data of the stream's events: round_started, rollout_finished, synthesis_started."""
    match event:
        case RoundStarted(number=number):
            synthesis = number == len(widths) - 1
            yield (
                "pacore.synthesis_started" if synthesis else "pacore.round_started",
                {
                    "round": number,
                    "width": event.width,
                    "prompt_tokens": event.prompt_tokens,
                    "cut": list(event.cut),
                    "dropped": list(event.dropped),
                },
            )
        case RolloutEnded(result) if result.round < len(widths) - 1:
            yield (
                "pacore.rollout_finished",
                {
                    "round": result.round,
                    "rollout": result.index,
                    "seed": result.seed,
                    "tokens": result.num_tokens,
                    "finish_reason": result.finish_reason,
                    "message": compact(result.text),
                },
            )


def summary(answer: Answer, *, texts: bool) -> dict:
    """The field `pacore` of a response: every round, with what its prompt had to leave out, and
    with the rollouts if `texts`."""
    rounds = [round_.record() for round_ in answer.rounds]
    if not texts:
        for round_ in rounds:
            round_["rollouts"] = len(round_["rollouts"])
    return {"rounds": rounds}


def widths_of(options: PacoreOptions | None, n: int) -> tuple[int, ...]:
    """Rollouts of every round: `n` choices without PaCoRe."""
    return round_widths(options.widths) if options else (n,)
