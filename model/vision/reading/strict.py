"""PIL's process-wide settings while an image is read."""

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_LOCK = threading.RLock()


@contextmanager
def strict_pil() -> Iterator[None]:
    """Without PIL's warnings (about sizes within our limits, and metadata), and without its
    LOAD_TRUNCATED_IMAGES, by which other code may have made missing pixels black.

    Both belong to the process, therefore one thread at a time.
    """
    from PIL import ImageFile

    with _LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
        try:
            yield
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = before
