"""Checks of PNG and JPEG data that PIL lacks, and removal of metadata that it may fail on."""

import re
import zlib
from collections.abc import Iterator

from model.vision.reading.limits import MAX_SCANS

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"eXIf", b"IDAT", b"IEND")  # chunks that make the image
PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type
# Interlacing's passes: first column, first row, step between columns, step between rows.
ADAM7 = (
    (0, 0, 8, 8),
    (4, 0, 8, 8),
    (0, 4, 4, 8),
    (2, 0, 4, 4),
    (0, 2, 2, 4),
    (1, 0, 2, 2),
    (0, 1, 1, 2),
)
BLOCK = 2**20  # bytes inflated at a time
# Any but the stuffed zero, restarts and padding, which occur between markers.
JPEG_MARKER = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])")


def stream_error(data: bytes) -> str | None:
    """Why PNG or JPEG data must not be decoded; None for other data, or if nothing is wrong."""
    if data.startswith(PNG_SIGNATURE):
        # PIL takes a compressed stream that ends early for a whole one, and leaves rows black.
        return None if _has_all_rows(data) else "the image data end early"
    if data.startswith(b"\xff\xd8") and (scans := _count_scans(data)) > MAX_SCANS:
        return f"it has {scans} scans; at most {MAX_SCANS} are read"
    return None


def without_metadata(data: bytes) -> bytes:
    """The data without what may keep PIL from opening a good image: PNG's texts and profiles if
    they inflate to more than 1 MiB, and some malformed EXIF data of JPEG (hidden, not removed)."""
    if data.startswith(PNG_SIGNATURE):
        chunks = (whole for kind, _, whole in _png_chunks(data) if kind in PNG_PIXELS)
        return PNG_SIGNATURE + b"".join(chunks)
    return data.replace(b"Exif\0\0", b"Exif\0\1")


def _has_all_rows(data: bytes) -> bool:
    """Whether a PNG's compressed data hold as many bytes as its rows take."""
    missing = 0
    inflate = zlib.decompressobj()
    for kind, body, _ in _png_chunks(data):
        if kind == b"IHDR":
            missing = _row_bytes(bytes(body))
        elif kind == b"IDAT":
            rest: bytes | memoryview = body
            while missing > 0 and len(rest) > 0:
                try:
                    missing -= len(inflate.decompress(rest, BLOCK))
                except zlib.error:
                    return False
                rest = inflate.unconsumed_tail
    return missing <= 0


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, memoryview, memoryview]]:
    """Types, contents and all bytes of a PNG's chunks; the last may be cut."""
    view, start = memoryview(data), len(PNG_SIGNATURE)
    while start < len(data):
        length = int.from_bytes(view[start : start + 4], "big")
        end = start + 12 + length  # with a checksum, which PIL checks
        yield bytes(view[start + 4 : start + 8]), view[start + 8 : end - 4], view[start:end]
        start = end


def _row_bytes(header: bytes) -> int:
    """Bytes of all rows, each with a byte for its filter, of a PNG with this IHDR."""
    width, height = int.from_bytes(header[:4], "big"), int.from_bytes(header[4:8], "big")
    depth, colour, interlaced = header[8], header[9], header[12]
    bits = depth * PNG_CHANNELS[colour]
    total = 0
    for left, top, across, down in ADAM7 if interlaced else ((0, 0, 1, 1),):
        columns, rows = -((left - width) // across), -((top - height) // down)
        if columns > 0:
            total += max(rows, 0) * (1 + -(-columns * bits // 8))
    return total


def _count_scans(data: bytes) -> int:
    """Scans of the first image in JPEG data."""
    scans, start = 0, 2
    while match := JPEG_MARKER.search(data, start):
        marker, start = match[1][0], match.end()
        if marker == 0xD9:  # end of image
            break
        scans += marker == 0xDA
        start += int.from_bytes(data[start : start + 2], "big")  # the segment's length
    return scans
