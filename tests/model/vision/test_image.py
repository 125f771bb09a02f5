"""Tests of crop geometry and pixels against published test vectors, transformers'
planner of the same algorithm, and PIL's resampling of float images."""

import importlib
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from PIL import Image

from model.config import preset
from model.errors import InputError
from model.text.prompt import image_ids
from model.vision.image import crop_layout, load_image, preprocess
from model.vision.pixels import MEAN, STD, normalised
from tests.model.vision.images import PHOTOS
from tests.support.errors import max_error

STEP3, TINY = preset("step3-vl-10b"), preset("tiny")
# PIL's coefficients are fp64, torch's fp32: a coordinate near 1000 is off by up to 6e-5 of a pixel,
# times the contrast between neighbours (up to 3.8). One step of 8 bits would be 1.4e-2.
TOLERANCE = 2e-4

# width, height: size after padding and shrinking, window, canvas, crops per row and column, tokens
VECTORS = {
    (640, 480): ((640, 480), 0, None, (0, 0), 171),
    (728, 728): ((728, 728), 0, None, (0, 0), 171),
    (729, 729): ((729, 729), 504, (1008, 1008), (2, 2), 504),
    (728, 485): ((728, 485), 485, (970, 485), (2, 1), 337),
    (728, 486): ((728, 486), 0, None, (0, 0), 171),
    (300, 600): ((300, 600), 300, (300, 600), (1, 2), 338),
    (600, 300): ((600, 300), 300, (600, 300), (2, 1), 337),
    (605, 900): ((605, 900), 504, (1008, 1008), (2, 2), 504),
    (1000, 300): ((1000, 300), 504, (1008, 300), (2, 1), 337),
    (1024, 768): ((1024, 768), 504, (1008, 1008), (2, 2), 504),
    (1210, 1210): ((1210, 1210), 504, (1512, 1512), (3, 3), 920),
    (1280, 720): ((1280, 720), 504, (1512, 1008), (3, 2), 670),
    (1920, 1080): ((1920, 1080), 504, (2016, 1008), (4, 2), 836),
    (1080, 1920): ((1080, 1920), 504, (1008, 2016), (2, 4), 838),
    (2048, 2048): ((2048, 2048), 504, (2016, 2016), (4, 4), 1502),
    (3024, 100): ((3024, 100), 100, (3100, 100), (31, 1), 2744),
    (4000, 3000): ((3024, 2268), 504, (3024, 2520), (6, 5), 2665),
    (4000, 20): ((3024, 3024), 504, (3024, 3024), (6, 6), 3164),
    (31, 200): ((200, 200), 0, None, (0, 0), 171),
    (10, 40): ((10, 40), 10, (10, 40), (1, 4), 506),
}
sides = st.integers(1, 5000)


@pytest.mark.parametrize("size", VECTORS, ids=lambda size: f"{size[0]}x{size[1]}")
def test_published_vectors(size):
    """Guards every branch and boundary of the geometry, and the token count that follows."""
    shrunk, window, canvas, (across, down), tokens = VECTORS[size]
    layout = crop_layout(*size, STEP3.vision)
    assert (layout.size, layout.window, len(layout.boxes)) == (shrunk, window, across * down)
    assert len({x for x, *_ in layout.boxes}) == across
    assert canvas is None or layout.canvas == canvas
    assert sum(layout.newlines) == max(down - 1, 0)
    assert len(image_ids(layout.newlines, STEP3)) == tokens


