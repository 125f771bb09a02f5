"""The problems that have not started, in order of arrival."""

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from pacore_sched.answers.journal_lines import RolloutResult
from pacore_sched.answers.problem_run import Problem, ProblemRun

PREPARED_AHEAD = 4  # problems whose images are read and prompts built before they are submitted


class Arrivals:
    """A queue of problems of any number, empty until `fill`. A thread prepares the next few, while
    rollouts decode."""

    def __init__(
        self,
        run_of: Callable[[Problem, int, Iterable[RolloutResult]], ProblemRun],
        problems: Iterable[Problem],
        known: Callable[[str], Iterable[RolloutResult]],
    ) -> None:
        """`run_of` takes a problem, its number and what `known` says of its id: rollouts that
        ended in an earlier run."""
        self._run_of, self._known = run_of, known
        self._problems = enumerate(problems)
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="arrivals")
        self._queue: deque[tuple[ProblemRun, Future | None]] = deque()

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
        """Read the next few problems. Raises what the iterable of problems raises."""
        while len(self._queue) < PREPARED_AHEAD:
            arrival = next(self._problems, None)
            if arrival is None:
                return
            number, problem = arrival
            run = self._run_of(problem, number, self._known(problem.id))
            preparing = None if run.finished else self._threads.submit(run.prepare)
            self._queue.append((run, preparing))

    def close(self) -> None:
        """Wait for the problem that is being prepared; forget the others."""
        self._threads.shutdown(cancel_futures=True)
