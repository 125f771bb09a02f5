"""PaCoRe on one engine: many problems at once, each going through its rounds independently.

    for each width: prompt -> rollouts in parallel -> compacted messages -> the next round's prompt

A problem's next round is submitted in the same step in which its current round ends, and the engine
batches it with all other work. Images come first in every round's prompt, in a separate segment
that is encoded and prefilled once for all rounds.

A failed problem, for example one with a prompt that is too long or a broken image, does not affect
the others: whatever is raised for one problem, expected or not, becomes the error in its answer.
What concerns all of them ends the run: errors of the engine's steps, of the callbacks and of the
iterable of problems.
"""

from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypedDict, Unpack

from kernels.runtime.arithmetic import cdiv
from model.errors import STOPS, InputError, reason
from model.kv_cache import PAGE_SIZE, page_bytes
from model.memory import free_bytes
from pacore_sched.answers.arrivals import Arrivals
from pacore_sched.answers.journal_lines import RolloutResult
from pacore_sched.answers.problem_run import Problem, ProblemRun, Settings
from pacore_sched.answers.rounds import SynthesisTemplate, compact, round_widths
from pacore_sched.engine.engine import Engine
from pacore_sched.engine.executor import ModelExecutor
from pacore_sched.engine.stopping import Stopping
from pacore_sched.sched.policy import LaterRoundFirst
from pacore_sched.sched.request import Group, Rollout, Sampling

if TYPE_CHECKING:
    import torch

    from model.step3vl import Step3VL
    from model.vision.image import Views

AHEAD = 1024  # unfinished rollouts submitted at a time, at least: policies choose among them
ENCODED_AHEAD = 4  # submitted problems whose images' pixels wait to be encoded


