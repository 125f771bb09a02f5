"""Which rollouts move to another GPU once no problem waits in the cluster's queue.

The lengths of rollouts differ a lot, so some GPUs run out of work long before others, whose
rollouts share the bandwidth or even wait for pages. A rollout moves as tokens: its prompt and its
tokens are prefilled at the target. It moves if it is expected to end clearly earlier there, and if
all rollouts of both GPUs together win by the move.
The simulator and the replicas of the model share this policy, so it sees plain numbers only.
"""

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, replace
from heapq import nlargest
from itertools import accumulate, chain, repeat
from typing import NamedTuple

from pacore_sched.sched.lengths import EndedLengths
from pacore_sched.sched.policy import peak
from pacore_sched.sched.scheduler import Scheduler
from pacore_sched.sim.cost_model import CostModel, StepShape

MIN_GAIN = 0.1  # share of a rollout's remaining time that a move must save
MIN_LEFT = 512  # tokens that a rollout is expected to generate if there is no better guess
REST = 2  # a rollout that has moved moves again when it has this many times the tokens
WATERMARK = 0.01  # share of a target's pages that stays free
SOURCES = 4  # the most loaded replicas that are examined for one target


@dataclass(frozen=True, slots=True)
class RolloutState:
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


class _Load:
    """What the policy compares for all replicas: how much one runs, and the time of a step.

    Rollouts that only wait for their prompt, or for the next step, count as running.
    """

    def __init__(self, replica: int, given: ReplicaState) -> None:
        self.replica, self.given = replica, given
        self.state, self.pages = _started(given)
        self.running = self.waiting = shared = unshared = segments = 0
        for group in self.state.groups:
            tokens = [rollout.tokens for rollout in group.rollouts if not rollout.waiting]
            self.waiting += len(group.rollouts) - len(tokens)
            if tokens:
                self.running += len(tokens)
                shared += group.prompt_tokens + sum(tokens)
                unshared += group.prompt_tokens * len(tokens) + sum(tokens)
                segments += 1
        shape = StepShape(self.running, self.running, shared, unshared, unshared, segments)
        self.step_s = given.cost.seconds(shape) if self.running else 0.0

    @property
    def open(self) -> bool:
        """Whether a rollout that comes here would start at once, if the pages suffice."""
        return not self.waiting and self.running < self.state.max_running


class _Place(NamedTuple):
    """A rollout at a replica."""

    group: GroupState
    rollout: RolloutState
    left: int  # tokens that it is expected to generate
    wait_s: float  # until it starts


