"""Tests of what is taken for an image, and of the one line that everything else gets."""

import base64
import io
import os
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from model.errors import InputError
from model.vision.image import load_image
from model.vision.reading import limits, source
from model.vision.reading.strict import strict_pil
from tests.model.vision.images import FORMATS, PHOTOS, chunk, encoded, oriented, photo, png

PHOTO = PHOTOS / "chelsea.png"


def same(loaded, expected):
    return loaded.mode == "RGB" and np.array_equal(np.asarray(loaded), np.asarray(expected))


class Named(os.PathLike):
    def __fspath__(self):
        return str(PHOTO)


@pytest.mark.parametrize("name", ["horse.png", "camera.png", "retina.jpg", "motorcycle_left.png"])
def test_a_file_its_bytes_and_its_image_are_equal(name):
    """Guards every pixel of a path, bytes and a PIL image, for grey, colour and opaque RGBA."""
    path = PHOTOS / name
    with Image.open(path) as image:
        expected = image.convert("RGB")
        for given in (path, str(path), path.read_bytes(), image):
            assert same(load_image(given), expected)


def test_every_kind_of_source_is_read():
    """Guards each kind: only strings, Paths, bytes and PIL images were read."""
    data = PHOTO.read_bytes()
    with Image.open(PHOTO) as image:
        expected = image.convert("RGB")
    url = f"data:image/png;base64,{base64.encodebytes(data).decode()}"
    padded = memoryview(b"xx" + data)[2:]
    for given in (Named(), bytearray(data), memoryview(data), padded, io.BytesIO(data), url):
        assert same(load_image(given), expected)
    for buffering in (-1, 0):
        with PHOTO.open("rb", buffering=buffering) as file:
            assert same(load_image(file), expected)


class Pipe(io.RawIOBase):
    """A stream that gives a few bytes at a time and cannot seek."""

    def __init__(self, data):
        self.rest = io.BytesIO(data)

    def read(self, size=-1):
        return self.rest.read(min(size, 1000))


def test_file_objects_are_read_from_their_start():
    """Guards a buffer just written, whose position is its end (PIL starts at 0 too), reading one
    twice, and streams that cannot seek and give less than they are asked for."""
    file = io.BytesIO()
    photo().save(file, "PNG")
    assert same(load_image(file), photo())
    assert same(load_image(file), photo())
    assert same(load_image(Pipe(file.getvalue())), photo())


def big_file(path):
    """A file that claims more bytes than are read, and takes no space."""
    with path.open("wb") as file:
        file.truncate(limits.MAX_BYTES + 1)
    return path


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("no/such/file.png", "image no/such/file.png cannot be read: No such file"),
        ("nul\0byte.png", r"image 'nul\\x00byte.png' cannot be read: embedded null"),
        ("two\nlines.png", r"image 'two\\nlines.png' cannot be read: No such file"),
        ("", "image '' cannot be read: No such file"),
        ("iVBORw0KGgo" * 10_000, "image '(iVBORw0KGgo){3}iV.*' cannot be read: File name too"),
        ("https://host/a.png", "image https://host/a.png is a URL, which is not fetched"),
        ("data:image/png,abc", "data URL must be data:image/...;base64, followed by base64"),
        ("data:image/png;base64,@@@", "data URL must be"),
        ("data:image/png;base64,", "the data URL is empty: 0 bytes"),
        (PHOTOS, "is a directory; it must be a file"),
        (Path("/dev/zero"), "image /dev/zero is a pipe, socket or device; it must be a file"),
        (PHOTOS / "README.txt", "README.txt is not an image; it must be one of PNG, JPEG"),
        (b"", "the image is empty: 0 bytes"),
        (b"GIF89a", "is not an image"),
        (png(0, 5, b""), "is not an image; .* at least 1 x 1"),
        (io.BytesIO(), "the file is empty: 0 bytes"),
        (io.StringIO("a"), "the file is no binary file; open it with mode 'rb'"),
        (Image.new("RGB", (0, 5)), "is empty: 0 x 5 pixels"),
        (Image.new("F", (5, 5)), "float pixels"),
        (None, "an object of type NoneType is no image; it must be a path, the bytes"),
        (3, "type int is no image"),
        ([str(PHOTO)], "type list is no image"),
    ],
    ids=lambda value: "" if not isinstance(value, str) or len(value) > 60 else repr(value),
)
def test_what_is_no_image_gets_one_line(given, message):
    """Guards against tracebacks, warnings and endless reading of what people pass by mistake."""
    with warnings.catch_warnings(), pytest.raises(InputError, match=message) as error:
        warnings.simplefilter("error")
        load_image(given)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_a_pipe_is_not_waited_for(tmp_path):
    """Guards against hanging: opening a named pipe waits for its writer."""
    os.mkfifo(tmp_path / "pipe")
    errors = []

    def read():
        try:
            load_image(tmp_path / "pipe")
        except InputError as error:
            errors.append(str(error))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join(timeout=20)
    assert len(errors) == 1 and "is a pipe, socket or device" in errors[0]


