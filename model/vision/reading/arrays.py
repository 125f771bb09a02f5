"""Arrays and tensors of pixels as PIL images."""

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from model.errors import InputError
from model.vision.reading.limits import MAX_PIXELS, check_size, too_large

if TYPE_CHECKING:
    from PIL import Image

CHANNELS = (1, 2, 3, 4)  # grey, grey and alpha, RGB, RGBA


def array_image(array: np.ndarray | torch.Tensor) -> "Image.Image":
    """The PIL image (L, LA, RGB or RGBA) of an array [H, W], [H, W, C] or [C, H, W], C in CHANNELS.

    Pixels are uint8 (0 to 255), uint16 (their upper byte is taken, as of 16-bit files), bool, or
    floats from 0 to 1. Raises InputError for anything else, and for a shape that is both [H, W, C]
    and [C, H, W].
    """
    from PIL import Image

    if math.prod(array.shape) > max(CHANNELS) * MAX_PIXELS:  # before a copy in another dtype
        raise too_large("the array")
    if isinstance(array, torch.Tensor):
        try:
            array = array.detach().cpu()
            array = (array.float() if array.is_floating_point() else array).numpy()
        except (NotImplementedError, RuntimeError, TypeError) as error:  # sparse, meta, quantised
            raise InputError(f"the tensor has no plain array of pixels: {error}") from None
    array = _channels_last(array)
    check_size(array.shape[1], array.shape[0], "the array")
    pixels = np.ascontiguousarray(_bytes(array))
    return Image.fromarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels)


def _channels_last(array: np.ndarray) -> np.ndarray:
    if array.ndim == 2:
        return array
    shape = list(array.shape)
    last, first = (array.ndim == 3 and shape[i] in CHANNELS for i in (-1, 0))
    if last and first:
        raise InputError(
            f"an array of shape {shape} may be [height, width, channels] or [channels, height,"
            " width]; pass a PIL image"
        )
    if not last and not first:
        raise InputError(
            f"an array of shape {shape} is no image; it must be [height, width],"
            " [height, width, channels] or [channels, height, width] with 1 to 4 channels,"
            " one image at a time"
        )
    return array if last else np.moveaxis(array, 0, -1)


def _bytes(array: np.ndarray) -> np.ndarray:
    """The pixels as uint8."""
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * 255
    if array.dtype.type == np.uint16:  # of either byte order
        return (array >> 8).astype(np.uint8)
    if not np.issubdtype(array.dtype, np.floating):
        raise InputError(
            f"an array of {array.dtype} is no image; pixels must be uint8 (0 to 255), uint16 (0 to"
            " 65,535), bool or float (0 to 1)"
        )
    low, high = array.min(), array.max()
    if not 0 <= low <= high <= 1:  # also false for NaN
        raise InputError(
            f"float pixels must lie between 0 and 1; these lie between {low:.4g} and {high:.4g}"
            " (convert pixels of 0 to 255 to uint8)"
        )
    return (array * 255).round().astype(np.uint8)
