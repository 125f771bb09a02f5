"""What is refused before anything is decoded: paths of no file, and images that are too large."""

import os

from model.errors import InputError, shown
from model.text.files import check_regular

MAX_SIDE = 65_535  # pixels, JPEG's limit
# Ten times what the model sees of an image (3024 x 3024). It is the number from which PIL warns of
# "decompression bombs" (a quarter of a GiB at 3 bytes per pixel); vLLM takes twice as many.
MAX_PIXELS = 89_478_485
MAX_SLOW_PIXELS = 3024 * 3024  # of PPM in text or with an odd maximum, which PIL decodes in Python
MAX_BYTES = 2**28  # of a file: that quarter of a GiB, the largest image without compression
MAX_PARTS = 2**17  # such as segments of a JPEG and bytes of a PPM header: reading them takes 0.3 s
MAX_SCANS = 100  # of a JPEG, each a pass over all pixels from a few bytes; 1 to 10 are usual


def padded(width: int, height: int) -> tuple[int, int]:
    """The size after padding: very thin images are padded to a square."""
    if min(width, height) < 32 and (width / height > 4 or width / height < 1 / 4):
        return (max(width, height),) * 2
    return width, height


def check_size(width: int, height: int, name: str, max_pixels: int = MAX_PIXELS) -> None:
    """Raises InputError, which begins with `name`, for an image that is empty or too large."""
    if width < 1 or height < 1:
        raise InputError(f"{name} is empty: {width} x {height} pixels")
    width, height = padded(width, height)
    if max(width, height) > MAX_SIDE or width * height > max_pixels:
        raise too_large(name, max_pixels)


def too_large(name: str, max_pixels: int = MAX_PIXELS) -> InputError:
    return InputError(
        f"{name} is too large: it may have at most {MAX_SIDE:,} pixels a side and {max_pixels:,} in"
        " all (a thin image counts as the square to which it is padded); shrink it to 3,024 on its"
        " long side, which is all that the model sees"
    )


def check_bytes(count: int, name: str) -> None:
    """Raises InputError, which begins with `name`, for a file without bytes or with too many."""
    if count == 0:
        raise InputError(f"{name} is empty: 0 bytes")
    if count > MAX_BYTES:
        raise InputError(f"{name} is too large: it may have at most {MAX_BYTES:,} bytes")


def check_image_file(path: str | os.PathLike[str]) -> None:
    """Raise InputError for what is no regular file, before anything is opened."""
    name = path_name(path)
    if "://" in name and not os.path.lexists(path):
        raise InputError(f"image {name} is a URL, which is not fetched; download the file")
    check_regular(path, f"image {name}")


def path_name(path: str | os.PathLike[str]) -> str:
    """A path for a message: on one line, not endless, and printable."""
    text = os.fsdecode(path)
    return text if text.isprintable() and 0 < len(text) <= 200 else shown(text)
