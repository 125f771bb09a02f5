"""Which views of the waiting images are encoded next, and how much that may slow decoding.

The job that came first gets half of every batch, so that none starves. The rest goes to the jobs
with the least left to encode, so that a small image waits for little more than the batch in
progress. Jobs of equal size are encoded in the order in which they came, not all at once: sharing
would delay each to the end of the last.
"""

from collections.abc import Hashable, Iterable, Sequence
from math import inf
from typing import Generic, TypeVar

# How much longer a decode step may take while images are encoded.
VISION_BUDGETS = {"latency": 1.25, "balanced": 2.0, "throughput": inf}
DEFAULT_VISION_BUDGET = "balanced"
MAX_PATCHES = 16_384  # of a batch; enough to fill a GPU

Job = TypeVar("Job", bound=Hashable)


class _Waiting(Generic[Job]):
    """The views of one job that no batch has taken."""

    def __init__(self, job: Job, views: tuple[int, ...]) -> None:
        self.job, self.views = job, views
        self.start, self.left = 0, sum(views)

    def take(self, room: int, *, at_least_one: bool = False) -> int:
        """Take the views that fit into `room` patches; returns their patches."""
        taken, stop = 0, self.start
        while stop < len(self.views):
            if taken + self.views[stop] > room and not (at_least_one and stop == self.start):
                break
            taken += self.views[stop]
            stop += 1
        self.start, self.left = stop, self.left - taken
        return taken


class ViewQueue(Generic[Job]):
    """Jobs whose views wait to be encoded, in batches of at most `max_tokens` patches.

    A view of more patches is a batch of its own.
    """

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self._waiting: dict[Job, _Waiting[Job]] = {}  # the oldest first

    def __len__(self) -> int:
        """The number of jobs with views that no batch has taken."""
        return len(self._waiting)

    @property
    def tokens(self) -> int:
        """The patches of all waiting views."""
        return sum(waiting.left for waiting in self._waiting.values())

    def add(self, job: Job, views: Sequence[int]) -> None:
        """Let a job wait, given the patches of each of its views.

        Raises ValueError for a job that is waiting, or without views or a view without patches.
        """
        if job in self._waiting:
            raise ValueError(f"job {job!r} is already in the queue")
        if not views or min(views) < 1:
            raise ValueError(f"a job needs views of at least 1 patch each, not {list(views)}")
        self._waiting[job] = _Waiting(job, tuple(views))

    def remove(self, job: Job) -> None:
        """Drop the views of a job that no batch has taken, if there are any."""
        self._waiting.pop(job, None)

    def next(self) -> list[tuple[Job, int, int]]:
        """Take a batch off the queue: of each job in it, the views start to stop, without stop.

        It is empty if the queue is. Nothing that would come next still fits into it.
        """
        if not self._waiting:
            return []
        oldest = next(iter(self._waiting.values()))
        starts = {oldest.job: oldest.start}
        room = self.max_tokens - oldest.take(self.max_tokens // 2, at_least_one=True)
        for waiting in self._least_left_first():
            start = waiting.start
            room -= (taken := waiting.take(room))
            if taken:
                starts.setdefault(waiting.job, start)
        batch = [(job, start, self._waiting[job].start) for job, start in starts.items()]
        for job in starts:
            if not self._waiting[job].left:
                del self._waiting[job]
        return batch

    def _least_left_first(self) -> Iterable[_Waiting[Job]]:
        return sorted(self._waiting.values(), key=lambda waiting: waiting.left)  # stable: by age
