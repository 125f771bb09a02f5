"""Which rollouts move to another GPU once no problem waits in the cluster's queue.

The lengths of rollouts differ a lot, so some GPUs run out of work long before others, whose
rollouts share the bandwidth or even wait for pages. A rollout moves as tokens: its prompt and its
tokens are prefilled at the target. It moves if it is expected to end clearly earlier there, and if
all rollouts of both GPUs together win by the move.
The simulator and the replicas of the model share this policy, so it sees plain numbers only.
"""

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from heapq import nlargest
from itertools import accumulate
from typing import NamedTuple

from kernels.runtime.arithmetic import cdiv
from pacore_sched.sched.lengths import EndedLengths
from pacore_sched.sched.policy import peak
from pacore_sched.sched.scheduler import Scheduler
from pacore_sched.sim.cost_model import CostModel, StepShape

MIN_GAIN = 0.1  # share of a rollout's remaining time that a move must save
MIN_LEFT = 512  # tokens that a rollout is expected to generate if there is no better guess
REST = 2  # a rollout that has moved moves again when it has this many times the tokens
WATERMARK = 0.01  # share of a target's pages that stays free
SOURCES = 4  # the most loaded replicas that are examined for one target


class RolloutState(NamedTuple):
    """An unfinished rollout with `tokens` generated; it waits if it has no pages yet."""

    index: int
    tokens: int
    waiting: bool


class GroupState(NamedTuple):
    """The unfinished rollouts of one round of a problem that one replica holds."""

    problem: int
    round: int
    prompt_tokens: int
    max_tokens: int
    rollouts: tuple[RolloutState, ...]


@dataclass(frozen=True)
class ReplicaState:
    """The rollouts of one replica, each (problem, round) once, and what their steps cost there."""

    groups: tuple[GroupState, ...]
    num_pages: int
    page_size: int
    max_running: int
    cost: CostModel


class Move(NamedTuple):
    """Rollouts `indices` of a problem's round go from one replica to another."""

    source: int
    target: int
    problem: int
    round: int
    indices: tuple[int, ...]


def replica_state(scheduler: Scheduler, cost: CostModel) -> ReplicaState:
    """A scheduler's state, without rollouts whose max_tokens are all scheduled."""
    groups: dict[tuple[int, int], GroupState] = {}
    for group in scheduler.groups:
        rollouts = tuple(
            RolloutState(rollout.index, rollout.scheduled, rollout.node < 0)
            for rollout in group.rollouts
            if not rollout.finish_reason and rollout.scheduled < rollout.max_tokens
        )
        if not rollouts:
            continue
        key = group.problem, group.round
        if key in groups:  # rollouts that came in several moves
            rollouts = groups[key].rollouts + rollouts
        max_tokens = group.rollouts[0].max_tokens
        groups[key] = GroupState(*key, group.prompt_tokens, max_tokens, rollouts)
    tree = scheduler.tree
    return ReplicaState(
        tuple(groups.values()), tree.num_pages, tree.page_size, scheduler.max_running, cost
    )


class _Place(NamedTuple):
    """A rollout at a replica."""

    group: GroupState
    index: int
    tokens: int
    waiting: bool
    left: int  # tokens that it is expected to generate


@dataclass
class _Gain:
    """The seconds that all rollouts of two replicas win together if a rollout moves."""

    seconds: float
    place: _Place


@dataclass
class _Load:
    """A replica's load: what the policy compares for all replicas."""

    replica: int
    state: ReplicaState
    running: int = 0
    waiting: int = 0
    pages: int = 0
    step_s: float = 0.0  # of a step of all running rollouts

    @classmethod
    def of(cls, replica: int, state: ReplicaState) -> "_Load":
        load = cls(replica, state)
        size = state.page_size
        shared = unshared = segments = 0
        for group in state.groups:
            tokens = [rollout.tokens for rollout in group.rollouts if not rollout.waiting]
            load.waiting += len(group.rollouts) - len(tokens)
            if tokens:
                load.running += len(tokens)
                load.pages += cdiv(group.prompt_tokens, size) + sum(n // size + 1 for n in tokens)
                shared += group.prompt_tokens + sum(tokens)
                unshared += group.prompt_tokens * len(tokens) + sum(tokens)
                segments += 1
        if load.running:
            n = load.running
            shape = StepShape(n, n, shared, unshared, unshared, segments)
            load.step_s = state.cost.seconds(shape)
        return load


class TailMoves:
    """The policy, and what it knows of ended rollouts.

    No rollout moves again before it has REST times the tokens that it had at its last move. So it
    does not go back and forth, and all its moves together prefill less than twice its final length.
    """

    def __init__(self) -> None:
        self._lengths = EndedLengths()
        self._rounds: dict[int, int] = {}  # problem -> number of rounds that had an end
        self._moved: dict[int, dict[tuple[int, int], int]] = {}  # problem -> rollout -> tokens
        self._loads: dict[int, _Load] = {}

    def ended(self, problem: int, round: int, tokens: int) -> None:
        """Learn the length of a rollout that has ended, not of one that was cancelled."""
        self._lengths.add((problem, round), round, tokens)
        self._rounds[problem] = max(self._rounds.get(problem, 0), round + 1)

    def forget(self, problem: int) -> None:
        """Called when a problem is answered or cancelled."""
        for round in range(self._rounds.pop(problem, 0)):
            self._lengths.forget((problem, round))
        self._moved.pop(problem, None)

    def moves(self, states: Mapping[int, ReplicaState]) -> list[Move]:
        """The moves that pay, given the states of all replicas that take part.

        To be called when no problem waits in the cluster's queue. A state that has not changed
        since the last call should be the same object: its load is then not computed again.
        """
        raise NotImplementedError
