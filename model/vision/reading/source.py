"""Opens images: from a path, bytes, a file object, a data URL, an array or a PIL image.

Nothing is decoded here: limits are checked against the sizes of files and the headers in them.
"""

import base64
import binascii
import io
import os
from typing import TYPE_CHECKING, BinaryIO, TypeAlias, cast

import numpy as np
import torch

from model.errors import InputError
from model.text.files import open_file
from model.vision.reading.arrays import array_image
from model.vision.reading.limits import (
    MAX_BYTES,
    MAX_PIXELS,
    MAX_SLOW_PIXELS,
    check_bytes,
    check_image_file,
    check_size,
    path_name,
    too_large,
)
from model.vision.reading.streams import stream_error, structure_error, without_metadata

if TYPE_CHECKING:
    from PIL import Image

    ImageSource: TypeAlias = (
        str
        | os.PathLike[str]
        | bytes
        | bytearray
        | memoryview
        | BinaryIO
        | np.ndarray
        | torch.Tensor
        | Image.Image
    )

# Without TIFF, whose decoder prints to stderr and accepts some truncated files.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "PPM")
BLOCK = 2**20  # bytes read at a time


def open_image(source: "ImageSource", max_pixels: int = MAX_PIXELS) -> tuple["Image.Image", str]:
    """A PIL image, not decoded unless the caller did that, and what messages call it.

    Raises InputError for a source that is no image, is too large, or whose PNG data end early.
    """
    from PIL import Image

    if isinstance(source, Image.Image):
        _check_opened(source, max_pixels)
        return source, "the image"
    if isinstance(source, np.ndarray | torch.Tensor):
        image = array_image(source)
        check_size(*image.size, "the array", max_pixels)
        return image, "the array"
    name, data = _contents(source)
    check_bytes(len(data), name)
    _check(structure_error(data), name)
    image = _identified(data, name, max_pixels)
    check_size(*image.size, name, max_pixels)
    if image.format == "PPM":
        _check_ppm(image, name)
    _check(stream_error(data), name)
    return image, name


def _contents(source: "ImageSource") -> tuple[str, bytes]:
    """What to call the source, and its bytes."""
    if isinstance(source, bytes | bytearray | memoryview):
        return "the image", bytes(source)
    if isinstance(source, str) and source[:5].lower() == "data:":
        return "the data URL", _decoded(source)
    if isinstance(source, str | os.PathLike):
        return path_name(source), _read_path(source)
    if hasattr(source, "read"):
        path = getattr(source, "name", None)  # an int for some temporary files
        name = path_name(path) if isinstance(path, str) else "the file"
        return name, _read_file(cast(BinaryIO, source), name)
    raise InputError(
        f"an object of type {type(source).__name__} is no image; it must be a path, the bytes of a"
        " file, a binary file, an array or a PIL image"
    )


def _read_path(path: str | os.PathLike[str]) -> bytes:
    check_image_file(path)
    name = path_name(path)
    with open_file(path, f"image {name}") as file:
        check_bytes(os.fstat(file.fileno()).st_size, name)
        return file.read(MAX_BYTES + 1)


def _read_file(file: BinaryIO, name: str) -> bytes:
    """A file object's bytes: from its start if it can seek, as PIL reads, else from where it is."""
    data = bytearray()
    try:
        if hasattr(file, "seekable") and file.seekable():
            file.seek(0)
        while len(data) <= MAX_BYTES and (block := file.read(BLOCK)):
            data += block
    except TypeError:  # of a text file, or of a read() that takes no size
        raise InputError(f"{name} is no binary file; open it with mode 'rb'") from None
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {name}: {error}") from None
    check_bytes(len(data), name)
    return bytes(data)


def _decoded(url: str) -> bytes:
    """The bytes of a data URL, as OpenAI's clients send them."""
    header, _, body = url.partition(",")
    try:
        if not header.lower().endswith(";base64"):
            raise ValueError
        return base64.b64decode("".join(body.split()), validate=True)
    except (binascii.Error, ValueError):
        raise InputError("a data URL must be data:image/...;base64, followed by base64") from None


def _identified(data: bytes, name: str, max_pixels: int) -> "Image.Image":
    """The opened image; its metadata are left out if PIL fails with them."""
    from PIL import Image

    error: Exception = OSError()
    for prepare in (bytes, without_metadata):
        try:
            return Image.open(io.BytesIO(prepare(data)), formats=FORMATS)
        except Image.DecompressionBombError:
            raise too_large(name, max_pixels) from None
        except Exception as failure:  # PIL's parsers raise errors of many types
            error = failure
    if not isinstance(error, OSError | SyntaxError):
        raise damaged(name, error)
    raise InputError(
        f"{name} is not an image; it must be one of {', '.join(FORMATS)}, of at least 1 x 1 pixels"
    )


def _check_opened(image: "Image.Image", max_pixels: int) -> None:
    """Check a PIL image; one that is not decoded yet has its file, whose data are checked too."""
    check_size(*image.size, "the image", max_pixels)
    if not getattr(image, "tile", None):
        return
    file = getattr(image, "fp", None)
    if file is None:
        raise InputError("the image was closed before it was loaded; pass its path")
    if image.format in ("PNG", "JPEG", "MPO") and image.tell() == 0:
        position = file.tell()
        data = _read_file(file, "the image")
        file.seek(position)
        _check(structure_error(data) or stream_error(data), "the image")


def _check_ppm(image: "Image.Image", name: str) -> None:
    (codec, *_), *_ = getattr(image, "tile", [("raw",)])
    if codec != "raw" and image.width * image.height > MAX_SLOW_PIXELS:
        raise InputError(
            f"{name} is too large: a PPM file in text or with an odd maximum may have at most"
            f" {MAX_SLOW_PIXELS:,} pixels; convert it to PNG"
        )


def _check(error: str | None, name: str) -> None:
    if error:
        raise damaged(name, error)


def damaged(name: str, error: object) -> InputError:
    reason = " ".join(str(error).split())
    return InputError(f"{name} is truncated or damaged" + (f": {reason}" if reason else ""))
