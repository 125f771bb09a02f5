"""Image preprocessing: a global view and a grid of crops per image, as the released model has them.

`crop_layout` computes the geometry in integers, `preprocess` the pixels. Token ids are laid out in
`model.text.prompt`. PIL is imported where it is used: `Views` can be built without it.

The algorithm is that of the model's published processors (described at each step below), with
their rule `long side <= 728` for images that need no crops.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from math import floor
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F

from model.config import VisionConfig
from model.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

    ImageSource: TypeAlias = str | Path | bytes | Image.Image

# Without TIFF, whose decoder prints to stderr and accepts some truncated files.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "PPM")
MAX_SIDE = 65_535  # pixels, JPEG's limit
MAX_PIXELS = 178_956_970  # PIL's limit for a trusted file
MAX_CROPS = 128  # ordinary images have at most 95 (3024 x 32)

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class CropLayout:
    """How an image is cut. Sizes are (width, height), boxes (left, top, right, bottom), in pixels.

    `padded` is the size with black added to the right or below, `size` the size after shrinking.
    Crops are squares of side `window` (0: none), cut row by row from the image resized to `canvas`;
    `newlines` says for each crop whether it ends its row and another row follows.
    """

    padded: tuple[int, int]
    size: tuple[int, int]
    window: int
    canvas: tuple[int, int]
    boxes: tuple[tuple[int, int, int, int], ...]
    newlines: tuple[bool, ...]


@dataclass(frozen=True)
class Views:
    """One image as input of the vision tower: fp32, normalised, channels first.

    `image` [3, S, S] is the global view, `crops` [n, 3, c, c] the crops (n may be 0), with S and c
    of VisionConfig's `image_size` and `crop_size`; `newlines` (n of them) as in CropLayout.
    """

    image: torch.Tensor
    crops: torch.Tensor
    newlines: tuple[bool, ...]

    @property
    def all(self) -> list[torch.Tensor]:
        """The crops, then the global view: the order of an image's embeddings."""
        return [*self.crops, self.image]


def load_image(source: ImageSource) -> Image.Image:
    """The image of a file, of a file's bytes, or of a PIL image, as 8-bit RGB.

    As in the reference, EXIF orientation is not applied, transparency is dropped and not blended,
    an animation gives its first frame, and 16-bit values give their upper byte. Raises InputError
    for a file that is missing, no image, truncated or too large (checked before decoding).
    """
    from PIL import Image

    if isinstance(source, Image.Image):
        return _to_rgb(source, "the image")
    name, data = ("the image", source) if isinstance(source, bytes) else _read(source)
    with warnings.catch_warnings():  # PIL warns about sizes within our limit
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        except Image.DecompressionBombError:
            raise InputError(_too_large(name)) from None
        except (OSError, SyntaxError, ValueError):
            raise InputError(
                f"{name} is not an image; it must be one of {', '.join(FORMATS)}, of at least"
                " 1 x 1 pixels"
            ) from None
    with image:
        return _to_rgb(image, name)


def crop_layout(width: int, height: int, config: VisionConfig) -> CropLayout:
    """The crop boxes of a width x height image (pixels, both > 0)."""
    padded = _padded(width, height)
    size = _shrunk(*padded, config.max_image_size)
    window = _window(*size, config)
    if window == 0:
        return CropLayout(padded, size, 0, size, (), ())
    canvas = _snapped(size[0], window), _snapped(size[1], window)
    # A canvas side below the window still gives one crop, which extends beyond the canvas.
    lefts, tops = (range(0, max(side - window, 0) + 1, window) for side in canvas)
    boxes = tuple((x, y, x + window, y + window) for y in tops for x in lefts)
    newlines = tuple(x == lefts[-1] and y != tops[-1] for y in tops for x in lefts)
    return CropLayout(padded, size, window, canvas, boxes, newlines)