def test_closed_files_get_one_line():
    """Guards against PIL's AssertionError and Python's ValueError."""
    file = io.BytesIO(b"a")
    file.close()
    with pytest.raises(InputError, match="cannot read the file: I/O operation on closed file"):
        load_image(file)
    with Image.open(PHOTO) as image:
        pass
    with pytest.raises(InputError, match="the image was closed before it was loaded"):
        load_image(image)


def test_large_files_are_refused_unread(tmp_path, monkeypatch):
    """Guards memory: the size of a file is checked first, and a stream is read up to the limit."""
    with monkeypatch.context() as context, pytest.raises(InputError, match="at most 268,435,456"):
        context.setattr(source, "open", None, raising=False)
        load_image(big_file(tmp_path / "big.png"))
    monkeypatch.setattr(limits, "MAX_BYTES", 10_000)
    monkeypatch.setattr(source, "MAX_BYTES", 10_000)
    monkeypatch.setattr(source, "BLOCK", 1000)
    with open("/dev/zero", "rb") as endless, pytest.raises(InputError, match="at most 10,000"):
        load_image(endless)
    for given in (bytes(10_001), "data:;base64," + base64.b64encode(bytes(10_001)).decode()):
        with pytest.raises(InputError, match="at most 10,000 bytes"):
            load_image(given)


def bmp(width, height):
    """A BMP's header, without pixels."""
    data = bytearray(encoded(Image.new("RGB", (1, 1)), "BMP"))
    data[18:26] = width.to_bytes(4, "little") + height.to_bytes(4, "little")
    return bytes(data)


# Its screen is 1 x 1 pixel, its first frame 65,535 x 65,535.
GIF_OF_LARGE_FRAME = b"GIF89a\1\0\1\0\0\0\0," + bytes(4) + b"\xff" * 4 + bytes(9)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (png(100_000, 100_000, b""), "too large: it may have at most 65,535 pixels a side"),
        (png(100_000, 40, b""), "too large"),
        (png(13_000, 13_000, b"", depth=1, colour=0), "too large: .* 89,478,485 in all .* 3,024"),
        (png(30_000, 20, b""), "too large: .*thin image"),  # its square would not fit
        (png(20_000, 10_000, b""), "too large"),  # PIL's own limit
        (b"P6 10000 10000 255 ", "too large"),
        (b"P5 3025 3025 254 ", "too large: a PPM file in text or with an odd maximum"),
        (b"P3 3025 3025 255 ", "too large: a PPM file in text or with an odd maximum"),
        (bmp(10_000, 10_000), "too large"),
        (
            b"GIF89a" + b"\xff" * 4 + bytes(3) + b"," + bytes(4) + b"\xff" * 4 + bytes(9),
            "too large",
        ),
        (np.broadcast_to(np.uint8(0), (10_000, 10_000)), "the array is too large"),
        (torch.zeros(1).expand(3, 10_000, 10_000), "the array is too large"),
        (png(9_000, 9_000, b""), "truncated"),  # within the limits: and no warning of PIL's
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_large_images_are_refused_by_their_header(given, message, monkeypatch):
    """Guards memory and time: nothing may be decoded of an image beyond the limits."""
    monkeypatch.setattr(ImageFile.ImageFile, "load", None)
    with warnings.catch_warnings(), pytest.raises(InputError, match=message):
        warnings.simplefilter("error")
        load_image(given)


