"""Encodes images while steps run: in a thread, and on a GPU in a separate stream."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels.runtime.spans import spanned
from model.step3vl import Step3VL

if TYPE_CHECKING:
    from model.vision.image import Views


class Features:
    """Embeddings of some images, perhaps still being computed. `count` is their number of rows."""

    def __init__(
        self,
        count: int,
        future: "Future[tuple[Tensor, torch.cuda.Event | None]]",
        drop_views: Callable[[], None],
    ) -> None:
        self.count, self._future, self._drop_views = count, future, drop_views

    @property
    def waiting(self) -> bool:
        """Whether the images' pixels are still in memory, to be encoded."""
        return not self._future.done()

    def cancel(self) -> None:
        """Do not encode the images, if that has not begun: their embeddings will not be read."""
        if self._future.cancel():
            self._drop_views()  # the thread's queue still holds the call

    def ready(self) -> bool:
        """Whether `result` would return without waiting; never true after an `error`."""
        if not self._future.done() or self._future.cancelled() or self._future.exception():
            return False
        event = self._future.result()[1]
        return event is None or event.query()

    @property
    def error(self) -> BaseException | None:
        """What encoding raised, once it has failed."""
        if not self._future.done() or self._future.cancelled():
            return None
        return self._future.exception()

    def result(self) -> Tensor:
        """[count, hidden], for work on the current stream. Raises what encoding raised."""
        features, event = self._future.result()
        if event is not None:
            torch.cuda.current_stream(features.device).wait_event(event)
            features.record_stream(torch.cuda.current_stream(features.device))
        return features


class ImageEncoder:
    """Runs the model's vision tower in a thread; nothing else may use the tower meanwhile."""

    def __init__(self, model: Step3VL) -> None:
        self._model = model
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="vision")
        self._stream = None
        if model.device.type == "cuda":
            self._stream = torch.cuda.Stream(model.device)
            self._stream.wait_stream(torch.cuda.current_stream(model.device))  # for the weights

    def encode(self, views: Sequence["Views"]) -> Features:
        """Start to encode some images. Raises InputError for a model that takes none."""
        count = self._model.count_features(views)
        call = [views]  # a list, which `cancel` can empty
        future = self._thread.submit(spanned("encode images", self._run), call)
        return Features(count, future, call.clear)

    def close(self) -> None:
        """End the thread after the current images; drops those that have not started."""
        self._thread.shutdown(cancel_futures=True)

    def _run(self, call: list[Sequence["Views"]]) -> tuple[Tensor, "torch.cuda.Event | None"]:
        views = call.pop()
        if self._stream is None:
            return self._model.encode_images(views), None
        with torch.cuda.device(self._model.device), torch.cuda.stream(self._stream):
            features = self._model.encode_images(views)
            return features, self._stream.record_event()