def preprocess(image: Image.Image, config: VisionConfig) -> Views:
    """The views of an RGB image from `load_image`.

    PIL pads, shrinks and cuts. Then, in the reference's order, values are scaled to 0..1,
    normalised, and last resized (bilinear with antialias, without keeping the aspect ratio). Raises
    InputError for an image so elongated that it would have more than MAX_CROPS crops.
    """
    from PIL.Image import Resampling

    layout = crop_layout(*image.size, config)
    if len(layout.boxes) > MAX_CROPS:
        raise InputError(
            f"an image of {image.width} x {image.height} pixels is too elongated: "
            f"it would be cut into {len(layout.boxes)} crops, and at most {MAX_CROPS} are allowed"
        )
    if layout.padded != image.size:
        image = image.crop((0, 0, *layout.padded))  # PIL fills with black beyond the image
    image = image.resize(layout.size, Resampling.BILINEAR)
    canvas = image
    if layout.canvas != layout.size:
        canvas = image.resize(layout.canvas, Resampling.BILINEAR)
    crops = [canvas.crop(box) for box in layout.boxes]
    return Views(
        image=_to_tensor([image], config.image_size)[0],
        crops=_to_tensor(crops, config.crop_size),
        newlines=layout.newlines,
    )


def _read(path: str | Path) -> tuple[str, bytes]:
    try:
        return str(path), Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"cannot read image {path}: {error.strerror}") from None
    except ValueError:  # a null byte in the name
        raise InputError(f"cannot read image {str(path)!r}: no such file") from None


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if 0 in image.size:
        raise InputError(f"{name} is empty: {image.width} x {image.height} pixels")
    width, height = _padded(*image.size)
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        raise InputError(_too_large(name))
    if image.mode == "F":
        raise InputError(
            f"{name} has float pixels, whose range is unknown; convert it to 8 or 16 bits"
        )
    try:
        if image.mode.startswith("I"):  # PIL would clip 16 bits, not scale them
            image = _upper_byte(image)
        elif image.mode == "P":
            image = image.convert("RGBA")  # PIL warns if a transparent palette goes to RGB directly
        return image.convert("RGB")
    except Exception:  # every decoder raises its own; each means that pixels are missing or damaged
        raise InputError(f"{name} is truncated or damaged") from None


def _upper_byte(image: Image.Image) -> Image.Image:
    from PIL import Image

    return Image.fromarray((np.asarray(image).clip(0, 65_535) >> 8).astype(np.uint8))


def _too_large(name: str) -> str:
    return (
        f"{name} is too large: it may have at most {MAX_SIDE:,} pixels a side and {MAX_PIXELS:,} "
        "in all (a thin image counts as the square to which it is padded)"
    )


def _padded(width: int, height: int) -> tuple[int, int]:
    """The size after padding: very thin images are padded to a square."""
    if min(width, height) < 32 and (width / height > 4 or width / height < 1 / 4):
        return (max(width, height),) * 2
    return width, height


def _shrunk(width: int, height: int, limit: int) -> tuple[int, int]:
    if max(width, height) <= limit:
        return width, height
    scale = limit / max(width, height)
    return int(width * scale), int(height * scale)


def _window(width: int, height: int, config: VisionConfig) -> int:
    """Side of the square crops, 0 for none."""
    short, long = sorted((width, height))
    if long <= config.uncropped_side:
        return short if long / short > 1.5 else 0
    return min(short, config.crop_window) if long / short > 4 else config.crop_window


def _snapped(side: int, window: int) -> int:
    """`side` rounded to a multiple of `window`, up if the remainder is over a fifth of it; a side
    shorter than `window` stays."""
    ratio = side / window
    if ratio < 1:
        return side
    return window * (floor(ratio) + (ratio - side // window > 0.2))


def _to_tensor(images: list[Image.Image], side: int) -> torch.Tensor:
    """n RGB images of equal size -> fp32 [n, 3, side, side]."""
    if not images:
        return torch.empty(0, 3, side, side)
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    pixels = pixels.permute(0, 3, 1, 2).contiguous().float().div(255)
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    pixels = (pixels - mean) / std
    if pixels.shape[2:] == (side, side):
        return pixels
    return F.interpolate(
        pixels, size=(side, side), mode="bilinear", align_corners=False, antialias=True
    )