@given(sides, sides)
@example(3024, 32)
def test_crops_tile_the_canvas_row_by_row(width, height):
    """Guards against gaps, overlaps, a wrong order of crops, and newlines not between rows."""
    layout = crop_layout(width, height, STEP3.vision)
    window, boxes = layout.window, layout.boxes
    assert len(layout.newlines) == len(boxes)
    if not window:
        assert boxes == ()
        return
    columns, rows = (max(side, window) // window for side in layout.canvas)
    grid = [(x * window, y * window) for y in range(rows) for x in range(columns)]
    assert boxes == tuple((x, y, x + window, y + window) for x, y in grid)
    assert all(side < window or side % window == 0 for side in layout.canvas)
    ends = [i for i, newline in enumerate(layout.newlines) if newline]
    assert ends == [row * columns - 1 for row in range(1, rows)]
    tokens = 83 * len(boxes) + 171 + rows - 1
    assert len(image_ids(layout.newlines, STEP3)) == tokens


@pytest.fixture(scope="module")
def transformers_processor():
    # Imported by module: without torchvision the package hides the class, although only its
    # resizing needs torchvision. Older releases have no such module.
    module = pytest.importorskip("transformers.models.step3p7.image_processing_step3p7")
    return importlib.import_module(module.__name__).Step3p7ImageProcessor()


@pytest.mark.judge
def test_geometry_equals_transformers(transformers_processor):
    """Guards the algorithm as a whole against an independent reading of it."""

    @given(sides, sides)
    @example(2000, 500)  # exactly 4:1
    @example(600, 400)  # exactly 3:2
    def check(width, height):
        layout = crop_layout(width, height, STEP3.vision)
        # If a remainder is exactly a fifth, rounding decides in the reference, but not there.
        assume(all(5 * (side % (layout.window or side)) != layout.window for side in layout.size))
        columns = len({x for x, *_ in layout.boxes})
        rows = len({y for _, y, *_ in layout.boxes})
        padded = layout.padded != (width, height)
        ours = (layout.size, layout.canvas, layout.window, columns, rows, padded)
        assert ours == transformers_processor._plan_patches(width, height, 728, 504)

    check()


def seen(image, config):
    """An image's global view and crops [3, side, side], normalised, as the tower sees them."""
    views = [view.on(torch.device("cpu")) for view in preprocess(image, config).all]
    *crops, whole = [normalised(view) if view.dtype == torch.uint8 else view for view in views]
    return whole, crops


def resized_in_float(image, side):
    """Normalise, then resize each float channel with PIL."""
    pixels = (np.asarray(image, np.float64) / 255 - MEAN) / STD
    channels = [Image.fromarray(pixels[..., c].astype(np.float32)) for c in range(3)]
    size = (side, side)
    return torch.tensor(
        np.stack([np.asarray(c.resize(size, Image.Resampling.BILINEAR)) for c in channels])
    )


@pytest.mark.parametrize(
    ("photo", "crops"), [("motorcycle_left.png", 2), ("coffee.png", 0), ("page.png", 2)]
)
def test_pixels_of_photos_equal_pil(photo, crops):
    """Guards the pipeline's order (normalise, then resize, without rounding to 8 bits between), the
    antialiasing, the order of channels, and which image each view is cut from."""
    image = load_image(PHOTOS / photo)
    layout = crop_layout(*image.size, STEP3.vision)
    whole, cut = seen(image, STEP3.vision)
    assert whole.shape == (3, 728, 728) and len(cut) == crops
    canvas = np.asarray(image.resize(layout.canvas, Image.Resampling.BILINEAR))
    canvas = np.pad(canvas, ((0, 504), (0, 504), (0, 0)))  # black beyond the image
    pairs = [(whole, resized_in_float(image, 728))]
    for crop, (x, y, right, bottom) in zip(cut, layout.boxes, strict=True):
        window = canvas[y:bottom, x:right]
        pairs.append((crop, resized_in_float(window, 504)))
    for view, expected in pairs:
        assert max_error(view, expected) < TOLERANCE


def test_sliver_is_padded_with_black_below():
    """Guards the padding of slivers: to a square, image at the top left, black elsewhere."""
    white = Image.new("RGB", (200, 10), "white")
    view, _ = seen(white, STEP3.vision)
    black, bright = (((torch.tensor(v) - torch.tensor(MEAN)) / torch.tensor(STD)) for v in (0, 1))
    assert torch.allclose(view[:, :30].mean((1, 2)), bright, atol=1e-5)
    assert torch.allclose(view[:, 45:].mean((1, 2)), black, atol=1e-5)


def test_crop_beyond_the_canvas_is_black_there():
    """Guards crops of images lower than the window: they extend below the image, in black."""
    _, crops = seen(Image.new("RGB", (1000, 300), "white"), STEP3.vision)
    black = -torch.tensor(MEAN) / torch.tensor(STD)
    for crop in crops:
        assert torch.allclose(crop[:, 310:].mean((1, 2)), black, atol=1e-5)
        assert crop[:, :290].min() > 1.9


@pytest.mark.parametrize(
    ("given_size", "size", "canvas"),
    [((700, 500), (600, 428), (600, 450)), ((700, 350), (600, 300), (600, 300))],
)
def test_large_image_is_shrunk_before_it_is_cut(given_size, size, canvas):
    """Guards against crops from the original image; the reference cuts the shrunk one."""
    config = replace(TINY.vision, max_image_size=600, uncropped_side=200, crop_window=150)
    image = Image.effect_noise(given_size, 60).convert("RGB")
    layout = crop_layout(*image.size, config)
    assert (layout.size, layout.canvas) == (size, canvas)
    shrunk = image.resize(size, Image.Resampling.BILINEAR)
    cut = shrunk.resize(canvas, Image.Resampling.BILINEAR)
    whole, crops = seen(image, config)
    assert max_error(whole, resized_in_float(shrunk, 168)) < TOLERANCE
    for crop, box in zip(crops, layout.boxes, strict=True):
        assert max_error(crop, resized_in_float(cut.crop(box), 112)) < TOLERANCE


def test_too_many_crops_are_refused():
    """Guards memory: a long strip would be cut into thousands of full-size crops."""
    strip = Image.new("RGB", (12_000, 40))
    with pytest.raises(InputError, match=re.escape("12000 x 40 pixels is too elongated")):
        preprocess(strip, TINY.vision)
