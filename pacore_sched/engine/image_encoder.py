"""Encodes images while steps run: in a thread, and on a GPU in a separate stream.

The embeddings of images that are no longer used are kept for the next request with the same images,
within the budget for embeddings.
"""

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
    """Embeddings of some images, perhaps still being computed.

    count: their number of rows
    contents: an int for each row that identifies it, for the prefix cache; empty if not known
    """

    def __init__(
        self,
        count: int,
        contents: Sequence[int],
        future: "Future[tuple[Tensor, torch.cuda.Event | None]]",
        drop_views: Callable[[], None],
    ) -> None:
        self.count, self.contents = count, contents
        self._future, self._drop_views = future, drop_views
        self.users = 1

    @property
    def waiting(self) -> bool:
        """Whether the images' pixels are still in memory, to be encoded."""
        return not self._future.done()

    @property
    def usable(self) -> bool:
        """Whether there is a result, or will be one."""
        return not self._future.cancelled() and self.error is None

    def release(self) -> None:
        """End a use. Without any other, images that wait to be encoded will not be."""
        self.users -= 1
        if not self.users and self._future.cancel():
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
    """Runs the model's vision tower in a thread; nothing else may use the tower meanwhile.

    max_rows: of embeddings that are kept, with those in use; 0: none are kept
    """

    def __init__(self, model: Step3VL, max_rows: int = 0) -> None:
        self._model, self._max_rows = model, max_rows
        self._known: dict[tuple, Features] = {}  # by salt and images, the last used last
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="vision")
        self._stream = None
        if model.device.type == "cuda":
            self._stream = torch.cuda.Stream(model.device)
            self._stream.wait_stream(torch.cuda.current_stream(model.device))  # for the weights

    def encode(self, views: Sequence["Views"], salt: str = "") -> Features:
        """Start to encode some images, unless the embeddings of the same ones with the same salt
        are known; `release` them in the end. Raises InputError for a model that takes none."""
        key = salt, *(view.digest for view in views)
        features = self._known.pop(key, None) if self._max_rows else None
        if features is not None and features.usable:
            features.users += 1
        else:
            features = self._start(views)
        if self._max_rows and all(key[1:]):
            self._known[key] = features
            self._forget()
        return features

    def _start(self, views: Sequence["Views"]) -> Features:
        count = self._model.count_features(views)
        call = [views]  # a list, which `release` can empty
        future = self._thread.submit(spanned("encode images", self._run), call)
        return Features(count, self._contents(views), future, call.clear)

    def _contents(self, views: Sequence["Views"]) -> tuple[int, ...]:
        """An int for each row of the images, which no token has as its id."""
        if not all(view.digest for view in views):
            return ()
        contents: list[int] = []
        for view in views:
            first = -1 - int.from_bytes(view.digest)
            contents += range(first, first - self._model.count_features([view]), -1)
        return tuple(contents)

    def _forget(self) -> None:
        """Drop embeddings without users, those of long ago first, until the rest may be kept."""
        self._known = {key: features for key, features in self._known.items() if features.usable}
        rows = sum(features.count for features in self._known.values())
        for key, features in list(self._known.items()):
            if rows > self._max_rows and not features.users:
                del self._known[key]
                rows -= features.count

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
