"""The problems that have not started, in order of arrival."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from pacore_sched.answers.live import PIXEL_BYTES, LiveProblems
from pacore_sched.answers.problem_run import ProblemRun

PREPARED_AHEAD = 8  # problems whose images are read and prompts built before they are submitted


class Arrivals:
    """A queue of problems of any number, empty until `fill`. Threads prepare the next few, while
    rollouts decode; no further ones while the pixels of those exceed PIXEL_BYTES."""

    def __init__(self, runs: Iterator[ProblemRun]) -> None:
        """`runs` is read a few problems at a time; it may have more after it has ended."""
        self._runs = runs
        self._threads = ThreadPoolExecutor(PREPARED_AHEAD, thread_name_prefix="arrivals")
        self._queue: deque[tuple[ProblemRun, Future | None]] = deque()
        self._most = 0  # bytes of a problem's pixels so far

    @property
    def empty(self) -> bool:
        return not self._queue

    @property
    def next(self) -> ProblemRun:
        """The problem that `take` will return."""
        return self._queue[0][0]

    def ready(self) -> bool:
        """Whether `take` returns a problem that is prepared, or quick to prepare.

        Quick ones always start in the same step, so that a run of them repeats exactly.
        """
        run, preparing = self._queue[0]
        return preparing is None or preparing.done() or run.quick

    def take(self) -> ProblemRun:
        """Remove the next problem from the queue; it may still be prepared."""
        run, preparing = self._queue.popleft()
        if preparing is not None:
            run.set_preparing(preparing)
        self.fill()
        return run

    def fill(self) -> None:
        """Read the next few problems. Raises what their iterator raises."""
        while len(self._queue) < PREPARED_AHEAD and self._pixel_bytes() < PIXEL_BYTES:
            run = next(self._runs, None)
            if run is None:
                return
            preparing = None if run.finished else self._threads.submit(run.prepare)
            self._queue.append((run, preparing))

    def starting(self, live: LiveProblems) -> Iterator[ProblemRun]:
        """Yield the problems that start now, while there is room and the next one is ready."""
        while not self.empty:
            if live and not (self.ready() and live.has_room(self.next)):
                return
            yield self.take()

    def close(self) -> None:
        """Wait for the problems that are being prepared; forget the others."""
        self._threads.shutdown(cancel_futures=True)

    def _pixel_bytes(self) -> int:
        """Pixels of the queued problems. Those that are being prepared may have as many as any
        before."""
        self._most = max(self._most, *(run.pixel_bytes for run, _ in self._queue), 0)
        return sum(
            run.pixel_bytes if preparing is None or preparing.done() else self._most
            for run, preparing in self._queue
        )
