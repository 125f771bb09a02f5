"""Which rollouts move to another GPU once no problem waits in the cluster's queue.

The lengths of rollouts differ a lot, so some GPUs run out of work long before others, whose
rollouts share the bandwidth or even wait for pages. A rollout moves as tokens: its prompt and its
tokens are prefilled at the target. It moves if it is expected to end clearly earlier there, and if
all rollouts of both GPUs together win by the move.
The simulator and the replicas of the model share this policy, so it sees plain numbers only.
"""

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from heapq import nlargest
from itertools import accumulate
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
    """What the policy compares for all replicas: how much one runs, and the time of a step."""

    def __init__(self, replica: int, state: ReplicaState) -> None:
        self.replica, self.state = replica, state
        self.running = self.waiting = self.pages = 0
        shared = unshared = segments = 0
        for group in state.groups:
            tokens = [rollout.tokens for rollout in group.rollouts if not rollout.waiting]
            self.waiting += len(group.rollouts) - len(tokens)
            if tokens:
                self.running += len(tokens)
                self.pages += _pages(group.prompt_tokens, state.page_size)
                self.pages += sum(_pages(count, state.page_size) for count in tokens)
                shared += group.prompt_tokens + sum(tokens)
                unshared += group.prompt_tokens * len(tokens) + sum(tokens)
                segments += 1
        shape = StepShape(self.running, self.running, shared, unshared, unshared, segments)
        self.step_s = state.cost.seconds(shape) if self.running else 0.0

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
        places = []
        for group in state.groups:
            tokens = {rollout.tokens for rollout in group.rollouts}  # siblings grow at one rate
            left = {count: _left(group, count, lengths) for count in tokens}
            places += [(group, rollout, left[rollout.tokens]) for rollout in group.rollouts]
        self.lefts = sorted(left for _, rollout, left in places if not rollout.waiting)
        self._sums = [0, *accumulate(self.lefts)]
        pool = state.num_pages * state.page_size
        self._base_s = state.cost.seconds(StepShape(1, 1, 1, 1, 1))
        self._token_s = state.cost.seconds(StepShape(1, 1, pool, pool, pool)) - self._base_s
        self._token_s /= pool  # of KV read
        self._share_s = max(0.0, load.step_s - self._base_s) / max(1, load.running)
        waits = self._waits()
        self.places = [_Place(*place, next(waits) if place[1].waiting else 0.0) for place in places]

    def overlap(self, left: int) -> int:
        """Sum of min(left, tokens left) over the running rollouts."""
        shorter = bisect_right(self.lefts, left)
        return self._sums[shorter] + (len(self.lefts) - shorter) * left

    def own_s(self, place: _Place) -> float:
        """Seconds that a rollout adds to each step here."""
        return self._token_s * (place.group.prompt_tokens + place.rollout.tokens)

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
        if self.load.pages + pages > (1 - WATERMARK) * state.num_pages:
            return False
        growing = [(p.left, p.rollout.tokens) for p in self.places if not p.rollout.waiting]
        growing.append((place.left, place.rollout.tokens))
        held = sum(tokens for _, tokens in growing)
        prompts = (self.load.pages + pages) * size - held
        return prompts + peak(growing) <= (1 - WATERMARK) * state.num_pages * size

    def _waits(self) -> Iterator[float]:
        """Seconds until each waiting rollout starts: at once, as far as pages and slots suffice,
        and then one whenever a running rollout ends."""
        load, state = self.load, self.load.state
        free = (1 - WATERMARK) * state.num_pages - load.pages
        slots = state.max_running - load.running
        waiting = [r for group in state.groups for r in group.rollouts if r.waiting]
        ends = 0
        for rollout in waiting:
            pages = _pages(rollout.tokens, state.page_size)
            if not ends and slots > 0 and pages <= free:
                free, slots = free - pages, slots - 1
                yield 0.0
                continue
            ends += 1
            tokens = self.lefts[min(ends, len(self.lefts)) - 1] if self.lefts else 0
            yield tokens * load.step_s


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
            if (load := self._loads.get(replica)) and load.state is state
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
