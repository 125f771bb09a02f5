"""Image files made in memory, for tests of reading."""

import io
import struct
import zlib
from importlib.util import find_spec
from pathlib import Path

from PIL import Image

PHOTOS = Path(find_spec("skimage").submodule_search_locations[0]) / "data"
FORMATS = ["PNG", "JPEG", "WEBP", "GIF", "BMP", "PPM"]


def encoded(image, form, **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def photo(width=61, height=41):
    with Image.open(PHOTOS / "chelsea.png") as image:
        return image.convert("RGB").resize((width, height))


def oriented(value):
    """EXIF data with this orientation."""
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def chunk(kind, data):
    checksum = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)


def png(width, height, data, *, depth=8, colour=2, interlaced=0, before=b""):
    """A PNG of rows that begin with their filter's byte, with other chunks `before` them."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    chunks = [chunk(b"IHDR", header), before, chunk(b"IDAT", data and zlib.compress(data))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + chunk(b"IEND", b"")
