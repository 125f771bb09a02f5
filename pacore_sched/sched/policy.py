"""Policies: whose turn it is, whom the pages in hand are enough for, and who gives way when not.

A policy orders groups (`key`), may hold some back (`opens`), says whether a rollout may start with
the pages that are free (`admits`), and names the rollout that is preempted when running ones cannot
grow (`victim`). It sees ints: of lengths that are still to come it knows nothing, but for Oracle.
"""

from bisect import bisect_right, insort
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from typing import Protocol

from kernels.runtime.arithmetic import cdiv
from pacore_sched.sched.prefix_tree import PrefixTree
from pacore_sched.sched.request import Group, Rollout


class View(Protocol):
    """What a policy may look at of the scheduler."""

    tree: PrefixTree
    steps: int  # decode steps so far

    @property
    def running(self) -> Collection[Rollout]:
        """In the order in which they started."""

    @property
    def groups(self) -> Collection[Group]:
        """Not done yet."""


class LaterRoundFirst:
    """Finish what was begun: groups of later rounds first, then problems in order of arrival.

    Optimises the mean time to an answer: a synthesis stands between a problem's many finished
    rollouts and its answer, and keeps nobody waiting for long. Admission is optimistic: by what a
    rollout needs now, with a watermark of free pages for those that grow.
    """

    fixed = True  # whether a group keeps its key while it lives

    def __init__(self, watermark: float = 0.01) -> None:
        self.watermark = watermark  # of all pages, kept free when a rollout starts

    def key(self, group: Group) -> tuple:
        """Groups with smaller keys go first."""
        return (-group.round, group.problem, group.number)

    def order(self, rollouts: Iterable[Rollout]) -> list[Rollout]:
        """Rollouts of one new group in the order in which they start."""
        return list(rollouts)

    def begin(self, view: View) -> None:
        """Called before groups are looked through."""

    def opens(self, group: Group) -> bool:
        """Whether a group may start now, should there be room."""
        return True

    def admits(self, rollout: Rollout, pages: int, view: View) -> bool:
        """Whether a rollout may start that takes so many pages at once.

        Asked only while others run: a rollout that is alone may always start.
        """
        return pages + self.watermark * view.tree.num_pages <= view.tree.free_pages

    def victim(self, running: Collection[Rollout]) -> Rollout:
        """Whom to preempt: of the group that is last in order, the one with the fewest tokens."""
        keys = {group: self.key(group) for group in {rollout.group for rollout in running}}
        return max(running, key=lambda rollout: (keys[rollout.group], -rollout.asked))

    def ended(self, rollout: Rollout) -> None:
        """Called for every rollout that has ended by itself."""

    def forget(self, group: Group) -> None:
        """Called for every group that is done or cancelled."""


class Fcfs(LaterRoundFirst):
    """First come, first served, admission by the pages in hand, as vLLM has it.

    A synthesis joins the back of the queue like any request; who started last is preempted first.
    """

    def key(self, group: Group) -> tuple:
        return (group.number,)

    def victim(self, running: Collection[Rollout]) -> Rollout:
        return [*running][-1]


class SglangLike(Fcfs):
    """First come, first served, with admission and retraction as SGLang has them.

    Every running rollout is taken to need a ratio of its remaining max_tokens, these clipped at
    4,096. The ratio falls from 0.7 to 0.098 over 600 decode steps, and is set anew, from the share
    of max_tokens that was generated, when memory runs out; the least progress is retracted.
    """

    CLIP, FIRST, LAST, STEPS = 4096, 0.7, 0.098, 600

    def __init__(self, watermark: float = 0.0) -> None:
        super().__init__(watermark)
        self._ratio, self._since = self.FIRST, 0

    def begin(self, view: View) -> None:
        fall = (self.FIRST - self.LAST) / self.STEPS
        self._ratio = max(self.LAST, self._ratio - fall * (view.steps - self._since))
        self._since = view.steps

    def admits(self, rollout: Rollout, pages: int, view: View) -> bool:
        size = view.tree.page_size
        come = sum(min(r.max_tokens - r.asked, self.CLIP) for r in view.running) * self._ratio
        own = min(rollout.max_tokens - rollout.asked, self.CLIP)
        return pages * size + come + own <= view.tree.free_pages * size

    def victim(self, running: Collection[Rollout]) -> Rollout:
        done = sum(rollout.asked for rollout in running) + 20 * len(running)
        self._ratio = min(1.0, done / sum(rollout.max_tokens for rollout in running))
        return min(running, key=lambda rollout: rollout.asked)


class ReserveMax(Fcfs):
    """First come, first served; a rollout starts only if all could reach their max_tokens.

    Never preempts, and leaves most of the memory idle: what TensorRT-LLM does by default.
    """

    def admits(self, rollout: Rollout, pages: int, view: View) -> bool:
        tree = view.tree
        running = [(r.node, r.max_tokens - tree.length(r.node)) for r in view.running]
        come = sum(tree.pages_needed(node, tokens) for node, tokens in running)
        size = tree.page_size  # `pages` holds what is known of the rollout
        own = cdiv(rollout.max_tokens, size) - (1 + rollout.asked) // size
        return come + pages + own <= tree.free_pages


