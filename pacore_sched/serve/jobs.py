"""A request's work on the engine, and the events that it gives rise to.

A job is one problem: a prompt with its rollouts, or a PaCoRe problem with its rounds. The engine's
thread runs it and sends its events to the event loop, where the response is written.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from pacore_sched.answers.journal_lines import RolloutResult
from pacore_sched.answers.live import Answer
from pacore_sched.answers.problem_run import ProblemRun
from pacore_sched.sched.request import Group
from pacore_sched.serve.errors import ApiError


@dataclass(frozen=True)
class RoundStarted:
    """A round's rollouts have been submitted.

    started: how many of its `width` they are; the others had ended in an earlier request
    cached_tokens: of its prompt, whose KV an earlier round has written: images
    cut, dropped: rollouts of the round before whose messages were shortened or left out
    """

    number: int
    width: int
    started: int
    prompt_tokens: int
    cached_tokens: int
    cut: tuple[int, ...]
    dropped: tuple[int, ...]


@dataclass(frozen=True)
class NewTokens:
    """Tokens of a rollout of the last round, in the order in which they were sampled."""

    index: int
    tokens: Sequence[int]
    logprobs: Sequence[float]
    top_logprobs: Sequence[Sequence[tuple[int, float]]] = ()


@dataclass(frozen=True)
class RolloutEnded:
    """A rollout of any round has ended or was cancelled.

    cached_tokens: of its round's prompt, whose KV earlier requests had written; those that were not
        in an event before
    """

    result: RolloutResult
    cached_tokens: int = 0


@dataclass(frozen=True)
class Ended:
    """The job has ended; nothing follows. `answer.error` says whether it failed alone."""

    answer: Answer


@dataclass(frozen=True)
class Failed:
    """The job was ended for a reason that is not its own; nothing follows."""

    status: int
    reason: str


def check_answer(answer: Answer) -> None:
    """Raise ApiError if a problem, or a rollout of its last round, has failed."""
    error, last = answer.error, answer.rounds[-1].rollouts if answer.rounds else ()
    if error is None and any(result.finish_reason == "error" for result in last):
        error = "a rollout failed: its logits were not finite"
    if error:
        raise ApiError(500, error)


class Started:
    """The first part of the prompt has been written: the job waits no longer."""


Event = Started | RoundStarted | NewTokens | RolloutEnded | Ended | Failed


@dataclass(eq=False)
class Job:
    """A problem on its way through the engine.

    stream: whether the tokens of the last round are sent as they come
    arrived: in seconds of time.monotonic, as the other times; None: not yet
    events: filled by the engine's thread, in lists: those of one step
    """

    run: ProblemRun
    stream: bool
    arrived: float
    events: asyncio.Queue[list[Event]] = field(default_factory=asyncio.Queue)
    # Of the engine's thread:
    started: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    group: Group | None = None  # whose round has been reported
    sent: dict[int, int] = field(default_factory=dict)  # tokens reported, by index
    seen: int = 0  # tokens of the current round
    step: int = 0  # the last one in which it received tokens
    steps: int = 0  # how many these were
    outbox: list[Event] = field(default_factory=list)  # of the current step
    # Of the event loop:
    results: list[RolloutResult] = field(default_factory=list)  # in the order in which they ended
    waits: bool = True  # neither started nor ended
