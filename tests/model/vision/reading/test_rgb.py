"""Tests of orientation, transparency and colour modes against transformers and arithmetic."""

import io
import random
import struct
import warnings

import numpy as np
import pytest
from PIL import Image, ImageCms

from model.vision.image import load_image
from tests.model.vision.images import chunk, encoded, oriented, photo, png

CORNERS = np.array([[[200, 0, 0], [0, 200, 0]], [[0, 0, 200], [90, 90, 90]]], np.uint8)
RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


def pixels(source):
    image = load_image(source)
    assert image.mode == "RGB"
    return np.asarray(image)


def grey(values):
    return np.repeat(np.asarray(values)[..., None], 3, -1)


def over_white(rgb, alpha):
    """In fp64, rounded."""
    alpha = np.asarray(alpha, float)[..., None] / 255
    return (np.asarray(rgb) * alpha + 255 * (1 - alpha)).round()


# How a camera stores the upright picture (EXIF 2.32, 4.6.4: where row 0 and column 0 are).
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("value", STORED)
def test_photos_are_upright(value, form):
    """Guards each of the eight orientations, and the swap of width and height: photos of phones lay
    on their side."""
    upright = np.repeat(np.repeat(CORNERS, 16, 0), 32, 1)  # 64 x 32
    stored = Image.fromarray(np.ascontiguousarray(STORED[value](upright)))
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95, "subsampling": 0}}.get(form, {})
    loaded = load_image(encoded(stored, form, exif=oriented(value), **options))
    assert loaded.size == (64, 32)
    assert np.abs(np.asarray(loaded).astype(int) - upright).max() <= (4 if form == "JPEG" else 0)


def test_an_orientation_is_applied_once():
    """Guards against turning an image again that `load_image` or PIL has turned."""
    data = encoded(photo(), "JPEG", exif=oriented(6))
    upright = load_image(data)
    assert upright.size == (41, 61) and not upright.info
    assert load_image(upright).size == (41, 61)
    with Image.open(io.BytesIO(data)) as image:
        assert load_image(image).size == (41, 61)
        assert image.size == (61, 41) and image.getexif()[0x0112] == 6  # the caller's is unchanged


@pytest.mark.judge
@pytest.mark.parametrize("value", [1, 3, 6, 7])
def test_upright_photos_equal_transformers(value):
    """Guards orientation against an independent reader."""
    image_utils = pytest.importorskip("transformers.image_utils")
    with Image.open(io.BytesIO(encoded(photo(), "JPEG", exif=oriented(value)))) as image:
        assert np.array_equal(pixels(image), np.asarray(image_utils.load_image(image)))


def malformed_exif():
    """EXIF data that are cut, overwritten or of a wrong type."""
    exif = oriented(6)
    exif[0x010F] = "Make"
    exif[0x0128] = 2
    exif[0x011A] = 72.0
    whole = exif.tobytes()
    # PIL cannot open a JPEG whose resolution is a byte instead of a ratio.
    entry = whole.index(struct.pack(">HH", 0x011A, 5))
    yield whole[:entry] + struct.pack(">HH", 0x011A, 1) + whole[entry + 4 :]
    yield from (whole[:length] for length in range(6, len(whole), 5))
    rng = random.Random(0)
    for _ in range(40):
        data = bytearray(whole)
        for _ in range(4):
            data[rng.randrange(6, len(data))] = rng.choice([0, 1, 255, rng.randrange(256)])
        yield bytes(data)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_malformed_exif_does_not_refuse_the_photo(form):
    """Guards against tracebacks and warnings of PIL's EXIF parser, and against losing the photo."""
    plain = encoded(photo(), form)
    stored = pixels(plain)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for exif in malformed_exif():
            loaded = pixels(encoded(photo(), form, exif=exif))
            assert any(np.array_equal(loaded, turn(stored)) for turn in STORED.values())
        nonsense = pixels(encoded(photo(), form, exif=b"Exif\0\0nonsense"))
    assert np.array_equal(nonsense, stored)


def test_black_text_on_a_clear_ground_is_black_on_white():
    """Guards against dropping alpha: the colour under clear pixels is usually black."""
    clear = Image.new("RGBA", (8, 4))
    clear.putpixel((2, 1), (0, 0, 0, 255))
    expected = np.full((4, 8, 3), 255)
    expected[1, 2] = 0
    for form in ("PNG", "WEBP", "GIF"):
        options = {"lossless": True} if form == "WEBP" else {}
        assert np.array_equal(pixels(encoded(clear, form, **options)), expected)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "RGBa", "La"])
def test_alpha_is_blended_with_white(mode):
    """Guards the blending of every value of alpha, in every mode that has it."""
    image = Image.fromarray(grey(RAMP.T)).convert("RGBA")
    image.putalpha(Image.fromarray(RAMP))
    straight = mode.upper()
    image = image.convert(straight).convert(mode)
    tolerance = 0.5 if mode == straight else 1  # premultiplied: rounded twice
    assert np.abs(pixels(image) - over_white(grey(RAMP.T), RAMP)).max() <= tolerance
    if mode == straight:
        assert np.array_equal(pixels(encoded(image, "PNG")), pixels(image))


def test_palettes_with_an_alpha_channel_are_blended():
    """Guards PA, whose alpha is not in the palette."""
    image = Image.merge("PA", (Image.new("P", (16, 16), 1), Image.fromarray(RAMP)))
    image.putpalette([9, 9, 9, 10, 20, 30])
    assert np.abs(pixels(image) - over_white([10, 20, 30], RAMP)).max() <= 0.5


