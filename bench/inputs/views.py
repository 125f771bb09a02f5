"""Arithmetic of the vision side: the views of an image, and the operations that they take.

Operations are two per multiply-add of the matrix products, with the projector's last two layers
folded into one, which is the minimum work.
"""

from collections.abc import Sequence

from bench.inputs.presets import BIG, vision_of
from kernels.projector import output_tokens
from kernels.runtime.arithmetic import cdiv
from kernels.runtime.grids import Grid, tokens_of
from model.config import Config, VisionConfig
from model.vision.image import crop_layout


def views_of(width: int, height: int, vision: VisionConfig) -> list[Grid]:
    """The grids of an image of width x height pixels: its crops, then the global view."""
    crops = len(crop_layout(width, height, vision).boxes)
    crop = vision.crop_size // vision.patch_size
    return [(crop, crop)] * crops + [(vision.grid, vision.grid)]


def attention_flops(grids: Sequence[Grid], width: int) -> int:
    """Operations of vision_attention's two products."""
    return sum(4 * (rows * columns) ** 2 * width for rows, columns in grids)


def projector_flops(grids: Sequence[Grid], width: int, out: int) -> int:
    """Operations of a convolution to 2 * width channels, and of the folded one to `out`."""
    mid = sum(cdiv(rows, 2) * cdiv(columns, 2) for rows, columns in grids)
    end = sum(map(output_tokens, grids))
    return 36 * width * (mid * width + end * out)


def tower_flops(grids: Sequence[Grid], config: Config) -> int:
    """Operations from patches to decoder embeddings."""
    vision = vision_of(config)
    c = vision.width
    weights = 3 * vision.patch_size**2 * c + vision.layers * (4 * c * c + 2 * c * vision.mlp_width)
    attention = vision.layers * attention_flops(grids, c)
    projector = projector_flops(grids, c, config.decoder.hidden)
    return 2 * tokens_of(grids) * weights + attention + projector


def named(grids: Sequence[Grid]) -> str:
    """The grids as text, such as "9x 36x36 + 1x 52x52"."""
    counts = {grid: list(grids).count(grid) for grid in grids}
    return " + ".join(f"{n}x {rows}x{columns}" for (rows, columns), n in counts.items())


def global_view() -> list[Grid]:
    """The published model's view of a whole image."""
    return [(vision_of(BIG).grid,) * 2]


def crop() -> list[Grid]:
    """The published model's crop."""
    vision = vision_of(BIG)
    return [(vision.crop_size // vision.patch_size,) * 2]


def photo() -> list[Grid]:
    """The published model's views of a photo of 1920 x 1080."""
    return views_of(1920, 1080, vision_of(BIG))
