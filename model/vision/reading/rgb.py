"""A PIL image of any mode as upright 8-bit RGB: orientation, transparency and colour modes."""

from functools import reduce
from typing import TYPE_CHECKING

from model.errors import InputError
from model.vision.reading.source import damaged

if TYPE_CHECKING:
    from PIL import Image

ORIENTATION = 0x0112  # EXIF's tag
LEVELS_16 = range(2**16)


def to_rgb(image: "Image.Image", name: str) -> "Image.Image":
    """A new RGB image without metadata: upright by its EXIF data, transparent parts over white.

    Grey of more than 8 bits gives its upper byte of 16; values beyond 65,535 are clipped. Other
    modes (CMYK, YCbCr, LAB, HSV, 1) are converted by PIL. Raises InputError for float pixels, and
    for an image that cannot be decoded.
    """
    if image.mode == "F":
        raise InputError(
            f"{name} has float pixels, whose range is unknown; convert it to 8 or 16 bits"
        )
    try:
        key = _transparent_colour(image)
        image.load()
        rgb = _upright(_white_around_frame(image, _over_white(image, key)), _orientation(image))
    except Exception as error:  # every decoder raises its own
        raise damaged(name, error) from None
    rgb.info.clear()  # else an orientation could be applied again
    return rgb


def _transparent_colour(image: "Image.Image") -> tuple[int, ...] | None:
    """The colour that a grey or RGB image declares transparent, in the units of its pixels.

    PIL gives it in the units of the file, and scales pixels of 2, 4 and 16 bits to 8 bits.
    """
    colour = image.info.get("transparency")
    if colour is None or image.mode not in ("1", "L", "RGB", "I", "I;16"):
        return None
    values = colour if isinstance(colour, tuple) else (colour,)
    tiles = getattr(image, "tile", None)  # none left once an image is loaded
    layout = str(tiles[0][3]) if tiles else ""
    if "L;2" in layout:
        return tuple(value * 85 for value in values)
    if "L;4" in layout:
        return tuple(value * 17 for value in values)
    if "RGB;16" in layout:
        return tuple(value >> 8 for value in values)
    return values


def _over_white(image: "Image.Image", key: tuple[int, ...] | None) -> "Image.Image":
    """The image as RGB, with its transparent parts over white."""
    from PIL import Image

    alpha = None
    if image.mode.startswith("I"):  # PIL would clip 16 bits, not scale them
        wide = image.convert("I")
        image = wide.point([value >> 8 for value in LEVELS_16], "L")
        if key:
            alpha = wide.point([255 * (value != key[0]) for value in LEVELS_16], "L")
    elif key:
        image = image.convert("L") if image.mode == "1" else image
        alpha = _opaque_where_not(image, key)
    elif image.mode in ("P", "PA"):
        image = alpha = image.convert("RGBA")
    elif image.mode == "La":
        image = alpha = image.convert("LA")
    elif image.mode in ("LA", "RGBA", "RGBa"):
        alpha = image
    if alpha is None:
        return image.convert("RGB")
    paper = Image.new("RGB", image.size, "white")
    paper.paste(image, mask=alpha)
    return paper


def _white_around_frame(image: "Image.Image", rgb: "Image.Image") -> "Image.Image":
    """`rgb`, white where a GIF's first frame does not cover its canvas: PIL fills with colour 0."""
    from PIL import Image

    frame = getattr(image, "dispose_extent", None)
    if image.format != "GIF" or image.tell() != 0 or frame in (None, (0, 0, *image.size)):
        return rgb
    paper = Image.new("RGB", image.size, "white")
    paper.paste(rgb.crop(frame), frame)
    return paper


def _opaque_where_not(image: "Image.Image", key: tuple[int, ...]) -> "Image.Image":
    """An alpha channel: 0 for the pixels of one colour."""
    from PIL import ImageChops

    differs = [
        band.point([255 * (value != k) for value in range(256)])
        for band, k in zip(image.split(), key, strict=True)
    ]
    return reduce(ImageChops.lighter, differs)


def _orientation(image: "Image.Image") -> int:
    """EXIF's orientation, 1 to 8; 1 if there is none, or if the EXIF data are malformed."""
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # PIL's parser raises errors of many types
        return 1


def _upright(image: "Image.Image", orientation: int) -> "Image.Image":
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    return image.transpose(turns[orientation]) if orientation in turns else image
