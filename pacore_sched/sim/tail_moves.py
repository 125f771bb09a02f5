"""Which rollouts move to another GPU once no problem waits in the cluster's queue.

The lengths of rollouts differ a lot, so some GPUs run out of work long before others, whose
rollouts share the bandwidth or even wait for pages. A rollout moves as tokens: its prompt and its
tokens are prefilled at the target. It moves if it is expected to end clearly earlier there, and if
all rollouts of both GPUs together win by the move.
The simulator and the replicas of the model share this policy, so it sees plain numbers only.
"""

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from heapq import heapify, heappop, heappush
from itertools import accumulate, chain, repeat
from typing import NamedTuple

from pacore_sched.sched.lengths import EndedLengths
from pacore_sched.sched.policy import peak
from pacore_sched.sim.cost_model import StepShape
from pacore_sched.sim.replica_state import GroupState, Load, ReplicaState, RolloutState, pages_of

MIN_GAIN = 0.1  # share of a rollout's remaining time that a move must save
MIN_LEFT = 512  # tokens that a rollout is expected to generate if there is no better guess
REST = 2  # a rollout that has moved moves again when it has this many times the tokens
SOURCES = 4  # the most loaded replicas that are examined for one target


class Move(NamedTuple):
    """Rollouts `indices` of a problem's round go from one replica to another."""

    source: int
    target: int
    problem: int
    round: int
    indices: tuple[int, ...]


class LoadRanking:
    """The loads of all replicas: which are the best targets and sources.

    Both are heaps, in which entries of loads that have been replaced remain until they are met.
    """

    def __init__(self, states: Mapping[int, ReplicaState]) -> None:
        self._of = {replica: state.load for replica, state in states.items()}
        self._targets = [_as_target(each) for each in self._of.items() if each[1].open]
        self._sources = [_as_source(each) for each in self._of.items()]
        heapify(self._targets)
        heapify(self._sources)

    def __getitem__(self, replica: int) -> Load:
        return self._of[replica]

    def replace(self, replica: int, load: Load) -> None:
        self._of[replica] = load
        heappush(self._sources, _as_source((replica, load)))
        if load.open:
            heappush(self._targets, _as_target((replica, load)))

    def target(self) -> int | None:
        """The least loaded replica that is open."""
        while self._targets:
            replica = self._targets[0][-1]
            load = self._of[replica]
            if load.open and self._targets[0] == _as_target((replica, load)):
                return replica
            heappop(self._targets)
        return None

    def sources(self, target: int) -> list[int]:
        """The most loaded replicas, as far as a move from them to the target can pay."""
        found: dict[int, tuple[bool, float, int]] = {}
        while self._sources and len(found) < SOURCES:
            entry, replica = self._sources[0], self._sources[0][-1]
            load = self._of[replica]
            if entry == _as_source((replica, load)):
                if not load.waiting and self._of[target].step_s >= (1 - MIN_GAIN) * load.step_s:
                    break
                found[replica] = entry
            heappop(self._sources)
        for entry in found.values():
            heappush(self._sources, entry)
        return list(found)


def _as_target(each: tuple[int, Load]) -> tuple[float, int]:
    """The least is the best target."""
    replica, load = each
    return load.step_s, replica


def _as_source(each: tuple[int, Load]) -> tuple[bool, float, int]:
    """The least is the best source."""
    replica, load = each
    return not load.waiting, -load.step_s, replica


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

    def __init__(self, load: Load, lengths: EndedLengths) -> None:
        self.load, state = load, load.state
        self.groups = {(group.problem, group.round): group for group in state.groups}
        pool = state.num_pages * state.page_size
        self._base_s = state.cost.seconds(StepShape(0, 1, 0, 0, 0))
        self._row_s = state.cost.seconds(StepShape(1, 1, 0, 0, 0)) - self._base_s
        self._token_s = state.cost.seconds(StepShape(1, 1, pool, pool, pool)) - self._base_s
        self._token_s = (self._token_s - self._row_s) / pool  # of KV that is read
        self._share_s = (load.step_s - self._base_s) / load.running if load.running else 0.0
        self._rollouts: list[tuple[GroupState, RolloutState, int]] = []
        for group in state.groups:
            tokens = {rollout.tokens for rollout in group.rollouts}  # siblings grow at one rate
            left = {count: _left(group, count, lengths) for count in tokens}
            self._rollouts += [(group, each, left[each.tokens]) for each in group.rollouts]
        self._running = [(left, r.tokens) for _, r, left in self._rollouts if not r.waiting]
        self._lefts = sorted(left for left, _ in self._running)
        self._sums = [0, *accumulate(self._lefts)]

    @cached_property
    def places(self) -> list[_Place]:
        """All rollouts. One waiting rollout starts whenever a running one ends."""
        drained_s = self._lefts[-1] * self.load.step_s if self._lefts else 0.0
        ends = chain((left * self.load.step_s for left in self._lefts), repeat(drained_s))
        return [
            _Place(group, rollout, left, next(ends) if rollout.waiting else 0.0)
            for group, rollout, left in self._rollouts
        ]

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
        pages = pages_of(place.group.prompt_tokens, size) + pages_of(place.rollout.tokens, size)
        if self.load.pages + pages > state.usable_pages:
            return False
        growing = [*self._running, (place.left, place.rollout.tokens)]
        held = sum(tokens for _, tokens in growing)
        prompts = (self.load.pages + pages) * size - held
        return prompts + peak(growing) <= state.usable_pages * size


