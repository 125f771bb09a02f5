"""Images in threads: as if loaded one after the other, but for the time."""

import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import closing
from functools import partial
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.errors import InputError
from pacore_sched.answers import arrivals
from pacore_sched.answers.arrivals import PREPARED_AHEAD, Arrivals
from pacore_sched.answers.image_loader import ImageLoader

WAIT_S = 10


@pytest.fixture
def loader() -> Iterator[ImageLoader]:
    with closing(ImageLoader(2)) as made:
        yield made


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from(["image", "broken", "unreadable"]), max_size=9), st.randoms())
def test_same_as_one_after_the_other(kinds: list[str], draw: random.Random):
    """Results in the order of their ends; the error of the image that failed first in time, rather
    than of the first image."""
    delays = [draw.choice([0, 0.001, 0.003]) for _ in kinds]

    def image(index: int) -> int:
        time.sleep(delays[index])
        if kinds[index] == "broken":
            raise InputError(f"{index} is broken")
        return index

    def calls() -> Iterator[Callable[[], int]]:
        for index, kind in enumerate(kinds):
            if kind == "unreadable":
                raise InputError(f"{index} is unreadable")
            yield partial(image, index)

    wrong = [f"{index} is {kind}" for index, kind in enumerate(kinds) if kind != "image"]
    with closing(ImageLoader(3)) as loader:
        try:
            assert loader.load(calls()) == [*range(len(kinds))] and not wrong
        except InputError as error:
            assert wrong and str(error) == wrong[0]


def test_calls_run_side_by_side_and_never_more_than_threads(loader: ImageLoader):
    both = threading.Barrier(2)
    running, most, lock = [0], [0], threading.Lock()

    def call() -> None:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        both.wait(WAIT_S)  # breaks if they run one after the other
        with lock:
            running[0] -= 1

    with ThreadPoolExecutor(4) as threads:  # four problems of two images
        for future in [threads.submit(loader.load, [call] * 2) for _ in range(4)]:
            future.result(WAIT_S)
    assert most[0] == 2


def test_many_images_are_neither_read_far_ahead_nor_starve_others(loader: ImageLoader):
    """A request of 64 images that are all read, or all queued, before another's single image."""
    gate, order = threading.Event(), []
    read = threading.Semaphore(0)

    def calls() -> Iterator[Callable[[], None]]:
        for index in range(20):
            read.release()
            yield partial(note, index)

    def note(what: object) -> None:
        gate.wait(WAIT_S)
        order.append(what)

    with ThreadPoolExecutor(2) as threads:
        many = threads.submit(loader.load, calls())
        for _ in range(3):  # two that run, and one that waits for them
            assert read.acquire(timeout=WAIT_S)
        one = threads.submit(loader.load, [partial(note, "one")])
        assert not read.acquire(timeout=0.05)
        wait_for(lambda: not loader._pool._work_queue.empty())
        gate.set()
        many.result(WAIT_S)
        one.result(WAIT_S)
    assert order.index("one") <= 4


def test_a_stop_ends_what_has_not_begun(loader: ImageLoader):
    """Images of a client that has left, decoded after all."""
    begun, stop, gate = [], threading.Event(), threading.Event()

    def image(index: int) -> None:
        begun.append(index)
        gate.wait(WAIT_S)

    with ThreadPoolExecutor(2) as threads:
        busy = threads.submit(loader.load, [partial(image, -1), partial(image, -2)])
        wait_for(lambda: len(begun) == 2)
        left = threads.submit(loader.load, (partial(image, i) for i in range(5)), stop.is_set)
        wait_for(lambda: loader._pool._work_queue.qsize() == 2)  # all that it may queue
        stop.set()
        gate.set()
        busy.result(WAIT_S)
        with pytest.raises(CancelledError):
            left.result(WAIT_S)
    assert sorted(begun) == [-2, -1]


def test_no_further_image_is_read_after_a_stop(loader: ImageLoader):
    """A fetch for a client that has left, which may take seconds."""
    read = []

    def calls() -> Iterator[Callable[[], None]]:
        for index in range(5):
            read.append(index)
            yield lambda: None

    with pytest.raises(CancelledError):
        loader.load(calls(), lambda: len(read) == 2)
    assert read == [0, 1]


def test_a_failure_ends_what_has_not_begun(loader: ImageLoader):
    """All images of a problem decoded, although the first is broken."""
    begun: list[int] = []
    gate, failing, broken, queued = (threading.Event() for _ in range(4))

    def image(index: int) -> None:
        begun.append(index)
        gate.wait(WAIT_S)

    def fail() -> None:
        failing.set()
        broken.wait(WAIT_S)
        raise InputError("broken")

    def calls() -> Iterator[Callable[[], None]]:
        yield fail
        queued.wait(WAIT_S)  # another problem's image, which runs next
        yield partial(image, 0)

    with ThreadPoolExecutor(3) as threads:
        others = [threads.submit(loader.load, [partial(image, -1)])]
        wait_for(lambda: begun == [-1])
        problem = threads.submit(loader.load, calls())
        wait_for(failing.is_set)
        others.append(threads.submit(loader.load, [partial(image, -2)]))
        wait_for(lambda: loader._pool._work_queue.qsize() == 1)
        queued.set()
        wait_for(lambda: loader._pool._work_queue.qsize() == 2)
        broken.set()
        with pytest.raises(InputError, match="broken"):
            problem.result(WAIT_S)
        gate.set()
        for other in others:
            other.result(WAIT_S)
    loader.close()
    assert begun == [-1, -2]


def test_closing_leaves_no_thread():
    """Threads of a server or a run that has ended, and calls that wait for ever."""
    before, gate = threading.active_count(), threading.Event()
    loader, entered = ImageLoader(1), threading.Event()

    def image() -> None:
        entered.set()
        gate.wait(WAIT_S)

    with ThreadPoolExecutor(2) as threads:
        running = threads.submit(loader.load, [image])
        entered.wait(WAIT_S)
        waiting = threads.submit(loader.load, [image])
        wait_for(lambda: not loader._pool._work_queue.empty())
        closing_ = threading.Thread(target=loader.close)
        closing_.start()
        with pytest.raises(CancelledError):
            waiting.result(WAIT_S)
        gate.set()
        running.result(WAIT_S)
        closing_.join(WAIT_S)
    assert threading.active_count() == before


def test_problems_are_prepared_ahead_within_the_budget(monkeypatch: pytest.MonkeyPatch):
    """Pixels of a whole file of questions in memory; or nothing ahead, so that the engine waits."""
    monkeypatch.setattr(arrivals, "PIXEL_BYTES", 100)
    prepared: list[SimpleNamespace] = []

    def run(pixels: int) -> SimpleNamespace:
        made = SimpleNamespace(finished=False, pixel_bytes=0, set_preparing=lambda future: None)

        def prepare() -> None:
            made.pixel_bytes = pixels
            prepared.append(made)

        made.prepare = prepare
        return made

    def settle(queue: Arrivals, taken: int) -> int:
        """Take problems once all that are queued have been prepared; returns how many these were
        at the end."""
        for _ in range(taken):
            for _, preparing in queue._queue:
                preparing.result(WAIT_S)
            queue.take()
        for _, preparing in queue._queue:
            preparing.result(WAIT_S)
        return len(queue._queue)

    for pixels, ahead in ((0, PREPARED_AHEAD), (30, 4), (100, 1), (1000, 1)):
        queue = Arrivals(run(pixels) for _ in range(40))
        with closing(queue):
            queue.fill()
            assert settle(queue, PREPARED_AHEAD + 4) == ahead
