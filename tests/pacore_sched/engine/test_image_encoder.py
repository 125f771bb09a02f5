"""The encoder of images with a fake tower: batches, sharing, order, errors, cancelling, closing."""

import gc
import threading
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager
from math import inf
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from model.config import TINY
from pacore_sched.engine.image_encoder import Features, ImageEncoder
from pacore_sched.sched.vision_pace import VisionPace

CROP, GLOBAL = (112 // 14) ** 2, (168 // 14) ** 2  # patches
BATCH = 2 * GLOBAL
ROWS = 2  # of a view


def photo(name: int, crops: int = 0, digest: bytes = b"") -> SimpleNamespace:
    """An image whose views have the values name + 0.1, name + 0.2, ..."""
    views = [torch.tensor(name + 0.1 * (index + 1)) for index in range(crops + 1)]
    return SimpleNamespace(all=views, digest=digest)


def names(features: Features) -> list[float]:
    """The views that embeddings are of, in order."""
    rows = features.result().view(-1, ROWS)
    assert torch.equal(rows[:, 0], rows[:, 1])
    return [round(float(row), 1) for row in rows[:, 0]]


class Tower:
    """Embeddings that repeat a view's value. Calls wait for `go`; `calls` has their views.

    bad: names of images that cannot be encoded
    """

    def __init__(self, bad: Sequence[int] = ()) -> None:
        self.bad = bad
        self.begun, self.go = threading.Semaphore(0), threading.Semaphore(0)
        self.calls: list[list[float]] = []
        self.between: list[object] = []

    def __call__(self, views: Sequence[Tensor], between: object) -> Tensor:
        self.begun.release()
        assert self.go.acquire(timeout=60)
        values = torch.stack(list(views))
        self.calls.append([round(float(value), 1) for value in values])
        self.between.append(between)
        if any(int(value) in self.bad for value in values):
            raise RuntimeError(f"cannot encode {self.calls[-1]}")
        return values.repeat_interleave(ROWS)[:, None]

    def count(self, views: Sequence[Tensor]) -> int:
        return ROWS * len(views)

    def wait(self) -> None:
        """Wait until a call has begun."""
        assert self.begun.acquire(timeout=60)

    def let(self, calls: int) -> None:
        """Let some calls begin and go on."""
        for _ in range(calls):
            self.wait()
            self.go.release()


@contextmanager
def encoder_of(
    tower: Tower, max_patches: int | None = BATCH, max_rows: int = 0, slowdown: float = inf
) -> Iterator[ImageEncoder]:
    model = SimpleNamespace(
        device=torch.device("cpu"),
        config=TINY,
        vision=tower,
        count_features=lambda images: sum(ROWS * len(image.all) for image in images),
    )
    pace = VisionPace(slowdown)
    encoder = ImageEncoder(model, pace, max_rows=max_rows, max_patches=max_patches)
    try:
        yield encoder
    finally:
        tower.go.release(1000)
        encoder.close()


def test_views_of_several_requests_are_one_batch() -> None:
    """A tower that encodes one small image after the other, or mixes up their embeddings."""
    tower = Tower()
    with encoder_of(tower) as encoder:
        first = encoder.encode([photo(1)])
        tower.wait()
        others = [encoder.encode([photo(2), photo(3, crops=1)]), encoder.encode([photo(4)])]
        assert encoder._queue.tokens == 3 * GLOBAL + CROP
        assert not any(features.ready() for features in (first, *others))
        tower.go.release()
        assert names(first) == [1.1]
        tower.let(2)
        assert names(others[0]) == [2.1, 3.1, 3.2] and names(others[1]) == [4.1]
        alone = others[1].result()
        assert alone.untyped_storage().nbytes() == alone.nbytes, "it keeps the whole batch"
        assert first.ready() and all(features.ready() for features in others)
        assert not others[0].waiting and encoder._queue.tokens == 0
    assert tower.calls == [[1.1], [2.1, 4.1], [3.1, 3.2]]


def test_a_large_image_does_not_block_a_small_one() -> None:
    """A small photo that waits for all views of a large one, or a large one whose parts are joined
    in another order."""
    tower = Tower()
    with encoder_of(tower) as encoder:
        large = encoder.encode([photo(1, crops=8)])
        tower.wait()
        small = encoder.encode([photo(2)])
        tower.go.release()
        tower.let(1)
        assert names(small) == [2.1]
        assert not large.ready() and large.waiting
        tower.let(1)
        assert names(large) == [1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8, 1.9]
    assert [len(call) for call in tower.calls] == [4, 3, 3]


def test_images_alone() -> None:
    """An image whose bits depend on others, or on how its views are cut into batches: the default
    on a CPU."""
    tower = Tower()
    with encoder_of(tower, None) as encoder:
        all_features = [encoder.encode([photo(n, crops=n), photo(n + 4)]) for n in (1, 2)]
        tower.let(4)
        assert [names(features) for features in all_features] == [
            [1.1, 1.2, 5.1],
            [2.1, 2.2, 2.3, 6.1],
        ]
    assert tower.calls == [[1.1, 1.2], [5.1], [2.1, 2.2, 2.3], [6.1]]


@pytest.mark.parametrize("max_rows", [0, 100])
@pytest.mark.parametrize("in_flight", [False, True])
def test_an_image_is_encoded_once_for_all_who_wait(in_flight: bool, max_rows: int) -> None:
    """A photo that is encoded again for a second request, or twice for one that repeats it; with a
    salt of its own it is another one."""
    tower = Tower()
    with encoder_of(tower, max_rows=max_rows) as encoder:
        first = encoder.encode([photo(1, digest=b"1"), photo(1, digest=b"1")])
        if in_flight:
            tower.wait()
        second = encoder.encode([photo(2, digest=b"9"), photo(1, digest=b"1")])
        third = encoder.encode([photo(1, digest=b"1")], "salt")
        first.release()  # others still wait
        tower.go.release(10)
        assert names(second) == [2.1, 1.1] and names(third) == [1.1]
        assert first.count == second.count == 2 * ROWS
        assert second.contents[ROWS:] == first.contents[:ROWS] == first.contents[ROWS:]
        assert len({*second.contents}) == 2 * ROWS and max(second.contents) < 0
        second.release()
        third.release()
        again = encoder.encode([photo(1, digest=b"1")])
        assert names(again) == [1.1]
    views = [view for call in tower.calls for view in call]
    assert sorted(views) == [1.1, 1.1, *([] if max_rows else [1.1]), 2.1]


def test_kept_embeddings_have_a_budget() -> None:
    """Embeddings of all images that ever were, or the oldest instead of the latest."""
    tower = Tower()
    with encoder_of(tower, max_rows=2 * ROWS) as encoder:
        tower.go.release(100)
        refs = []
        for name in (1, 2, 1, 3):
            features = encoder.encode([photo(name, digest=b"%d" % name)])
            assert names(features) == [name + 0.1]
            refs.append(weakref.ref(features.images[0]))
            features.release()
        del features
        assert [ref() is not None for ref in refs] == [True, False, True, True]
        unknown = encoder.encode([photo(1), photo(1, digest=b"1")])
        assert unknown.contents == () and names(unknown) == [1.1, 1.1]
    assert tower.calls == [[1.1], [2.1], [3.1], [1.1]]


def test_rows_of_some_images() -> None:
    """A chunk of a prompt that begins or ends within an image."""
    tower = Tower()
    with encoder_of(tower) as encoder:
        tower.go.release(100)
        features = encoder.encode([photo(1), photo(2, crops=2), photo(3)])
        rows = features.result()
        assert len(rows) == features.count == 5 * ROWS
        for start in range(len(rows)):
            for stop in range(start + 1, len(rows) + 1):
                assert torch.equal(features.result(start, stop), rows[start:stop])


def test_released_images_are_not_encoded() -> None:
    """Images of problems that failed, which keep others waiting for the tower."""
    tower = Tower()
    with encoder_of(tower) as encoder:
        first = encoder.encode([photo(1, crops=8)])
        tower.wait()
        second, third = encoder.encode([photo(2, crops=3)]), encoder.encode([photo(3)])
        pixels = weakref.ref(second.images[0].views[0])
        first.release()  # its first views are being encoded
        second.release()
        assert pixels() is None and encoder._queue.tokens == GLOBAL
        tower.go.release()
        tower.let(1)
        assert names(third) == [3.1]
        assert (first.error, second.error) == (None, None)
        assert not first.ready() and not second.waiting
    assert tower.calls == [[1.1, 1.2, 1.3, 1.4], [3.1]]


@pytest.mark.parametrize("digest", [b"", b"1"])
def test_a_released_image_that_is_being_encoded_comes_again(digest: bytes) -> None:
    """A cancelled encoding that a later request waits for."""
    tower = Tower()
    with encoder_of(tower) as encoder:
        released = encoder.encode([photo(1, crops=8, digest=digest)])
        tower.wait()
        released.release()
        again = encoder.encode([photo(1, crops=8, digest=digest)])
        tower.go.release(10)
        assert len(names(again)) == 9


def test_one_bad_image_fails_alone() -> None:
    """A batch whose failure is that of every request in it, or of none."""
    tower = Tower(bad=[2])
    with encoder_of(tower) as encoder:
        first = encoder.encode([photo(1)])
        tower.wait()
        bad = encoder.encode([photo(2, digest=b"2")]), encoder.encode([photo(2, digest=b"2")])
        good = encoder.encode([photo(3)])
        tower.go.release()
        tower.let(3)
        assert names(first) == [1.1] and names(good) == [3.1]
        for features in bad:
            with pytest.raises(RuntimeError, match="cannot encode"):
                features.result()
            assert "[2.1]" in str(features.error) and not features.ready() and not features.waiting
        tower.bad = ()
        again = encoder.encode([photo(2, digest=b"2")])
        tower.let(1)
        assert names(again) == [2.1]
    assert tower.calls == [[1.1], [2.1, 3.1], [2.1], [3.1], [2.1]]


def test_a_large_image_that_fails_is_not_encoded_further() -> None:
    """The rest of an image after an error, and its pixels in the error's traceback."""
    tower = Tower(bad=[1])
    with encoder_of(tower) as encoder:
        images = [photo(1, crops=8), photo(2)]
        pixels = [weakref.ref(view) for view in images[0].all]
        features = [encoder.encode([image]) for image in images]
        del images
        tower.go.release(10)
        assert names(features[1]) == [2.1]
        assert features[0].images[0].future.exception(timeout=60)
        assert not encoder._queue
        gc.disable()
        try:
            assert features[0].error
            encoder.close()
            assert [ref() for ref in pixels] == [None] * 9
        finally:
            gc.enable()
    assert not any(1.9 in call for call in tower.calls)


def test_closing_drops_what_waits() -> None:
    """A process that encodes all waiting images before it ends."""
    tower = Tower()
    with encoder_of(tower) as encoder:
        first = encoder.encode([photo(1, crops=8)])
        tower.wait()
        second = encoder.encode([photo(2)])
        closing = threading.Thread(target=encoder.close)
        closing.start()
        with pytest.raises(CancelledError):
            second.images[0].future.result(timeout=60)
        tower.go.release()
        closing.join(60)
        for features in (first, second):
            assert not features.ready() and not features.waiting and features.error is None
    assert tower.calls == [[1.1, 1.2, 1.3, 1.4]]


def test_the_tower_pauses_while_rollouts_decode() -> None:
    """A tower that never pauses, or pauses with a CUDA graph although nothing decodes."""
    tower = Tower()
    with encoder_of(tower, slowdown=2.0) as encoder:
        tower.go.release(10)
        assert names(encoder.encode([photo(1)])) == [1.1]
        with encoder._pace.launch(True):
            assert names(encoder.encode([photo(2)])) == [2.1]
    assert tower.between[0] is None and callable(tower.between[1])
