"""Tests of what PIL does not check: PNG data that end early, files of millions of small parts."""

import io
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from model.errors import InputError
from model.vision.image import load_image
from model.vision.reading.limits import MAX_PARTS
from model.vision.reading.streams import _row_bytes
from tests.model.vision.images import encoded, photo, png

ROWS = b"".join(b"\0" + row.tobytes() for row in np.asarray(photo()))
LEVELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}


@pytest.mark.parametrize("missing", [1, 184, len(ROWS) // 2, len(ROWS)])
def test_png_data_that_end_early_are_refused(missing):
    """Guards against black rows: PIL takes a complete compressed stream of too few rows."""
    assert np.array_equal(np.asarray(load_image(png(61, 41, ROWS))), np.asarray(photo()))
    data = png(61, 41, ROWS[:-missing])
    with pytest.raises(InputError, match="truncated or damaged: the image data end early"):
        load_image(data)
    with Image.open(io.BytesIO(data)) as lazy, pytest.raises(InputError, match="end early"):
        load_image(lazy)


# The pass of each pixel of a block of 8 x 8, as in PNG's specification.
ADAM7 = np.array(
    [
        [1, 6, 4, 6, 2, 6, 4, 6],
        [7, 7, 7, 7, 7, 7, 7, 7],
        [5, 6, 5, 6, 5, 6, 5, 6],
        [7, 7, 7, 7, 7, 7, 7, 7],
        [3, 6, 4, 6, 3, 6, 4, 6],
        [7, 7, 7, 7, 7, 7, 7, 7],
        [5, 6, 5, 6, 5, 6, 5, 6],
        [7, 7, 7, 7, 7, 7, 7, 7],
    ]
)


def interlaced_rows(pixels):
    """The rows that each pass has of an array [H, W]."""
    height, width = pixels.shape
    number = np.tile(ADAM7, (-(-height // 8), -(-width // 8)))[:height, :width]
    rows = [pixels[y][number[y] == n] for n in range(1, 8) for y in range(height)]
    return [row for row in rows if len(row)]


@given(st.integers(1, 20), st.integers(1, 20), st.sampled_from([(1, 0), (4, 3), (8, 2), (16, 6)]))
def test_sizes_of_rows(width, height, kind):
    """Guards the count of bytes, interlaced or not, against brute force over the pattern."""
    depth, colour = kind
    bits = depth * LEVELS[colour]

    def count(rows):
        return sum(1 + -(-columns * bits // 8) for columns in rows)

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([depth, colour, 0, 0])
    assert _row_bytes(header + b"\0") == count([width] * height)
    rows = interlaced_rows(np.zeros((height, width)))
    assert _row_bytes(header + b"\1") == count(map(len, rows))


def test_interlaced_png_is_read_whole():
    """Guards interlaced files: a whole one is read, one without its last pass refused."""
    grey = np.asarray(photo(13, 11).convert("L"))
    data = b"".join(b"\0" + row.tobytes() for row in interlaced_rows(grey))
    whole = load_image(png(13, 11, data, colour=0, interlaced=1))
    assert np.array_equal(np.asarray(whole)[..., 0], grey)
    with pytest.raises(InputError, match="end early"):
        load_image(png(13, 11, data[: -5 * 14], colour=0, interlaced=1))


def parts(form, count):
    """An image with `count` more chunks, segments, blocks or header bytes that hold nothing."""
    data = encoded(photo(), form)
    if form == "PNG":
        return (
            data[:33]
            + (bytes(4) + b"abCd" + zlib.crc32(b"abCd").to_bytes(4, "big")) * count
            + data[33:]
        )
    if form == "JPEG":
        return data[:2] + b"\xff\xe5\0\2" * count + data[2:]
    if form == "GIF":
        table = 13 + (3 << (data[10] % 8 + 1))
        return data[:table] + b"!\xfe" + b"\1a" * count + b"\0" + data[table:]
    return b"P6\n#" + b" " * count + data[2:]


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "PPM"])
def test_files_of_many_parts_are_refused(form):
    """Guards time and memory: PIL reads parts one at a time, 90 s for a JPEG of 256 MiB of them."""
    assert load_image(parts(form, 1000)).size == photo().size
    with pytest.raises(InputError, match=f"the image is truncated or damaged: .*{MAX_PARTS}"):
        load_image(parts(form, MAX_PARTS + 1))


def test_jpeg_of_many_scans_is_refused():
    """Guards time: each scan is a pass over all pixels, in a few bytes. Scans of what follows the
    first image, such as a video of a phone, do not count."""
    data = encoded(photo(), "JPEG", progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]
    assert data.count(b"\xff\xda") == 10
    load_image(data[:-2] + scan * 90 + b"\xff\xd9")
    load_image(data + b"\0\0" + b"\xff\xda\0\0" * 200)
    load_image(data[:2] + b"\xff\xe5\x01\x92" + b"\xff\xda" * 200 + data[2:])
    for hidden in (b"", b"\xff\x01\xff\xff"):  # TEM has no length that could hide scans
        with pytest.raises(InputError, match="it has 101 scans; at most 100 are read"):
            load_image(data[:-2] + hidden + scan * 91 + b"\xff\xd9")
