"""Images to tensors: a global view and a grid of crops per image, as the released model sees them.

Geometry is plain integers (`crop_layout`); pixels follow it (`preprocess`). Nothing here knows of
tokens' ids: `model.text.prompt` lays them out. PIL is imported where it is used, so that `Views`
can be made by hand on machines without it.

The algorithm is that of the model's published processors (spelled out at each step below), with
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

# TIFF is left out: its decoder prints to stderr and accepts some truncated files.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "PPM")
MAX_SIDE = 65_535  # pixels; what JPEG can hold
MAX_PIXELS = 178_956_970  # where PIL, too, stops trusting a file
MAX_CROPS = 128  # ordinary images have at most 95 (3024 x 32)

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class CropLayout:
    """How an image is cut. Sizes are (width, height) and boxes (left, top, right, bottom), pixels.

    `padded` is the image with black to its right or below, `size` that after shrinking. Crops are
    squares of side `window` (0: none) out of the image resized to `canvas`, row by row; `newlines`
    says for each whether its row of crops ends with it and another one follows.
    """

    padded: tuple[int, int]
    size: tuple[int, int]
    window: int
    canvas: tuple[int, int]
    boxes: tuple[tuple[int, int, int, int], ...]
    newlines: tuple[bool, ...]


@dataclass(frozen=True)
class Views:
    """One image as the vision tower takes it: fp32, normalised, channels first.

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
    """The image in a file, in a file's bytes, or in a PIL image, as 8-bit RGB.

    As in the reference, EXIF orientation is not applied and transparency is dropped, not blended;
    of an animation the first frame is taken; of 16-bit values the upper byte. Raises InputError for
    a file that is missing, no image, truncated or too large; too large is seen before decoding.
    """
    from PIL import Image

    if isinstance(source, Image.Image):
        return _to_rgb(source, "the image")
    name, data = ("the image", source) if isinstance(source, bytes) else _read(source)
    with warnings.catch_warnings():  # PIL warns of sizes that are within our limit
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        except Image.DecompressionBombError:
            raise InputError(_too_large(name)) from None
        except (OSError, SyntaxError, ValueError):
            raise InputError(
                f"{name} is not an image: want {', '.join(FORMATS)} of at least 1 x 1 pixels"
            ) from None
    with image:
        return _to_rgb(image, name)


def crop_layout(width: int, height: int, config: VisionConfig) -> CropLayout:
    """Where the crops of a width x height image (pixels, both > 0) lie."""
    padded = _padded(width, height)
    size = _shrunk(*padded, config.max_image_size)
    window = _window(*size, config)
    if window == 0:
        return CropLayout(padded, size, 0, size, (), ())
    canvas = _snapped(size[0], window), _snapped(size[1], window)
    # A canvas side below the window still gives one crop, which reaches beyond it.
    lefts, tops = (range(0, max(side - window, 0) + 1, window) for side in canvas)
    boxes = tuple((x, y, x + window, y + window) for y in tops for x in lefts)
    newlines = tuple(x == lefts[-1] and y != tops[-1] for y in tops for x in lefts)
    return CropLayout(padded, size, window, canvas, boxes, newlines)


def preprocess(image: Image.Image, config: VisionConfig) -> Views:
    """The views of an RGB image from `load_image`.

    PIL pads, shrinks and cuts; then, in the reference's order, values are scaled to 0..1,
    normalised, and only then resized (bilinear with antialias, aspect ratio not kept). Raises
    InputError for an image so elongated that it would give more than MAX_CROPS crops.
    """
    from PIL.Image import Resampling

    layout = crop_layout(*image.size, config)
    if len(layout.boxes) > MAX_CROPS:
        raise InputError(
            f"an image of {image.width} x {image.height} pixels is too elongated: "
            f"it would be cut into {len(layout.boxes)} crops, at most {MAX_CROPS} are taken"
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
        raise InputError(f"{name} has float pixels of unknown range: want 8 or 16 bits")
    try:
        if image.mode.startswith("I"):  # PIL would clip 16 bits, not scale them
            image = _upper_byte(image)
        elif image.mode == "P":
            image = image.convert("RGBA")  # straight to RGB, PIL warns of a transparent palette
        return image.convert("RGB")
    except Exception:  # each decoder has its own; all mean that the file does not hold its pixels
        raise InputError(f"{name} is truncated or damaged") from None


def _upper_byte(image: Image.Image) -> Image.Image:
    from PIL import Image

    return Image.fromarray((np.asarray(image).clip(0, 65_535) >> 8).astype(np.uint8))


def _too_large(name: str) -> str:
    return (
        f"{name} is too large: at most {MAX_SIDE:,} pixels a side and {MAX_PIXELS:,} in all "
        "(thin images count as the square that they are padded to)"
    )


def _padded(width: int, height: int) -> tuple[int, int]:
    """Slivers are padded to a square."""
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
    """The multiple of `window` that `side` is resized to: up from a remainder of over a fifth."""
    ratio = side / window
    if ratio < 1:
        return side
    return window * (floor(ratio) + (ratio - side // window > 0.2))


def _to_tensor(images: list[Image.Image], side: int) -> torch.Tensor:
    """n RGB images of one size -> fp32 [n, 3, side, side]."""
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