class _Queue:
    """The rollouts of a replica and when they are expected to end.

    The time of a step is taken as a base, plus a share for every running rollout until it ends. A
    share is proportional to the KV that the rollout reads; the others' are taken as equal.
    """

    def __init__(self, load: _Load, lengths: EndedLengths) -> None:
        self.load, state = load, load.state
        self.groups = {(group.problem, group.round): group for group in state.groups}
        pool = state.num_pages * state.page_size
        self._base_s = state.cost.seconds(StepShape(0, 1, 0, 0, 0))
        self._row_s = state.cost.seconds(StepShape(1, 1, 0, 0, 0)) - self._base_s
        self._token_s = state.cost.seconds(StepShape(1, 1, pool, pool, pool)) - self._base_s
        self._token_s = (self._token_s - self._row_s) / pool  # of KV that is read
        self._share_s = (load.step_s - self._base_s) / load.running if load.running else 0.0
        rollouts: list[tuple[GroupState, RolloutState, int]] = []
        for group in state.groups:
            tokens = {rollout.tokens for rollout in group.rollouts}  # siblings grow at one rate
            left = {count: _left(group, count, lengths) for count in tokens}
            rollouts += [(group, rollout, left[rollout.tokens]) for rollout in group.rollouts]
        self._lefts = sorted(left for _, rollout, left in rollouts if not rollout.waiting)
        self._sums = [0, *accumulate(self._lefts)]
        # One waiting rollout starts whenever a running one ends.
        ends = chain((left * load.step_s for left in self._lefts), repeat(self._drained_s()))
        self.places = [_Place(*each, next(ends) if each[1].waiting else 0.0) for each in rollouts]

    def _drained_s(self) -> float:
        return self._lefts[-1] * self.load.step_s if self._lefts else 0.0

    def overlap(self, left: int) -> int:
        """Sum of min(left, tokens left) over the running rollouts."""
        shorter = bisect_right(self._lefts, left)
        return self._sums[shorter] + (len(self._lefts) - shorter) * left

    def own_s(self, place: _Place) -> float:
        """Seconds that a rollout adds to each step here."""
        context = place.group.prompt_tokens + place.rollout.tokens
        return self._row_s + self._token_s * context

    def prefill_s(self, place: _Place) -> float:
        """Seconds until a rollout that has no KV here has it."""
        prompt, tokens = place.group.prompt_tokens, place.rollout.tokens
        group = self.groups.get((place.group.problem, place.group.round))
        there = group is not None and any(not rollout.waiting for rollout in group.rollouts)
        rows, context = (tokens + 1, prompt) if there else (prompt + tokens, 0)
        pairs = rows * context + rows * (rows + 1) // 2
        shape = StepShape(rows, 1, context + rows, context + rows, pairs, 1)
        return self.load.state.cost.seconds(shape)

    def decode_s(self, place: _Place, others: int) -> float:
        """Seconds of all steps of a rollout here; `others`: its overlap with the others."""
        return place.left * (self._base_s + self.own_s(place)) + others * self._share_s

    def has_room(self, place: _Place) -> bool:
        """Whether the pages suffice for a rollout, now and as all grow to their expected ends."""
        state, size = self.load.state, self.load.state.page_size
        pages = _pages(place.group.prompt_tokens, size) + _pages(place.rollout.tokens, size)
        if self.load.pages + pages > _usable(state):
            return False
        growing = [(p.left, p.rollout.tokens) for p in self.places if not p.rollout.waiting]
        growing.append((place.left, place.rollout.tokens))
        held = sum(tokens for _, tokens in growing)
        prompts = (self.load.pages + pages) * size - held
        return prompts + peak(growing) <= _usable(state) * size


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
        self._loads = {
            replica: load
            if (load := self._loads.get(replica)) and load.given is state
            else _Load(replica, state)
            for replica, state in states.items()
        }
        loads = dict(self._loads)
        queues: dict[int, _Queue] = {}
        moved: dict[tuple[int, int, int, int], list[int]] = {}
        while pair := self._next_move(loads, queues):
            source, target, place = pair
            group, rollout = place.group, place.rollout
            key = source.replica, target.replica, group.problem, group.round
            moved.setdefault(key, []).append(rollout.index)
            of_problem = self._moved.setdefault(group.problem, {})
            of_problem[group.round, rollout.index] = rollout.tokens
            for load, state in (
                (source, _without(source.state, group, rollout)),
                (target, _with(target.state, group, rollout)),
            ):
                loads[load.replica] = _Load(load.replica, state)
                queues.pop(load.replica, None)
        return [Move(*key, tuple(indices)) for key, indices in moved.items()]

    def _next_move(
        self, loads: Mapping[int, _Load], queues: dict[int, _Queue]
    ) -> tuple[_Load, _Load, _Place] | None:
        """The best move to the least loaded replica from one of the most loaded ones."""
        targets = [load for load in loads.values() if load.open]
        if not targets:
            return None
        target = min(targets, key=lambda load: (load.step_s, load.replica))
        sources = [
            load
            for load in loads.values()
            if load.waiting or target.step_s < (1 - MIN_GAIN) * load.step_s
        ]
        most_loaded = nlargest(
            SOURCES, sources, key=lambda load: (load.waiting > 0, load.step_s, -load.replica)
        )
        for source in most_loaded:
            for load in (source, target):
                if load.replica not in queues:
                    queues[load.replica] = _Queue(load, self._lengths)
            place = self._best_place(queues[source.replica], queues[target.replica])
            if place:
                return source, target, place
        return None

    def _best_place(self, source: _Queue, target: _Queue) -> _Place | None:
        """The rollout of a source whose move to a target wins most, if any move pays."""
        gains: list[tuple[float, int]] = []
        seen: set[tuple[int, int, float]] = set()
        for number, place in enumerate(source.places):
            group, rollout = place.group, place.rollout
            last = self._moved.get(group.problem, {}).get((group.round, rollout.index))
            if last is not None and rollout.tokens < max(MIN_LEFT, REST * last):
                continue
            if (same := (id(group), rollout.tokens, place.wait_s)) in seen:
                continue  # a sibling that would win as much
            seen.add(same)
            here, there = source.overlap(place.left), target.overlap(place.left)
            if not rollout.waiting:
                here -= place.left
            stay = place.wait_s + source.decode_s(place, here)
            if rollout.waiting:
                stay += source.prefill_s(place)
            won = stay - target.decode_s(place, there)
            if won < MIN_GAIN * stay:
                continue
            prefill = target.prefill_s(place)
            won -= prefill
            if won < MIN_GAIN * stay:
                continue
            relief = 0.0 if place.wait_s else source.own_s(place) * here
            delay = target.own_s(place) * there + prefill * target.load.running
            if won + relief > delay:
                gains.append((won + relief - delay, -number))
        for _, number in sorted(gains, reverse=True):
            if target.has_room(source.places[-number]):
                return source.places[-number]
        return None


