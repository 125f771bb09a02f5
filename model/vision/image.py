"""Image preprocessing: a global view and a grid of crops per image, as the released model has them.

`load_image` reads an image, `crop_layout` computes the geometry in integers, `preprocess` the
pixels, as bytes; `model.vision.pixels` resizes them on the device. Token ids are laid out in
`model.text.prompt`. PIL is imported where it is used: `Views` can be built without it.

The algorithm is that of the model's published processors (described at each step), with their rule
`long side <= 728` for images that need no crops.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from math import floor
from typing import TYPE_CHECKING

import numpy as np
import torch

from model.config import VisionConfig
from model.errors import InputError
from model.vision.pixels import View
from model.vision.reading.limits import MAX_PIXELS, padded
from model.vision.reading.rgb import to_rgb
from model.vision.reading.source import open_image
from model.vision.reading.strict import strict_pil

if TYPE_CHECKING:
    from PIL import Image

    from model.vision.reading.source import ImageSource

MAX_CROPS = 128  # ordinary images have at most 95 (3024 x 32)


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
    """One image, cut, as PIL has it: uint8, channels last, before the last resize.

    `image` [H, W, 3] is the whole image, for the global view, `crops` [n, w, w, 3] the crops (n may
    be 0); `newlines` (n of them) as in CropLayout. `digest` is of `image`, from which the crops are
    made; b"": not known. `sides` are those of the global view and of crops once they are resized;
    None: they are squares and stay as they are.
    """

    image: torch.Tensor
    crops: torch.Tensor
    newlines: tuple[bool, ...]
    digest: bytes = b""
    sides: tuple[int, int] | None = None

    @property
    def all(self) -> list[View]:
        """The crops, then the global view: the order of an image's embeddings."""
        side, crop_side = self.sides or (self.image.shape[0], self.crops.shape[1])
        return [*(View(crop, crop_side) for crop in self.crops), View(self.image, side)]


def load_image(source: ImageSource, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image as a person sees it on white paper: upright, opaque, 8-bit RGB.

    `source` is one of

    - a path of a regular file, or a `data:image/...;base64,` URL;
    - a file's bytes, or a binary file object, read from its start if it can seek;
    - an array or tensor of pixels (`array_image`), whose channels are in the order RGB;
    - a PIL image, which is not modified.

    The orientation in EXIF data is applied, as transformers does, and transparency blended with
    white, as vLLM does. An animation gives its first frame (a PIL image its current one), 16-bit
    values their upper byte. Colour profiles and gamma are ignored. Files are PNG, JPEG, WEBP, GIF,
    BMP or PPM. Raises InputError for a source that is no image, truncated, or too large; sizes are
    checked before decoding (`model.vision.reading.limits`; `max_pixels` may only lower its limit).
    """
    with strict_pil():
        image, name = open_image(source, max_pixels)
        try:
            return to_rgb(image, name)
        finally:
            if image is not source:
                image.close()


def crop_layout(width: int, height: int, config: VisionConfig) -> CropLayout:
    """The crop boxes of a width x height image (pixels, both > 0)."""
    square = padded(width, height)
    size = _shrunk(*square, config.max_image_size)
    window = _window(*size, config)
    if window == 0:
        return CropLayout(square, size, 0, size, (), ())
    canvas = _snapped(size[0], window), _snapped(size[1], window)
    # A canvas side below the window still gives one crop, which extends beyond the canvas.
    lefts, tops = (range(0, max(side - window, 0) + 1, window) for side in canvas)
    boxes = tuple((x, y, x + window, y + window) for y in tops for x in lefts)
    newlines = tuple(x == lefts[-1] and y != tops[-1] for y in tops for x in lefts)
    return CropLayout(square, size, window, canvas, boxes, newlines)


def preprocess(image: Image.Image, config: VisionConfig) -> Views:
    """The views of an RGB image from `load_image`, up to 55 MB.

    PIL pads, shrinks and cuts. Normalising and the last resize, to the sides of VisionConfig, are
    left to the device. Raises InputError for an image so elongated that it would have more than
    MAX_CROPS crops.
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
    pixels = np.array(image)
    digest = sha256(str(image.size).encode() + b":")
    digest.update(pixels.data)  # all views are made from these
    sides = config.image_size, config.crop_size
    crops = torch.from_numpy(_crops(image, layout))
    return Views(torch.from_numpy(pixels), crops, layout.newlines, digest.digest()[:16], sides)


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


def _crops(image: Image.Image, layout: CropLayout) -> np.ndarray:
    """The crops of an image of size `layout.size`: uint8 [n, window, window, 3]."""
    from PIL.Image import Resampling

    if not layout.boxes:
        return np.empty((0, 0, 0, 3), np.uint8)
    if layout.canvas != layout.size:
        image = image.resize(layout.canvas, Resampling.BILINEAR)
    extent = layout.boxes[-1][2:]
    if extent != image.size:
        image = image.crop((0, 0, *extent))  # black beyond the image
    pixels = np.asarray(image)
    return np.stack([pixels[top:bottom, left:right] for left, top, right, bottom in layout.boxes])
