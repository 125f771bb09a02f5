"""Expected lengths of unfinished rollouts, learnt from the lengths of ended ones."""

from bisect import bisect_right, insort
from collections import defaultdict
from collections.abc import Hashable

QUANTILE, MIN_ENDED = 0.6, 3  # with fewer ended rollouts there is no prediction
MAX_ENDED = 8_192  # lengths that are kept per round; to insert one moves half of them


class EndedLengths:
    """The lengths of ended rollouts, per group and per round.

    A rollout's expected length is a quantile of the lengths of ended rollouts that were longer than
    it is now: those of its group, or those of all groups of its round if the group has too few.
    Groups are identified by any hashable value.
    """

    def __init__(self) -> None:
        self._of_group: dict[Hashable, list[int]] = defaultdict(list)
        self._of_round: dict[int, list[int]] = defaultdict(list)

    def add(self, group: Hashable, round: int, tokens: int) -> None:
        """Record the length of a rollout that has ended."""
        for lengths in (self._of_group[group], self._of_round[round]):
            insort(lengths, tokens)
            if len(lengths) > MAX_ENDED:
                del lengths[::2]  # every second one in order of length: the quantiles stay

    def forget(self, group: Hashable) -> None:
        """Drop a group's own lengths: it is done. Its round keeps them."""
        self._of_group.pop(group, None)

    def expected(self, group: Hashable, round: int, tokens: int) -> int | None:
        """The length that a rollout of `tokens` tokens is expected to have at its end; None if too
        few longer ones have ended."""
        for lengths in (self._of_group.get(group, ()), self._of_round.get(round, ())):
            shorter = bisect_right(lengths, tokens)
            longer = len(lengths) - shorter
            if longer >= MIN_ENDED:
                return lengths[shorter + int(QUANTILE * longer)]
        return None