class Barrier(Fcfs):
    """Batches of problems, every round of which waits for all of the round before.

    What a client does that sends one batch after another, a round at a time. Of size 1 it is one
    problem at a time.
    """

    def __init__(self, size: int = 8, watermark: float = 0.01) -> None:
        super().__init__(watermark)
        self.size = size

    def begin(self, view: View) -> None:
        stages = ((group.problem // self.size, group.round) for group in view.groups)
        self._stage = min(stages, default=None)

    def opens(self, group: Group) -> bool:
        return (group.problem // self.size, group.round) == self._stage


class OneAtATime(Barrier):
    """One problem at a time, as an engine that knows nothing but a batch: the base line."""

    def __init__(self, watermark: float = 0.01) -> None:
        super().__init__(1, watermark)


class Predicted(LaterRoundFirst):
    """Later round first; starts a rollout only if the pages are predicted to last.

    A rollout is expected to become as long as most (a quantile) of its group's that have ended, or
    of all of its round's, were longer than it is now. The pages needed are the most that the
    running ones will hold together, which are fewer than the sum: each gives back its own in
    ending. Trades a little occupancy for fewer preemptions.
    """

    QUANTILE, FEWEST = 0.6, 3  # fewer ended rollouts than FEWEST say nothing

    def __init__(self, watermark: float = 0.01) -> None:
        super().__init__(watermark)
        self._of_group: dict[Group, list[int]] = defaultdict(list)
        self._of_round: dict[int, list[int]] = defaultdict(list)

    def ended(self, rollout: Rollout) -> None:
        for lengths in (self._of_group[rollout.group], self._of_round[rollout.group.round]):
            insort(lengths, rollout.asked)

    def forget(self, group: Group) -> None:
        self._of_group.pop(group, None)

    def expected(self, rollout: Rollout) -> int:
        """Tokens that a rollout is expected to have at its end."""
        for lengths in (self._of_group.get(rollout.group, ()), self._of_round[rollout.group.round]):
            shorter = bisect_right(lengths, rollout.asked)
            longer = len(lengths) - shorter
            if longer >= self.FEWEST:
                expected = lengths[shorter + int(self.QUANTILE * longer)]
                return min(expected, rollout.max_tokens)
        return rollout.asked  # nothing is known: as optimistic as the others

    def admits(self, rollout: Rollout, pages: int, view: View) -> bool:
        if not super().admits(rollout, pages, view):
            return False
        tree = view.tree
        left = [(self.expected(r) - r.asked, tree.length(r.node)) for r in view.running]
        left.append((self.expected(rollout) - rollout.asked, pages * tree.page_size))
        own = sum(len(tree.pages(r.node)) for r in view.running)
        others = tree.num_pages - tree.free_pages - own
        room = (1 - self.watermark) * tree.num_pages - others
        return peak(left) <= room * tree.page_size


class ShortestExpected(LaterRoundFirst):
    """The group expected to have the fewest tokens left goes first, and is preempted last.

    Optimises the mean time to an answer where problems differ in length. A rollout that has not
    ended is expected to go on for as many tokens as its group has generated, running rollouts
    included, per rollout that has ended: what is known of exponential lengths some of which are not
    over yet. One more rollout, of the mean length of all that ended, stands for what is known
    before. A synthesis is short by itself. Nobody waits for ever: a problem counts one rollout of
    mean length more for each that came before it.
    """

    fixed = False

    def __init__(self, watermark: float = 0.01) -> None:
        super().__init__(watermark)
        self._tokens = self._ended = 1  # of all rollouts

    def key(self, group: Group) -> tuple:
        mean = self._tokens / self._ended
        generated = sum(rollout.asked for rollout in group.rollouts)
        left = (group.need - group.ended) * (generated + mean) / (group.ended + 1)
        return (left + mean * group.problem, group.problem, group.number)

    def ended(self, rollout: Rollout) -> None:
        self._tokens += rollout.asked
        self._ended += 1


class Oracle(Predicted):
    """Later round first with lengths known beforehand: what prediction could reach at best.

    Starts a group's longest rollouts first, and none that will be preempted.
    """

    def __init__(self, length: Callable[[Rollout], int], watermark: float = 0.01) -> None:
        super().__init__(watermark)
        self._length = length

    def expected(self, rollout: Rollout) -> int:
        return self._length(rollout)

    def order(self, rollouts: Iterable[Rollout]) -> list[Rollout]:
        return sorted(rollouts, key=self.expected, reverse=True)


class OracleShortest(Oracle):
    """Oracle whose groups go by the tokens that they will generate, the fewest first.

    Shortest job first has the least mean time to an answer that any order has, nearly; no policy
    can know it.
    """

    def key(self, group: Group) -> tuple:
        return (sum(map(self.expected, group.rollouts)), group.problem, group.number)


def peak(left: Iterable[tuple[int, int]]) -> int:
    """The most tokens ever held by rollouts of (tokens to come, tokens held), all growing alike.

    It is reached just before one of them ends: then all that end later have grown as much.
    """
    most = held = count = 0
    for come, now in sorted(left, reverse=True):
        held, count = held + now, count + 1
        most = max(most, held + count * come)
    return most


# Made with a function that tells a rollout's length.
KNOW_LENGTHS: dict[str, type[Oracle]] = {"oracle": Oracle, "oracle-shortest": OracleShortest}
POLICIES: dict[str, type[LaterRoundFirst]] = {
    "later-round-first": LaterRoundFirst,
    "fcfs": Fcfs,
    "sglang": SglangLike,
    "reserve-max": ReserveMax,
    "barrier": Barrier,
    "one-at-a-time": OneAtATime,
    "predicted": Predicted,
    "shortest-expected": ShortestExpected,
    **KNOW_LENGTHS,
}
