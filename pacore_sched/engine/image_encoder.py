"""Encodes images while steps run: in a thread, and on a GPU in a separate stream.

The views of all waiting images are encoded in batches (sched/view_queue.py), which pause while
rollouts decode (sched/vision_pace.py). An image that several prompts have is encoded once for all
of them, and with `max_rows`, its embeddings are kept for later ones. They may differ by rounding
from those that the image has when it is encoded alone, as in any matrix product of another size.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from threading import Lock
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels.runtime.spans import spanned
from model.step3vl import Step3VL
from pacore_sched.sched.view_queue import MAX_PATCHES, ViewQueue

if TYPE_CHECKING:
    from model.vision.image import Views
    from model.vision.pixels import View
    from pacore_sched.sched.vision_pace import VisionPace


class ImageFeatures:
    """Embeddings of one image, perhaps still being computed, for all who use it.

    key: salt and digest by which others find it; None if the digest is not known
    count: their number of rows
    contents: an int for each row that identifies it and is no token's id; empty without a key
    """

    def __init__(self, views: Sequence["View"], count: int, salt: str, digest: bytes) -> None:
        self.count, self.users = count, 0
        self.key = (salt, digest) if digest else None
        first = -1 - int.from_bytes(digest)
        self.contents = range(first, first - count, -1) if digest else range(0)
        self.future: Future[tuple[Tensor, torch.cuda.Event | None]] = Future()
        self.views = list(views)  # those that no batch has taken
        self.parts: list[Tensor] = []  # of the views that have been encoded, until all have

    @property
    def done(self) -> bool:
        """Whether there is a result or an error."""
        return self.future.done() and not self.future.cancelled()

    @property
    def error(self) -> BaseException | None:
        """What encoding raised, once it has failed."""
        return self.future.exception() if self.done else None

    @property
    def usable(self) -> bool:
        """Whether there is a result, or will be one."""
        return not self.future.cancelled() and self.error is None

    def drop(self) -> None:
        """Give up the image, which is not encoded yet."""
        self.views.clear()
        self.parts.clear()
        self.future.cancel()

    def ready(self) -> bool:
        """Whether `result` would return without waiting; never true after an `error`."""
        if not self.done or self.error:
            return False
        event = self.future.result()[1]
        return event is None or event.query()

    def result(self) -> Tensor:
        """[count, hidden], for work on the current stream. Raises what encoding raised."""
        features, event = self.future.result()
        if event is not None:
            torch.cuda.current_stream(features.device).wait_event(event)
            features.record_stream(torch.cuda.current_stream(features.device))
        return features


class Features:
    """Embeddings of a prompt's images, perhaps still being computed.

    count: their number of rows
    contents: an int for each row that identifies it, for the prefix cache; empty if not known
    """

    def __init__(
        self,
        images: Sequence[ImageFeatures],
        release: Callable[[Sequence[ImageFeatures]], None],
    ) -> None:
        self.images, self._release = images, release
        self.count = sum(image.count for image in images)
        known = all(image.key for image in images)
        self.contents = tuple(row for image in images for row in image.contents if known)

    @property
    def waiting(self) -> bool:
        """Whether some images' pixels are still in memory, to be encoded."""
        return not all(image.future.done() for image in self.images)

    @property
    def error(self) -> BaseException | None:
        """What encoding one of them raised, once it has failed."""
        return next((error for image in self.images if (error := image.error)), None)

    def ready(self) -> bool:
        """Whether `result` would return without waiting; never true after an `error`."""
        return all(image.ready() for image in self.images)

    def result(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows [start, stop) of the embeddings [count, hidden], for work on the current stream.
        Raises what encoding raised."""
        parts, first = [], 0
        stop = self.count if stop is None else stop
        for image in self.images:
            if first < stop and start < first + image.count:
                parts.append(image.result()[max(0, start - first) : stop - first])
            first += image.count
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def release(self) -> None:
        """End the use. Images without any other user that wait to be encoded will not be."""
        self._release(self.images)


class ImageEncoder:
    """Runs the model's vision tower in a thread; nothing else may use the tower meanwhile.

    pace: makes the tower pause between its blocks
    max_rows: of embeddings that are kept, with those in use; 0: none are kept after their use
    max_patches: of a batch; 0: each image is a batch, so that its bits do not depend on others.
        By default MAX_PATCHES on a GPU and 0 on a CPU, which gains less from larger products
    """

    def __init__(
        self,
        model: Step3VL,
        pace: "VisionPace",
        *,
        max_rows: int = 0,
        max_patches: int | None = None,
    ) -> None:
        self._model, self._pace, self._max_rows = model, pace, max_rows
        self._stream = None
        if model.device.type == "cuda":
            self._stream = torch.cuda.Stream(model.device)
            self._stream.wait_stream(torch.cuda.current_stream(model.device))  # for the weights
        if max_patches is None:
            max_patches = MAX_PATCHES if self._stream else 0
        self._whole_images = not max_patches
        self._lock = Lock()  # of all below
        self._queue: ViewQueue[ImageFeatures] = ViewQueue(max(1, max_patches))
        self._known: dict[tuple[str, bytes], ImageFeatures] = {}  # the last used last
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="vision")

    def encode(self, images: Sequence["Views"], salt: str = "") -> Features:
        """Start to encode a prompt's images, except those that are known with this salt; `release`
        them in the end. Raises InputError for a model that takes none."""
        self._model.count_features(())  # raises for a model without a tower
        counts = [self._model.count_features([image]) for image in images]
        with self._lock:
            features = [
                self._image(image, count, salt) for image, count in zip(images, counts, strict=True)
            ]
            self._forget()
        self._thread.submit(self._run)
        return Features(features, self._release)

    def close(self) -> None:
        """End the thread after the current batch; drops the images that have not been encoded."""
        with self._lock:
            while batch := self._queue.next():
                for image, _, _ in batch:
                    image.drop()
        self._pace.idle()
        self._thread.shutdown()

    def _image(self, views: "Views", count: int, salt: str) -> ImageFeatures:
        """An image for one more user: the known one, or a new one in the queue."""
        image = ImageFeatures(views.all, count, salt, views.digest)
        known = self._known.pop(image.key, None) if image.key else None
        if known is not None and known.usable:
            image = known
        else:
            patches = self._patches(image.views)
            self._queue.add(image, [sum(patches)] if self._whole_images else patches)
        if image.key:
            self._known[image.key] = image
        image.users += 1
        return image

    def _patches(self, views: Sequence["View"]) -> list[int]:
        """The patches of an image's views: crops, then the global view."""
        config = self._model.config.vision
        assert config is not None, "count_features raises for a model without a tower"
        crop = (config.crop_size // config.patch_size) ** 2
        return [crop] * (len(views) - 1) + [config.grid**2]

    def _release(self, images: Sequence[ImageFeatures]) -> None:
        with self._lock:
            for image in images:
                image.users -= 1
                if not image.users and image.views:
                    self._queue.remove(image)
                    image.drop()
            self._forget()

    def _forget(self) -> None:
        """Drop embeddings without users, those of long ago first, until the rest may be kept."""
        self._known = {key: image for key, image in self._known.items() if image.usable}
        rows = sum(image.count for image in self._known.values())
        for key, image in list(self._known.items()):
            if rows > self._max_rows and not image.users:
                del self._known[key]
                rows -= image.count

    def _run(self) -> None:
        """Encode until the queue is empty; in the thread."""
        while self._encode_next():
            self._pace.rest()

    def _encode_next(self) -> bool:
        """Encode a batch; returns whether there was one. No variable refers to pixels afterwards:
        a rest may follow."""
        with self._lock:
            batch = [
                (image, self._take(image, stop - start))
                for image, start, stop in self._queue.next()
            ]
        results = self._encoded([views for _, views in batch])
        for (image, _), result in zip(batch, results, strict=True):
            self._deliver(image, result)
        return bool(batch)

    def _take(self, image: ImageFeatures, count: int) -> list["View"]:
        """The next `count` views of an image, as the queue counts them."""
        count = len(image.views) if self._whole_images else count
        views, image.views = image.views[:count], image.views[count:]
        return views

    def _encoded(self, images: Sequence[Sequence["View"]]) -> list[Tensor | BaseException]:
        """The embeddings of some views of each image, or what encoding them raised."""
        try:
            return [*self._encode(images)] if images else []
        except BaseException as error:  # whoever waits for the images gets it
            if len(images) == 1:
                return [error]
        # None fails because of another one, or because there is too little memory for all.
        return [result for views in images for result in self._encoded([views])]

    def _encode(self, images: Sequence[Sequence["View"]]) -> list[Tensor]:
        tower = self._model.vision
        assert tower is not None, "count_features raises for a model without a tower"
        between = self._pause if self._pace.applies else None  # a CUDA graph cannot pause
        views = [view for of_image in images for view in of_image]
        with self._on_stream():
            self._pace.begin()
            try:
                features = spanned("encode images", tower)(views, between)
                if self._stream:
                    self._stream.synchronize()  # later batches are chosen when this one has ended
            finally:
                self._pace.end()
            if len(images) == 1:
                return [features]
            parts = features.split([tower.count(of_image) for of_image in images])
            return [part.clone() for part in parts]  # which do not keep the others in memory

    def _deliver(self, image: ImageFeatures, result: Tensor | BaseException) -> None:
        """Add embeddings to those of an image, or end it with an error."""
        with self._lock:
            if image.future.cancelled():  # released meanwhile
                image.parts.clear()
                return
            try:
                if isinstance(result, BaseException):
                    raise result
                image.parts.append(result)
                if not image.views:
                    image.future.set_result(self._joined(image.parts))
            except BaseException as error:
                self._queue.remove(image)
                image.views.clear()
                image.future.set_exception(error.with_traceback(None))  # which has the pixels
            if not image.views:
                image.parts.clear()

    def _joined(self, parts: Sequence[Tensor]) -> tuple[Tensor, torch.cuda.Event | None]:
        with self._on_stream():
            features = parts[0] if len(parts) == 1 else torch.cat(list(parts))
            return features, self._stream.record_event() if self._stream else None

    def _pause(self) -> None:
        """Let decoding go on after a slice of the tower, for as long as the pace says."""
        if self._stream:
            self._stream.synchronize()
        self._pace.end()
        self._pace.rest()
        self._pace.begin()

    @contextmanager
    def _on_stream(self) -> Iterator[None]:
        if self._stream is None:
            yield
            return
        with torch.cuda.device(self._model.device), torch.cuda.stream(self._stream):
            yield