@dataclass(frozen=True)
class Round:
    """The results of one round, ordered by index.

    cut, dropped: the previous round's rollouts whose messages have lost their beginnings, or are
    left out, so that the prompt fits (message_budget.py)
    """

    prompt_tokens: int
    rollouts: tuple[RolloutResult, ...]
    cut: tuple[int, ...] = ()
    dropped: tuple[int, ...] = ()

    @staticmethod
    def of(results: Sequence[RolloutResult]) -> "Round":
        """The round that these rollouts are."""
        first = results[0]
        return Round(first.prompt_tokens, tuple(results), first.cut, first.dropped)

    def record(self) -> dict:
        """The round in the JSON of `ask` and `batch`."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "cut": list(self.cut),
            "dropped": list(self.dropped),
            "rollouts": [
                {
                    "text": rollout.text,
                    "tokens": rollout.num_tokens,
                    "seed": rollout.seed,
                    "finish_reason": rollout.finish_reason,
                }
                for rollout in self.rollouts
            ],
        }


@dataclass(frozen=True)
class Answer:
    """The result of a problem. `text` is the message of the synthesis, "" without a synthesis.

    `error` says why there is no answer: either the problem failed in some round, and that round and
    those after it are missing from `rounds`, or all rollouts of the last round failed.
    """

    problem: str
    text: str
    error: str | None
    rounds: tuple[Round, ...]


class Pacore:
    """Answers any number of problems at once on an engine."""

    def __init__(
        self,
        model: "Step3VL",
        engine: Engine[ModelExecutor],
        widths: Sequence[int],
        sampling: Sampling,
        *,
        seed: int = 0,
        template: SynthesisTemplate | None = None,
        min_messages: int | None = None,
        synthesis: bool = True,
    ) -> None:
        """`widths` are those of the exploring rounds; unless `synthesis` is false, a last round of
        one rollout follows. With `min_messages`, an exploring round ends when that many of its
        rollouts have ended, and the others are cancelled.

        Raises InputError if `min_messages` is not positive.
        """
        if min_messages is not None and min_messages < 1:
            raise InputError(f"a round must wait for at least one message, not {min_messages}")
        self.model, self.engine = model, engine
        widths = round_widths(widths) if synthesis else tuple(widths)
        needs = [min(min_messages or width, width) for width in widths]
        self.settings = Settings(widths, needs, sampling, seed, template)
        self.synthesis = synthesis

    @property
    def prefix_tokens_saved(self) -> int:
        """Prompt tokens whose KV rollouts reused, minus those prefilled, since the engine began."""
        counts = self.engine.scheduler.counts
        return counts.prefix_hits - counts.prefilled

    def answer(
        self,
        messages: Sequence[dict],
        views: "Sequence[Views]" = (),
        *,
        on_rollout: Callable[[RolloutResult], None] = lambda result: None,
        on_step: Callable[[int], None] = lambda tokens: None,
    ) -> Answer:
        """The answer to one conversation; `views` are the images of its image parts, in order.

        Raises InputError if the problem fails in its first round, for example because its prompt
        fills the model's context or its KV cannot fit into memory. Later, the Answer has the error.
        """
        problem = Problem(messages, (lambda: views) if views else None)
        (answer,) = self.answers([problem], on_rollout=on_rollout, on_step=on_step)
        if answer.error and not answer.rounds:
            raise InputError(answer.error)
        return answer

    def answers(
        self,
        problems: Iterable[Problem],
        *,
        known: Callable[[str], Iterable[RolloutResult]] = lambda id: (),
        on_rollout: Callable[[RolloutResult], None] = lambda result: None,
        on_step: Callable[[int], None] = lambda tokens: None,
    ) -> Iterator[Answer]:
        """Yield answers as problems end. New problems are read when the engine has room for them.

        known: maps a problem's id to rollouts that ended in an earlier run; they are not run again
        on_rollout: called with every other rollout's result when it ends
        on_step: called after every step with the number of tokens that it generated

        If the caller stops early, or a callback raises, all work left in the engine is cancelled.
        """
        with closing(self.steps(problems, known, on_rollout, on_step)) as steps:
            for answers in steps:
                yield from answers

    def steps(
        self,
        problems: Iterable[Problem],
        known: Callable[[str], Iterable[RolloutResult]] = lambda id: (),
        on_rollout: Callable[[RolloutResult], None] = lambda result: None,
        on_step: Callable[[int], None] = lambda tokens: None,
    ) -> Generator[list[Answer], None, None]:
        """As `answers`, but yields once per engine step: the answers that the step completed."""
        run_of = partial(ProblemRun, self.model, self.engine, self.settings)
        arrivals = Arrivals(run_of, problems, known)
        live: dict[Group, ProblemRun] = {}
        try:
            arrivals.fill()
            while True:
                answers: list[Answer] = []
                for run in self._starting(arrivals, live):
                    answers += self._submit_round(run, live)
                if not live:  # and no further problem has arrived
                    yield answers
                    return
                stats = self.engine.stats
                generated = stats.generated
                done = self._take(self.engine.step(), live, on_rollout)
                on_step(stats.generated - generated)
                for group in done:
                    answers += self._submit_round(live.pop(group), live)
                answers += self._failed(live)
                yield answers
        finally:
            arrivals.close()
            for group, run in live.items():
                self.engine.cancel(group)
                run.release()

    def _starting(self, arrivals: Arrivals, live: dict[Group, ProblemRun]) -> Iterator[ProblemRun]:
        """Yield the problems that start now, while there is room and the next one is ready."""
        max_pending = max(AHEAD, 2 * self.engine.scheduler.max_running)
        while not arrivals.empty and sum(run.pending for run in live.values()) < max_pending:
            if live and not (arrivals.ready() and self._has_room(arrivals.next, live.values())):
                return
            yield arrivals.take()

    def _has_room(self, run: ProblemRun, live: Collection[ProblemRun]) -> bool:
        """Whether there is room for a problem's images: for the embeddings within the budget, which
        one problem alone may exceed, and for the pixels next to those that wait to be encoded.

        Problems start in the order of arrival: those after one without room wait with it.
        """
        if not run.image_bytes:
            return True
        held = sum(other.image_bytes for other in live)
        encoding = sum(other.encoding for other in live)
        fits = not held or held + run.image_bytes <= self.engine.executor.image_bytes
        return fits and encoding < ENCODED_AHEAD

    def _submit_round(self, run: ProblemRun, live: dict[Group, ProblemRun]) -> Iterator[Answer]:
        """Submit a problem's next round. Yields its answer if no round is left or this fails."""
        try:
            group = run.next_round()
        except BaseException as error:  # panics of Rust code are no Exceptions
            run.release()
            if isinstance(error, STOPS):
                raise
            yield self._answer(run, reason(error))
            return
        if group is None:
            run.release()
            yield self._answer(run, None)
        else:
            live[group] = run

    def _failed(self, live: dict[Group, ProblemRun]) -> Iterator[Answer]:
        """End the problems that failed while their rollouts ran; yields their answers."""
        for group in [group for group, run in live.items() if run.error]:
            run = live.pop(group)
            answer = self._answer(run, run.error)
            self.engine.cancel(group)
            run.release()
            yield answer

    def _take(
        self,
        ended: Iterable[Rollout],
        live: dict[Group, ProblemRun],
        on_rollout: Callable[[RolloutResult], None],
    ) -> list[Group]:
        """Record the rollouts that ended in a step; returns the groups that they complete.

        A problem whose rollout cannot be recorded has an `error` afterwards.
        """
        done = []
        for rollout in ended:
            run = live[rollout.group]
            try:
                result = run.take(rollout)
            except STOPS:
                raise
            except BaseException as error:
                run.fail(error)
                continue
            on_rollout(result)
            if not run.pending:
                done.append(rollout.group)
        return done

    def _answer(self, run: ProblemRun, error: str | None) -> Answer:
        rounds = tuple(map(Round.of, run.rounds))
        last = rounds[-1].rollouts if rounds else ()
        if error is None and all(result.finish_reason == "error" for result in last):
            error = "the last round failed: its logits were not finite"
        text = compact(last[0].text) if self.synthesis and not error else ""
        return Answer(run.id, text, error, rounds)


