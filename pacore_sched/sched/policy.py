"""Scheduling policies: order of groups, admission of rollouts, choice of preemption victims.

A policy orders groups (`key`), may hold some of them back (`may_start`), decides whether a rollout
may start given the free pages (`admits`), and names the rollout to preempt when running ones cannot
grow (`victim`). Policies see ints only. None knows the length of an unfinished rollout, except
Oracle.
"""

from collections.abc import Callable, Collection, Iterable
from typing import Protocol

from kernels.runtime.arithmetic import cdiv
from pacore_sched.sched.lengths import EndedLengths
from pacore_sched.sched.prefix_tree import PrefixTree
from pacore_sched.sched.request import Group, Rollout


class SchedulerState(Protocol):
    """The part of the scheduler that a policy may read."""

    tree: PrefixTree
    steps: int  # decode steps so far

    @property
    def running(self) -> Collection[Rollout]:
        """Rollouts in the order in which they started."""

    @property
    def groups(self) -> Collection[Group]:
        """Groups that are not done."""


class LaterRoundFirst:
    """Later rounds first, then problems in order of arrival: finish what has begun.

    Optimises the mean time to answer: a problem whose many rollouts have finished only needs its
    synthesis, which is short and delays the others little. Admission is optimistic: it counts the
    pages that a rollout needs now, and keeps a watermark of free pages for those that grow.
    """

    fixed_keys = True  # whether a group's key never changes

    def __init__(self, watermark: float = 0.01) -> None:
        self.watermark = watermark  # share of all pages that stays free when a rollout starts

    def key(self, group: Group) -> tuple:
        """Sort key of a group: smaller keys go first."""
        return (-group.round, group.problem, group.number)

    def order(self, rollouts: Iterable[Rollout]) -> list[Rollout]:
        """The rollouts of a new group in the order in which they start."""
        return list(rollouts)

    def before_admission(self, state: SchedulerState) -> None:
        """Called before each pass over the waiting groups."""

    def may_start(self, group: Group) -> bool:
        """Whether a group may start now if there is room for it."""
        return True

    def admits(self, rollout: Rollout, pages: int, state: SchedulerState) -> bool:
        """Whether a rollout that takes `pages` pages now may start.

        Only called while other rollouts run: a rollout that would be alone may always start.
        """
        return pages + self.watermark * state.tree.num_pages <= state.tree.free_pages

    def victim(self, running: Collection[Rollout]) -> Rollout:
        """The rollout to preempt: the last group's rollout with the fewest tokens."""
        keys = {group: self.key(group) for group in {rollout.group for rollout in running}}
        return max(running, key=lambda rollout: (keys[rollout.group], -rollout.scheduled))

    def ended(self, rollout: Rollout) -> None:
        """Called for every rollout that has ended, unless it was cancelled."""

    def forget(self, group: Group) -> None:
        """Called for every group that is done or cancelled."""


class Fcfs(LaterRoundFirst):
    """First come, first served; admission by the pages needed now, as in vLLM.

    A synthesis joins the end of the queue like any other request. The rollout that started last is
    preempted first.
    """

    def key(self, group: Group) -> tuple:
        return (group.number,)

    def victim(self, running: Collection[Rollout]) -> Rollout:
        return [*running][-1]


class SglangLike(Fcfs):
    """First come, first served, with SGLang's admission and retraction.

    Every running rollout is assumed to need a share (the ratio) of its remaining max_tokens, which
    are clipped at 4,096. The ratio falls from 0.7 to 0.098 over 600 decode steps. When memory runs
    out, the rollout with the least progress is retracted, and the ratio is reset to the share of
    max_tokens that has been generated.
    """

    CLIP, FIRST, LAST, STEPS = 4096, 0.7, 0.098, 600

    def __init__(self, watermark: float = 0.0) -> None:
        super().__init__(watermark)
        self._ratio, self._ratio_step = self.FIRST, 0

    def before_admission(self, state: SchedulerState) -> None:
        decay = (self.FIRST - self.LAST) / self.STEPS
        self._ratio = max(self.LAST, self._ratio - decay * (state.steps - self._ratio_step))
        self._ratio_step = state.steps

    def admits(self, rollout: Rollout, pages: int, state: SchedulerState) -> bool:
        size = state.tree.page_size
        left = sum(min(r.max_tokens - r.scheduled, self.CLIP) for r in state.running) * self._ratio
        new = min(rollout.max_tokens - rollout.scheduled, self.CLIP)
        return pages * size + left + new <= state.tree.free_pages * size

    def victim(self, running: Collection[Rollout]) -> Rollout:
        done = sum(rollout.scheduled for rollout in running) + 20 * len(running)
        self._ratio = min(1.0, done / sum(rollout.max_tokens for rollout in running))
        return min(running, key=lambda rollout: rollout.scheduled)


class ReserveMax(Fcfs):
    """First come, first served; a rollout starts only if all could reach their max_tokens.

    Never preempts, and leaves most of the memory idle. This is TensorRT-LLM's default.
    """

    def admits(self, rollout: Rollout, pages: int, state: SchedulerState) -> bool:
        tree = state.tree
        running = [(r.node, r.max_tokens - tree.length(r.node)) for r in state.running]
        others = sum(tree.pages_needed(node, tokens) for node, tokens in running)
        size = tree.page_size  # `pages` covers the rollout's tokens so far
        later = cdiv(rollout.max_tokens, size) - (1 + rollout.scheduled) // size
        return others + pages + later <= tree.free_pages