def _started(state: ReplicaState) -> tuple[ReplicaState, int]:
    """The state with those waiting rollouts started that find pages and slots, and its pages."""
    size = state.page_size
    pages = running = 0
    for group in state.groups:
        tokens = [rollout.tokens for rollout in group.rollouts if not rollout.waiting]
        running += len(tokens)
        pages += sum(_pages(count, size) for count in tokens)
        pages += _pages(group.prompt_tokens, size) if tokens else 0
    if running == sum(len(group.rollouts) for group in state.groups):
        return state, pages
    groups, full = [], False
    for group in state.groups:
        prompt = all(rollout.waiting for rollout in group.rollouts)
        rollouts = []
        for rollout in group.rollouts:
            if rollout.waiting and not full:
                more = _pages(rollout.tokens, size)
                more += _pages(group.prompt_tokens, size) if prompt else 0
                full = running == state.max_running or pages + more > _usable(state)
                if not full:
                    running, pages, prompt = running + 1, pages + more, False
                    rollout = replace(rollout, waiting=False)
            rollouts.append(rollout)
        groups.append(group._replace(rollouts=tuple(rollouts)))
    return replace(state, groups=tuple(groups)), pages


def _usable(state: ReplicaState) -> float:
    """Pages that may be in use when a rollout starts."""
    return (1 - WATERMARK) * state.num_pages


def _pages(tokens: int, page_size: int) -> int:
    """Pages of a rollout or a prompt, with the token that is next."""
    return tokens // page_size + 1


def _left(group: GroupState, tokens: int, lengths: EndedLengths) -> int:
    """Tokens that a rollout of `tokens` is expected to generate: without a prediction as many."""
    expected = lengths.expected((group.problem, group.round), group.round, tokens)
    if expected is None:
        expected = tokens + max(MIN_LEFT, tokens)
    return min(expected, group.max_tokens) - tokens


def _without(state: ReplicaState, group: GroupState, rollout: RolloutState) -> ReplicaState:
    rest = tuple(other for other in group.rollouts if other.index != rollout.index)
    changed = (group._replace(rollouts=rest),) if rest else ()
    others = tuple(other for other in state.groups if other is not group)
    return replace(state, groups=others + changed)


def _with(state: ReplicaState, group: GroupState, rollout: RolloutState) -> ReplicaState:
    rollouts: tuple[RolloutState, ...] = (replace(rollout, waiting=False),)
    others = []
    for other in state.groups:
        if (other.problem, other.round) == (group.problem, group.round):
            rollouts = other.rollouts + rollouts
        else:
            others.append(other)
    return replace(state, groups=(*others, group._replace(rollouts=rollouts)))
