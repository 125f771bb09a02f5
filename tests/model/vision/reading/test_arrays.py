"""Tests of arrays and tensors as images."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from model.errors import InputError
from model.vision.image import load_image
from tests.model.vision.images import photo

RGB = np.asarray(photo())  # [41, 61, 3]
GREY = np.ascontiguousarray(RGB[..., 0])
RGBA = np.dstack([RGB, GREY])
LA = np.dstack([GREY, RGB[..., 1]])


@pytest.mark.parametrize("pixels", [GREY, GREY[..., None], LA, RGB, RGBA], ids=lambda a: a.shape)
def test_arrays_equal_the_pil_image(pixels):
    """Guards each number of channels, first and last, of arrays and tensors."""
    squeezed = pixels[..., 0] if pixels.shape[2:] == (1,) else pixels
    expected = np.asarray(load_image(Image.fromarray(squeezed)))
    first = np.moveaxis(pixels, -1, 0) if pixels.ndim == 3 else pixels
    for array in (pixels, first, pixels[::-1][::-1], np.asfortranarray(pixels)):
        for given in (array, torch.from_numpy(array.copy())):
            assert np.array_equal(np.asarray(load_image(given)), expected)


def test_values_of_other_dtypes():
    """Guards the scale of each dtype, and rounding: floats of 0 to 1 must give every byte back."""
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    floats = levels / 255
    for given in (
        floats,
        floats.astype(np.float32),
        torch.from_numpy(floats).float().requires_grad_(),
        (levels.clip(1) - 0.25) / 255 * (levels > 0),
        levels.astype(np.uint16) * 256 + 255,
        (levels.astype(np.uint16) * 256).astype(">u2"),
    ):
        assert np.array_equal(np.asarray(load_image(given))[..., 0], levels)
    mask = levels > 9
    assert np.array_equal(np.asarray(load_image(mask))[..., 0], mask * 255)
    halves = torch.from_numpy(floats).bfloat16()
    assert np.abs(np.asarray(load_image(halves))[..., 0] - levels.astype(int)).max() <= 1


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 50, 3), np.uint8), "[3, 50, 3] may be [height, width, channels] or"),
        (np.zeros(100, np.uint8), "shape [100] is no image; it must be [height, width]"),
        (np.zeros((1, 3, 50, 50), np.uint8), "one image at a time"),
        (torch.zeros(3, 50, 50, device="meta"), "the tensor has no plain array of pixels"),
        (torch.zeros(50, 50).to_sparse(), "the tensor has no plain array of pixels"),
        (torch.zeros(1, 1).bfloat16().expand(30_000, 30_000), "the array is too large"),
        (torch.zeros(8, 50, 50), "shape [8, 50, 50] is no image"),
        (np.zeros((0, 5), np.uint8), "the array is empty: 5 x 0 pixels"),
        (np.zeros((50, 50), np.int64), "an array of int64 is no image; pixels must be uint8"),
        (np.zeros((50, 50), complex), "an array of complex128 is no image"),
        (np.full((50, 50), 200.0), "these lie between 200 and 200 (convert pixels of 0 to 255"),
        (torch.full((3, 50, 50), -0.5), "these lie between -0.5 and -0.5"),
        (np.full((50, 50), np.nan), "these lie between nan and nan"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_arrays_get_one_line(array, message):
    """Guards against guessing the order of axes or the scale of values."""
    with pytest.raises(InputError, match=re.escape(message)):
        load_image(array)