class Barrier(Fcfs):
    """Batches of problems, one round at a time: no round starts before the previous one is done.

    This is a client that sends one batch after another, a round at a time. With size 1 it is one
    problem at a time.
    """

    def __init__(self, size: int = 8, watermark: float = 0.01) -> None:
        super().__init__(watermark)
        self.size = size

    def before_admission(self, state: SchedulerState) -> None:
        stages = ((group.problem // self.size, group.round) for group in state.groups)
        self._stage = min(stages, default=None)

    def may_start(self, group: Group) -> bool:
        return (group.problem // self.size, group.round) == self._stage


class OneAtATime(Barrier):
    """One problem at a time, as on an engine that only knows batches: the baseline."""

    def __init__(self, watermark: float = 0.01) -> None:
        super().__init__(1, watermark)


class Predicted(LaterRoundFirst):
    """Later round first; a rollout starts only if its pages are predicted to last.

    Expected lengths are those of lengths.py. The pages needed are the peak that the running
    rollouts will hold together. It is below the sum of their final sizes, because each returns its
    pages when it ends. Trades a little occupancy for fewer preemptions.
    """

    def __init__(self, watermark: float = 0.01) -> None:
        super().__init__(watermark)
        self._lengths = EndedLengths()

    def ended(self, rollout: Rollout) -> None:
        self._lengths.add(rollout.group, rollout.group.round, rollout.scheduled)

    def forget(self, group: Group) -> None:
        self._lengths.forget(group)

    def expected_length(self, rollout: Rollout) -> int:
        """The number of tokens that a rollout is expected to have at its end; without a prediction
        as many as it has: as optimistic as the other policies."""
        group, tokens = rollout.group, rollout.scheduled
        expected = self._lengths.expected(group, group.round, tokens)
        return tokens if expected is None else min(expected, rollout.max_tokens)

    def admits(self, rollout: Rollout, pages: int, state: SchedulerState) -> bool:
        if not super().admits(rollout, pages, state):
            return False
        tree = state.tree
        left = [(self.expected_length(r) - r.scheduled, tree.length(r.node)) for r in state.running]
        left.append((self.expected_length(rollout) - rollout.scheduled, pages * tree.page_size))
        running = sum(len(tree.pages(r.node)) for r in state.running)
        prompts = tree.num_pages - tree.free_pages - running
        room = (1 - self.watermark) * tree.num_pages - prompts
        return peak(left) <= room * tree.page_size


class ShortestExpected(LaterRoundFirst):
    """The group with the fewest expected tokens left goes first, and is preempted last.

    Optimises the mean time to answer where problems differ in length. A rollout that has not ended
    is expected to generate as many more tokens as its group has generated so far, running rollouts
    included, divided by the number of its ended rollouts: the estimate for exponential lengths of
    which some are still unknown (censored). One extra rollout of the mean length of all ended
    rollouts serves as the prior. A synthesis is short by itself. No group starves: a problem's key
    grows by one mean rollout for each problem that arrived before it.
    """

    fixed_keys = False

    def __init__(self, watermark: float = 0.01) -> None:
        super().__init__(watermark)
        self._tokens = self._ended = 1  # over all rollouts

    def key(self, group: Group) -> tuple:
        mean = self._tokens / self._ended
        generated = sum(rollout.scheduled for rollout in group.rollouts)
        left = (group.need - group.ended) * (generated + mean) / (group.ended + 1)
        return (left + mean * group.problem, group.problem, group.number)

    def ended(self, rollout: Rollout) -> None:
        self._tokens += rollout.scheduled
        self._ended += 1


class Oracle(Predicted):
    """Later round first with known lengths: the best that prediction could reach.

    Starts a group's longest rollouts first, and starts none that will be preempted.
    """

    def __init__(self, length: Callable[[Rollout], int], watermark: float = 0.01) -> None:
        super().__init__(watermark)
        self._length = length

    def expected_length(self, rollout: Rollout) -> int:
        return self._length(rollout)

    def order(self, rollouts: Iterable[Rollout]) -> list[Rollout]:
        return sorted(rollouts, key=self.expected_length, reverse=True)


class OracleShortest(Oracle):
    """Oracle that starts the group with the fewest tokens to generate first.

    This order, shortest job first, has nearly the least possible mean time to answer; no real
    policy can know it.
    """

    def key(self, group: Group) -> tuple:
        return (sum(map(self.expected_length, group.rollouts)), group.problem, group.number)


def peak(left: Iterable[tuple[int, int]]) -> int:
    """The most tokens held at once by rollouts of (tokens to come, tokens held).

    All grow at the same rate. The peak comes just before a rollout ends, when all that end later
    have grown by the same number of tokens.
    """
    highest = held = count = 0
    for to_come, held_now in sorted(left, reverse=True):
        held, count = held + held_now, count + 1
        highest = max(highest, held + count * to_come)
    return highest


# Constructed with a function that returns a rollout's length.
ORACLES: dict[str, type[Oracle]] = {"oracle": Oracle, "oracle-shortest": OracleShortest}
POLICIES: dict[str, type[LaterRoundFirst]] = {
    "later-round-first": LaterRoundFirst,
    "fcfs": Fcfs,
    "sglang": SglangLike,
    "reserve-max": ReserveMax,
    "barrier": Barrier,
    "one-at-a-time": OneAtATime,
    "predicted": Predicted,
    "shortest-expected": ShortestExpected,
    **ORACLES,
}
