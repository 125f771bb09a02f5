"""Tests of pixels on their way to the tower, as bytes, against the reference's order in fp32."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from model.config import TINY, VisionConfig, preset
from model.impls import impl_per_op
from model.vision.image import crop_layout, load_image, preprocess
from model.vision.pixels import MEAN, STD, View, byte_values, normalised
from model.vision.tower import VisionTower
from tests.model.vision.images import PHOTOS, encoded, photo
from tests.support.errors import max_error

# The 10B's views, in a tower of hardly any weights.
VISION = replace(preset("step3-vl-10b").vision, width=8, layers=1, heads=1, mlp_width=8)
CPU = torch.device("cpu")


def tower(dtype: torch.dtype = torch.float32, device: str = "cpu") -> VisionTower:
    tower = VisionTower(VISION, 8, impl=impl_per_op(None), device=device, dtype=dtype)
    for weight in tower.parameters():
        weight.zero_()
    return tower


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def reference(image: Image.Image, config: VisionConfig) -> list[Tensor]:
    """An image's views, crops first, as the published processor computes them: fp32 from /255 on,
    all on the host."""
    layout = crop_layout(*image.size, config)
    bilinear = Image.Resampling.BILINEAR
    image = image.crop((0, 0, *layout.padded)).resize(layout.size, bilinear)
    canvas = image.resize(layout.canvas, bilinear)
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    views = []
    for view, side in [(canvas.crop(box), config.crop_size) for box in layout.boxes] + [
        (image, config.image_size)
    ]:
        pixels = torch.from_numpy(np.array(view)).permute(2, 0, 1).contiguous()
        pixels = (pixels.float().div(255) - mean) / std
        if pixels.shape[1:] != (side, side):
            pixels = F.interpolate(
                pixels[None], (side, side), mode="bilinear", align_corners=False, antialias=True
            )[0]
        views.append(pixels)
    return views


def rows_of(view: Tensor) -> Tensor:
    """Patches of [3, height, width] as rows of 588 values."""
    return F.unfold(view[None], 14, stride=14)[0].T


@pytest.mark.parametrize(
    "size",
    [
        (1, 1),
        (1, 40),  # padded to a square
        (40, 1),
        (728, 728),  # no resize at all
        (500, 728),  # one side fits
        (300, 600),  # portrait: crops of 300 are resized
        (1000, 300),  # crops reach below the image
        (1280, 720),
        (3000, 200),  # panorama: 15 crops of 200
        (3100, 3030),  # shrunk, 36 crops
    ],
    ids=lambda size: f"{size[0]}x{size[1]}",
)
def test_patches_have_the_bits_of_the_reference(size: tuple[int, int]):
    """Guards the order of views, channels and steps, and each rounding: in fp32 the tower's input
    has the bits of a pipeline that is fp32 on the host; in bf16 those of its values, rounded."""
    image = noise(*size)
    views = preprocess(image, VISION)
    expected = torch.cat([rows_of(view) for view in reference(image, VISION)])
    for dtype in (torch.float32, torch.bfloat16):
        vision = tower(dtype)
        patches = vision.patches(views.all)
        assert patches.dtype == dtype and patches.shape == (len(expected), 592)
        assert torch.equal(patches[:, :588], expected.to(dtype))
        assert not patches[:, 588:].any()


ODD = {
    "photo": lambda: PHOTOS / "motorcycle_left.png",
    "grey": lambda: PHOTOS / "page.png",
    "CMYK": lambda: encoded(photo(61, 30).convert("CMYK"), "JPEG"),
    "palette": lambda: encoded(photo(61, 30).convert("P"), "GIF"),
    "animation": lambda: encoded(
        photo(), "GIF", save_all=True, append_images=[photo(), noise(9, 9)]
    ),
    "transparent": lambda: encoded(photo().convert("RGBA"), "PNG"),
    "16 bits": lambda: np.arange(0, 65_536, 16, np.uint16).reshape(32, 128),
}


@pytest.mark.parametrize("kind", ODD)
def test_photos_have_the_bits_of_the_reference(kind: str):
    """Guards the whole path from a file or array of any kind."""
    image, vision = load_image(ODD[kind]()), tower()
    expected = torch.cat([rows_of(view) for view in reference(image, VISION)])
    assert torch.equal(vision.patches(preprocess(image, VISION).all)[:, :588], expected)


@pytest.mark.parametrize("size", [(20, 20), (1280, 720), (4000, 3000), (3024, 3024)])
def test_only_bytes_leave_the_host(size: tuple[int, int]):
    """Guards memory and transfers: an image is the bytes of its pixels, and of its crops before
    they are resized."""
    layout = crop_layout(*size, VISION)
    views = preprocess(Image.new("RGB", size), VISION)
    assert views.image.dtype == views.crops.dtype == torch.uint8
    assert views.image.shape == (*layout.size[::-1], 3)
    assert views.crops.shape == (len(layout.boxes), layout.window, layout.window, 3)
    assert views.image.nbytes + views.crops.nbytes <= 55e6


def test_equal_pixels_have_equal_digests():
    """Guards the key of every cache: pixels and size count, the kind of the file does not."""
    image = noise(60, 40)
    digest = preprocess(image, VISION).digest
    assert preprocess(image.copy(), VISION).digest == digest != b""
    other = image.copy()
    other.putpixel((59, 39), tuple(255 - value for value in image.getpixel((59, 39))))
    turned = Image.frombytes("RGB", (40, 60), image.tobytes())
    digests = {preprocess(each, VISION).digest for each in (image, other, turned)}
    assert len(digests) == 3


def test_byte_values_against_numpy():
    """Guards the table that every byte is looked up in, to the bit."""
    values = np.arange(256, dtype=np.float32) / np.float32(255)
    mean, std = (np.array(three, np.float32)[:, None] for three in (MEAN, STD))
    assert np.array_equal(byte_values().numpy(), (values - mean) / std)


def test_pixels_that_are_no_bytes_are_refused():
    """Guards against normalised pixels that would be normalised again, and channels that come
    first."""
    for pixels, message in [
        (torch.zeros(28, 28, 3), "must be uint8 [height, width, 3], not torch.float32 [28, 28, 3]"),
        (torch.zeros(3, 28, 28, dtype=torch.uint8), "not torch.uint8 [3, 28, 28]"),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            View(pixels, 28)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [(728, 728), (1280, 720), (3024, 3024), (60, 40)])
def test_pixels_on_a_gpu(size: tuple[int, int]):
    """Guards bits of normalised pixels, and the error of resized ones, which are within fp32
    rounding of those of a CPU."""
    image, cuda = noise(*size), torch.device("cuda")
    for view in preprocess(image, VISION).all:
        assert torch.equal(normalised(view.pixels.cuda()).cpu(), normalised(view.pixels))
        ours, expected = view.on(cuda), view.on(CPU)
        assert ours.is_cuda and ours.dtype == expected.dtype
        assert max_error(ours.cpu().float(), expected.float()) < 2e-5


def test_tiny_takes_every_size():
    """Guards the sides of views, which are those of the model's own config."""
    views = preprocess(noise(1000, 300), TINY.vision).all
    assert [view.side for view in views] == [112, 112, 168]
    assert [tuple(view.on(CPU).shape) for view in views] == [
        (3, side, side) for side in (112, 112, 168)
    ]