def test_transparent_palettes_are_blended():
    """Guards tRNS of palettes (one clear entry, or an alpha for each), RGBA palettes, and against
    PIL's warning about them."""
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        blended = pixels(encoded(image, "PNG", transparency=b"\x80\xff"))
        clear = pixels(encoded(image, "PNG", transparency=1))
    assert blended.tolist() == [[[132, 137, 142], [40, 50, 60]]]
    assert clear.tolist() == [[[10, 20, 30], [255, 255, 255]]]
    quantised = Image.new("RGBA", (4, 4), (0, 0, 0, 0)).quantize(4)
    assert (pixels(quantised) == 255).all()


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_a_transparent_grey_is_white(depth):
    """Guards tRNS of grey images: PIL scales pixels of 2 and 4 bits but not this value, and
    compares 16 bits with 8."""
    top, key = 2**depth - 1, (2**depth - 1) // 3
    values = [key, top, 0, min(key + 1, top), key, top, 0, 0]
    row = sum(v << depth * (7 - i) for i, v in enumerate(values)).to_bytes(depth, "big")
    trns = chunk(b"tRNS", struct.pack(">H", key))
    loaded = pixels(png(8, 1, b"\0" + row, depth=depth, colour=0, before=trns))
    shown = [255 if v == key else v >> 8 if depth == 16 else v * 255 // top for v in values]
    assert loaded[0, :, 0].tolist() == shown


@pytest.mark.parametrize("depth", [8, 16])
def test_a_transparent_colour_is_white(depth):
    """Guards tRNS of RGB images, whose pixels PIL cuts to 8 bits, and it not."""
    key, other = (1, 2, 3), (1, 2, 4)
    scale = 256 if depth == 16 else 1
    layout = ">HHH" if depth == 16 else ">BBB"
    row = b"".join(struct.pack(layout, *(v * scale for v in c)) for c in (key, other, key))
    trns = chunk(b"tRNS", struct.pack(">HHH", *(v * scale for v in key)))
    loaded = pixels(png(3, 1, b"\0" + row, depth=depth, before=trns))
    assert loaded.tolist() == [[[255, 255, 255], [1, 2, 4], [255, 255, 255]]]


def test_an_animation_gives_its_first_frame():
    """Guards against a later frame, and against a clear ground that is not white."""
    frame = Image.new("P", (6, 4), 0)
    frame.putpalette([9, 9, 9, 250, 250, 0])
    frame.putpixel((1, 2), 1)
    later = Image.new("P", (6, 4), 1)
    later.putpalette([9, 9, 9, 250, 250, 0])
    expected = np.full((4, 6, 3), 255)
    expected[2, 1] = 250, 250, 0
    data = encoded(frame, "GIF", save_all=True, append_images=[later], transparency=0)
    assert np.array_equal(pixels(data), expected)
    for form in ("PNG", "WEBP"):
        options = {"save_all": True, "append_images": [photo().rotate(180)]}
        lossless = {"lossless": True} if form == "WEBP" else {}
        data = encoded(photo(), form, **options, **lossless)
        assert np.array_equal(pixels(data), np.asarray(photo()))


def test_gif_frame_smaller_than_its_canvas():
    """Guards against PIL's colour 0 around it, where browsers show what is below the picture."""
    image = Image.new("P", (2, 2), 1)
    image.putpalette([0, 200, 0, 255, 0, 0])
    data = bytearray(encoded(image, "GIF"))
    data[6:10] = bytes([4, 0, 4, 0])  # the canvas
    start = data.index(b",", 19)  # of the frame: its left, top, width, height
    data[start + 1 : start + 5] = bytes([1, 0, 1, 0])
    expected = np.full((4, 4, 3), 255)
    expected[1:3, 1:3] = 255, 0, 0
    for given in (bytes(data), Image.open(io.BytesIO(data))):
        assert np.array_equal(np.asarray(load_image(given)), expected)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV"])
def test_opaque_images_are_as_pil_converts_them(mode):
    """Guards against changing a pixel of an image without alpha, in every other mode of 8 bits."""
    image = photo().convert(mode)
    assert np.array_equal(pixels(image), np.asarray(image.convert("RGB")))


def test_colours_survive_cmyk_and_lab():
    """Guards against an inverted CMYK JPEG (Adobe stores them inverted), and LAB."""
    data = encoded(photo().convert("CMYK"), "JPEG", quality=95)
    assert np.abs(pixels(data).astype(int) - np.asarray(photo())).mean() < 6
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    lab = ImageCms.profileToProfile(photo(), *profiles, outputMode="LAB")
    assert np.abs(pixels(lab).astype(int) - np.asarray(photo())).mean() < 6


def test_16_bits_are_scaled():
    """Guards against PIL's clipping of 16-bit grey values at 255."""
    values = (np.arange(256, dtype=np.uint16) * 255 + 255).reshape(16, 16)
    ppm = b"P5 16 16 65535\n" + values.astype(">u2").tobytes()
    for data in (encoded(Image.fromarray(values), "PNG"), ppm):
        assert np.array_equal(pixels(data), grey(values >> 8))


def test_every_mode_of_wide_grey_gives_its_upper_byte():
    """Guards byte orders, and clipping instead of wrapping beyond 16 bits."""
    values = np.array([[0, 255, 256, 65_535]], np.uint16)
    for order in ("<", ">"):
        mode = {"<": "I;16", ">": "I;16B"}[order]
        image = Image.frombytes(mode, (4, 1), values.astype(f"{order}u2").tobytes())
        assert pixels(image)[0, :, 0].tolist() == [0, 0, 1, 255]
    wide = Image.fromarray(np.array([[-5, 70_000, 300, 65_535]], np.int32))
    assert pixels(wide)[0, :, 0].tolist() == [0, 255, 1, 255]
