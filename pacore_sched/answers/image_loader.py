"""Threads that decode images and cut them into views.

PIL releases the GIL while it decodes, resizes and cuts, and so does hashing: images are loaded on
several cores, next to the thread that runs the engine.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from functools import partial
from typing import Never, TypeVar

from model.terminal import usable_cpus

T = TypeVar("T")
MAX_THREADS = 8  # more load photos faster than one GPU encodes them


class ImageLoader:
    """A pool of `threads` threads; by default one per core, at most MAX_THREADS."""

    def __init__(self, threads: int | None = None) -> None:
        self.threads = threads or min(usable_cpus(), MAX_THREADS)
        self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="images")

    def load(
        self, calls: Iterable[Callable[[], T]], stopped: Callable[[], bool] = lambda: False
    ) -> list[T]:
        """The results of `calls`, in their order; several run at a time.

        At most `threads` calls are taken from the iterable ahead of their results: those of other
        threads' `load` run in between. Raises what running them one after the other would raise
        first, be it a call or the iterable, and CancelledError once `stopped` or after `close`;
        calls that have not begun then never do.
        """
        results: list[T] = []
        futures: deque[Future[T]] = deque()

        def run(call: Callable[[], T]) -> T:
            if stopped():
                raise CancelledError
            return call()

        try:
            for call in _with_failure(calls):
                if len(futures) == self.threads:
                    results.append(futures.popleft().result())
                futures.append(self._submit(run, call))
                if stopped():
                    raise CancelledError
            while futures:
                results.append(futures.popleft().result())
            return results
        except BaseException:
            results.clear()  # a traceback may keep this frame
            raise
        finally:
            while futures:
                futures.popleft().cancel()

    def _submit(self, run: Callable[[Callable[[], T]], T], call: Callable[[], T]) -> "Future[T]":
        try:
            return self._pool.submit(run, call)
        except RuntimeError:  # after `close`
            raise CancelledError from None

    def close(self) -> None:
        """End the threads after the calls that run now."""
        self._pool.shutdown(cancel_futures=True)


def _with_failure(calls: Iterable[Callable[[], T]]) -> Iterator[Callable[[], T]]:
    """The calls; an exception of their iterator becomes a last call, which raises it."""
    try:
        yield from calls
    except Exception as error:
        yield partial(_fail, error)


def _fail(error: Exception) -> Never:
    raise error