class TailMoves:
    """The policy, and what it knows of ended rollouts.

    No rollout moves again before it has REST times the tokens that it had at its last move. So it
    does not go back and forth, and all its moves together prefill less than twice its final length.
    """

    def __init__(self) -> None:
        self._lengths = EndedLengths()
        self._rounds: dict[int, int] = {}  # problem -> number of rounds that had an end
        self._moved: dict[int, dict[tuple[int, int], int]] = {}  # problem -> rollout -> tokens

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

        To be called when no problem waits in the cluster's queue.
        """
        loads = LoadRanking(states)
        queues: dict[int, _Queue] = {}
        moved: dict[tuple[int, int, int, int], list[int]] = {}
        while move := self._next_move(loads, queues):
            source, target, place = move
            group, rollout = place.group, place.rollout
            moved.setdefault((source, target, group.problem, group.round), []).append(
                rollout.number
            )
            of_problem = self._moved.setdefault(group.problem, {})
            of_problem[group.round, rollout.number] = rollout.tokens
            loads.replace(source, _without(loads[source].state, group, rollout).load)
            loads.replace(target, _with(loads[target].state, group, rollout).load)
            del queues[source], queues[target]
        return [Move(*key, tuple(indices)) for key, indices in moved.items()]

    def _next_move(
        self, loads: LoadRanking, queues: dict[int, _Queue]
    ) -> tuple[int, int, _Place] | None:
        """The best move to the least loaded replica from one of the most loaded ones."""
        target = loads.target()
        if target is None:
            return None
        for source in loads.sources(target):
            for replica in (source, target):
                if replica not in queues:
                    queues[replica] = _Queue(loads[replica], self._lengths)
            if place := self._best_place(queues[source], queues[target]):
                return source, target, place
        return None

    def _best_place(self, source: _Queue, target: _Queue) -> _Place | None:
        """The rollout of a source whose move to a target wins most, if any move pays."""
        gains: list[tuple[float, int]] = []
        seen: set[tuple[int, int, float]] = set()
        for number, place in enumerate(source.places):
            group, rollout = place.group, place.rollout
            last = self._moved.get(group.problem, {}).get((group.round, rollout.number))
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


def _left(group: GroupState, tokens: int, lengths: EndedLengths) -> int:
    """Tokens that a rollout of `tokens` is expected to generate: without a prediction as many."""
    expected = lengths.expected((group.problem, group.round), group.round, tokens)
    if expected is None:
        expected = tokens + max(MIN_LEFT, tokens)
    return min(expected, group.max_tokens) - tokens


def _without(state: ReplicaState, group: GroupState, rollout: RolloutState) -> ReplicaState:
    rest = tuple(other for other in group.rollouts if other.number != rollout.number)
    changed = (group._replace(rollouts=rest),) if rest else ()
    others = tuple(other for other in state.groups if other is not group)
    return replace(state, groups=others + changed)


def _with(state: ReplicaState, group: GroupState, rollout: RolloutState) -> ReplicaState:
    rollouts: tuple[RolloutState, ...] = (rollout._replace(waiting=False),)
    others = []
    for other in state.groups:
        if (other.problem, other.round) == (group.problem, group.round):
            rollouts = other.rollouts + rollouts
        else:
            others.append(other)
    return replace(state, groups=(*others, group._replace(rollouts=rollouts)))
