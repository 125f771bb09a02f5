"""PIL's process-wide settings while images are read."""

import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager


@contextmanager
def _strict_settings() -> Iterator[None]:
    """Without PIL's warnings (about sizes within our limits, and metadata), and without its
    LOAD_TRUNCATED_IMAGES, by which other code may have made missing pixels black."""
    from PIL import Image, ImageFile

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
        try:
            yield
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = before


class _StrictPil:
    """Holds these settings while at least one thread is within: they belong to the process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._within = 0
        self._settings = ExitStack()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if not self._within:
                self._settings.enter_context(_strict_settings())
            self._within += 1
        try:
            yield
        finally:
            with self._lock:
                self._within -= 1
                if not self._within:
                    self._settings.close()


strict_pil = _StrictPil()