@pytest.mark.parametrize(
    "given",
    [png(11, 10, b""), np.zeros((10, 11), np.uint8), Image.new("L", (11, 10)), png(30, 2, b"")],
    ids=["header", "array", "opened", "padded"],
)
def test_a_lower_limit(given, monkeypatch):
    """Guards a server's memory: its limit holds for every source, before decoding."""
    monkeypatch.setattr(ImageFile.ImageFile, "load", None)
    with pytest.raises(InputError, match="too large: .* 109 in all"):
        load_image(given, max_pixels=109)
    monkeypatch.undo()
    assert load_image(photo(11, 10), max_pixels=110).size == (11, 10)


def test_lazy_images_are_checked_before_they_are_decoded():
    """Guards the limits for a PIL image whose file has been opened and not decoded."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        lazy = Image.open(io.BytesIO(png(12_000, 12_000, b"")))
    with pytest.raises(InputError, match="too large"):
        load_image(lazy)


def test_the_first_frame_alone_is_decoded(monkeypatch):
    """Guards the cost of animations."""
    decoded = []
    load = ImageFile.ImageFile.load
    monkeypatch.setattr(
        ImageFile.ImageFile, "load", lambda self: (decoded.append(self.tell()), load(self))[1]
    )
    frames = [photo().rotate(angle) for angle in (90, 180, 270)]
    for form in ("GIF", "PNG", "WEBP"):
        load_image(encoded(photo(), form, save_all=True, append_images=frames))
    assert decoded and set(decoded) == {0}


def test_metadata_that_inflate_are_left_out():
    """Guards good images with a text or a colour profile that PIL refuses to inflate."""
    bomb = zlib.compress(bytes(2**21))
    rows = b"".join(b"\0" + row.tobytes() for row in np.asarray(photo()))
    for kind, head in ((b"zTXt", b"k\0\0"), (b"iTXt", b"k\0\1\0\0\0"), (b"iCCP", b"k\0\0")):
        exif = chunk(b"eXIf", oriented(3).tobytes()[6:])
        data = png(61, 41, rows, before=chunk(kind, head + bomb) + exif)
        assert same(load_image(data), photo().rotate(180))


def test_mpo_is_read_as_jpeg():
    """Guards photos of phones that hold a second picture, which PIL opens with another plugin."""
    data = encoded(photo(), "MPO", save_all=True, append_images=[photo().rotate(180)])
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == "MPO"
        expected = image.convert("RGB")
    assert same(load_image(data), expected)


@pytest.mark.parametrize("truncated", [False, True])
@pytest.mark.parametrize("form", FORMATS)
def test_cut_files_are_refused_if_a_pixel_is_lost(form, truncated, monkeypatch):
    """Guards against half-grey images, exceptions of a decoder's own type, and other code's
    LOAD_TRUNCATED_IMAGES. A cut in a file's last bytes may load, with every pixel."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", truncated)
    data = encoded(photo(), form)
    whole = load_image(data)
    for kept in {*range(1, len(data), max(1, len(data) // 50)), *range(len(data) - 40, len(data))}:
        try:
            assert same(load_image(data[:kept]), whole)
        except InputError as error:
            assert "not an image" in str(error) or "truncated" in str(error)
        else:
            assert len(data) - kept <= 25
    assert ImageFile.LOAD_TRUNCATED_IMAGES is truncated


def test_lazy_images_of_cut_files_are_refused(monkeypatch):
    """Guards an image that the caller has opened and not decoded."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    for form in FORMATS:
        data = encoded(photo(), form)
        for given in (data, data[: len(data) // 2]):
            try:
                image = Image.open(io.BytesIO(given))
            except OSError:  # of WEBP
                continue
            if given is data:
                load_image(image)
            else:
                with pytest.raises(InputError, match="truncated"):
                    load_image(image)


def test_threads_share_pils_settings(monkeypatch):
    """Guards a setting of the process against being restored while another thread reads, or in the
    wrong order, for ever; and threads against waiting for each other's images."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    filters = list(warnings.filters)
    entered, leave = threading.Event(), threading.Event()

    def other():
        with strict_pil():
            entered.set()
            assert leave.wait(10)

    thread = threading.Thread(target=other)
    with strict_pil():
        thread.start()
        assert entered.wait(10), "it waits for the other thread's image"
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False
    assert warnings.filters != filters
    leave.set()
    thread.join()
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True
    assert warnings.filters == filters
    with strict_pil():
        assert ImageFile.LOAD_TRUNCATED_IMAGES is False
