"""What an engine does at one moment, between two steps: numbers, never texts or names.

The engine's thread takes it. Its size is bounded, and what it leaves out is counted.
"""

import time
from collections.abc import Collection
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from pacore_sched.engine.engine import Engine
from pacore_sched.engine.executor import ModelExecutor
from pacore_sched.sched.request import Rollout
from pacore_sched.serve.jobs import Job
from pacore_sched.serve.page.tree import KvPages, Node, read_tree

MAX_PROBLEMS = 24
MAX_ROLLOUTS = 32  # per problem

RolloutState = Literal["waiting", "running", "ended", "cancelled"]


@dataclass(frozen=True, slots=True)
class RolloutProgress:
    """A rollout of the current round. `tokens`: that it has generated."""

    state: RolloutState
    tokens: int


@dataclass(frozen=True, slots=True)
class ProblemProgress:
    """A request's problem on the engine.

    number: counts the requests of the server
    seconds: since the request arrived
    round: the current one, from 0, of as many as there are `widths`
    synthesis: whether the last round is the synthesis
    prompt_tokens: of the current round
    tokens: generated in all rounds
    running, waiting, ended: rollouts of the current round
    rollouts: the first ones of the current round
    """

    number: int
    seconds: float
    round: int
    widths: list[int]
    synthesis: bool
    prompt_tokens: int
    tokens: int
    running: int
    waiting: int
    ended: int
    rollouts: list[RolloutProgress]
    rollouts_left_out: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """An engine between two steps.

    at: seconds of a clock that never goes back
    tokens, steps: since the server started
    running, waiting: rollouts
    problems: those on the engine, in the order in which they started
    nodes: of the prefix tree (tree.py)
    """

    at: float
    tokens: int
    steps: int
    running: int
    waiting: int
    kv: KvPages
    problems: list[ProblemProgress]
    problems_left_out: int
    nodes: list[Node]
    nodes_left_out: int


def take_snapshot(engine: Engine[ModelExecutor], jobs: Collection[Job]) -> Snapshot:
    """The engine and its jobs now; only for the engine's thread, between steps."""
    scheduler, now = engine.scheduler, time.monotonic()
    kv, nodes, nodes_left_out = read_tree(scheduler)
    problems = [_progress(job, now) for job in islice(jobs, MAX_PROBLEMS)]
    return Snapshot(
        at=now,
        tokens=engine.stats.generated,
        steps=engine.stats.steps,
        running=len(scheduler.running),
        waiting=sum(len(group.waiting) for group in scheduler.groups),
        kv=kv,
        problems=problems,
        problems_left_out=len(jobs) - len(problems),
        nodes=nodes,
        nodes_left_out=nodes_left_out,
    )


def _progress(job: Job, now: float) -> ProblemProgress:
    run, group = job.run, job.run.group
    assert group is not None
    states = [_state(rollout) for rollout in group.rollouts]
    running, waiting = states.count("running"), states.count("waiting")
    width = run.settings.widths[len(run.rounds)]
    rollouts = [
        RolloutProgress(state, len(rollout.tokens))
        for state, rollout in zip(states[:MAX_ROLLOUTS], group.rollouts, strict=False)
    ]
    tokens = sum(result.num_tokens for round_ in run.rounds for result in round_)
    return ProblemProgress(
        number=run.number,
        seconds=round(now - job.arrived, 1),
        round=len(run.rounds),
        widths=list(run.settings.widths),
        synthesis=run.settings.synthesis,
        prompt_tokens=group.prompt_tokens,
        tokens=tokens + sum(len(rollout.tokens) for rollout in group.rollouts),
        running=running,
        waiting=waiting,
        ended=width - running - waiting,  # also those of an earlier request (saved.py)
        rollouts=rollouts,
        rollouts_left_out=len(states) - len(rollouts),
    )


def _state(rollout: Rollout) -> RolloutState:
    if rollout.finish_reason:
        return "cancelled" if rollout.finish_reason == "cancelled" else "ended"
    return "running" if rollout.node >= 0 else "waiting"