class EngineOptions(TypedDict, total=False):
    """The options that `engine_for` passes to Engine, where they are documented."""

    policy: LaterRoundFirst | str
    token_budget: int
    ahead: bool | None
    speculate: int
    host_pages: int


def engine_for(
    model: "Step3VL",
    *,
    kv_dtype: "torch.dtype | None" = None,
    kv_tokens: int | None = None,
    max_kv_tokens: int | None = None,
    image_bytes: int | None = None,
    max_running: int = 256,
    **options: Unpack[EngineOptions],
) -> Engine[ModelExecutor]:
    """An engine for a model.

    kv_dtype: dtype of the KV pages; default: the model's; torch.float8_e4m3fn halves them
    kv_tokens: capacity of the KV cache; default: what fits in free memory
    max_kv_tokens: upper limit of that default
    image_bytes: budget for the image embeddings of unfinished problems; default: 5 % of free memory
    max_running: rollouts that decode at the same time

    Raises InputError if there is not enough memory for the KV.
    """
    num_pages = cdiv(kv_tokens, PAGE_SIZE) if kv_tokens else None
    if num_pages:
        size = num_pages * page_bytes(model.config.decoder, kv_dtype or model.dtype)
        if size > (free := free_bytes(model.device)):
            raise InputError(
                f"not enough memory for the KV of {kv_tokens} tokens: it needs"
                f" {size / 1e9:.2f} GB, {free / 1e9:.2f} GB are free"
            )
    executor = ModelExecutor(
        model,
        num_pages=num_pages,
        kv_dtype=kv_dtype,
        max_running=max_running,
        max_kv_tokens=max_kv_tokens,
        image_bytes=image_bytes,
    )
    stopping = Stopping(_Vocabulary(model), model.config.tokens.eos)
    return Engine(executor, stopping, **options)


@dataclass(frozen=True)
class _Vocabulary:
    """A model's tokens as bytes. Loads the tokenizer on first use: a GPU node may have none."""

    model: "Step3VL"

    def token_bytes(self, id: int) -> bytes:
        return self.model.tokenizer.token_bytes(id)
