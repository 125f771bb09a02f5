"""Checks of files' data that PIL lacks, and removal of metadata that it may fail on."""

import re
import zlib
from collections.abc import Iterator
from itertools import islice

from model.vision.reading.limits import MAX_PARTS, MAX_SCANS

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
JPEG_SCAN = 0xDA  # the marker of a scan's header
# Markers that begin a segment, and the end of the image. The others (a stuffed zero, TEM, restarts,
# start of image, padding) have no length after them.
JPEG_MARKER = re.compile(rb"\xff([\x02-\xcf\xd9-\xfe])")
# Two or three numbers between white space and comments.
PPM_HEADER = re.compile(rb"P[1-6](?:(?:\s|#[^\r\n]*[\r\n])+\d+){2,3}")


def structure_error(data: bytes) -> str | None:
    """Why PIL must not open a file: it would read too many parts in Python, one at a time, or
    decode all pixels too often, once for each scan of a JPEG. None if nothing is wrong."""
    if data.startswith(PNG_SIGNATURE):
        if next(islice(_png_chunks(data), MAX_PARTS, None), None):
            return f"it has more than {MAX_PARTS} chunks"
    elif data.startswith(b"\xff\xd8"):
        markers = list(islice(_jpeg_markers(data), MAX_PARTS + 1))
        scans = markers.count(JPEG_SCAN)
        if len(markers) > MAX_PARTS:
            return f"it has more than {MAX_PARTS} segments"
        if scans > MAX_SCANS:
            return f"it has {scans} scans; at most {MAX_SCANS} are read"
    elif data.startswith((b"GIF87a", b"GIF89a")):
        if next(islice(_gif_blocks(data), MAX_PARTS, None), None):
            return f"it has more than {MAX_PARTS} blocks before its first image"
    elif re.match(rb"P[1-6]\s", data) and not PPM_HEADER.match(data[:MAX_PARTS]):
        return f"its header does not end within {MAX_PARTS} bytes"
    return None


def stream_error(data: bytes) -> str | None:
    """Why PNG data must not be decoded; None for other data, or if nothing is wrong."""
    # PIL takes a compressed stream that ends early for a whole one, and leaves rows black.
    if data.startswith(PNG_SIGNATURE) and not _has_all_rows(data):
        return "the image data end early"
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


def _gif_blocks(data: bytes) -> Iterator[int]:
    """Sizes of the blocks of text and settings that precede a GIF's first image."""
    flags = data[10] if len(data) > 10 else 0
    start = 13 + (3 << (flags % 8 + 1) if flags & 0x80 else 0)  # after the colour table
    while data[start : start + 1] == b"!":  # an extension
        start += 2
        while size := int.from_bytes(data[start : start + 1], "big"):
            yield size
            start += 1 + size
        start += 1


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


def _jpeg_markers(data: bytes) -> Iterator[int]:
    """Markers of the segments of the first image in JPEG data."""
    start = 2
    while (match := JPEG_MARKER.search(data, start)) and match[1][0] != 0xD9:  # end of image
        yield match[1][0]
        start = match.end() + int.from_bytes(data[match.end() : match.end() + 2], "big")
