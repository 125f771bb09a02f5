"""Time per image, by size: `python -m bench e2e --vision`.

From the pixels of an image's views, as bytes on the device, to its decoder embeddings: embedding,
tower and projector. Cutting an image into views and resizing them are not timed. The image cache
and the tower's own CUDA graphs are off: every call encodes, and the one timer captures every form
alike. Weights and pixels are random; times do not depend on them.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from bench.errors import compare
from bench.inputs.presets import vision_of
from bench.inputs.views import tower_flops, views_of
from bench.measure.devices import MAIN_DTYPE
from bench.measure.rows import measured, with_speedups
from bench.measure.timing import measure
from bench.measure.verdicts import judged
from bench.studies.decode import FORMS
from kernels.projector import output_tokens
from kernels.runtime.grids import Grid
from model.config import PRESETS, Config
from model.impls import impl_per_op
from model.terminal import track
from model.vision.tower import VisionTower
from model.weights.random_init import random_init

MODELS = {"cpu": "tiny", "cuda": "step3-vl-10b"}
SIZES = ((728, 728), (1280, 720), (1920, 1080), (3024, 3024))  # width, height


def run(device: torch.device) -> Iterator[dict]:
    """Rows for an image of each of SIZES."""
    config = PRESETS[MODELS[device.type]]
    tower = random_tower(config, device)
    for size in track(SIZES, "images"):
        yield from encode(tower, config, size)


def random_tower(config: Config, device: torch.device) -> VisionTower:
    """A vision tower with random weights, in the device's main dtype."""
    impl, dtype = impl_per_op(None), MAIN_DTYPE[device.type]
    vision, hidden = vision_of(config), config.decoder.hidden
    tower = VisionTower(vision, hidden, impl=impl, device=device, dtype=dtype)
    random_init(tower.checkpoint_tensors(), 0)
    return tower


def forms_on(device_type: str) -> dict[str, str | None]:
    """The timed forms, each with its `impl` for all ops."""
    return FORMS | ({"portable": "portable"} if device_type == "cuda" else {})


def case_name(config: Config, size: tuple[int, int]) -> str:
    """Such as "tiny 728 x 728"."""
    return f"{config.name} {size[0]} x {size[1]}"


def encode(
    tower: VisionTower,
    config: Config,
    size: tuple[int, int],
    budget_s: float = 4.0,
    names: Sequence[str] = (),
) -> list[dict]:
    """Rows of one image of (width, height) pixels in the forms `names`, or all if empty."""
    device, dtype = tower.projector.device, tower.projector.dtype
    grids = views_of(*size, tower.config)
    views, tokens = _views(tower, grids), sum(map(output_tokens, grids))
    tower.graphs.enabled = False
    forms = {
        name: impl for name, impl in forms_on(device.type).items() if name in names or not names
    }

    def encoded(impl: str | None) -> Tensor:
        tower.impl.update(impl_per_op(impl))
        return tower(views)

    expected = encoded("eager")
    errors = {name: compare(encoded(impl), expected) for name, impl in forms.items()}
    calls = {name: lambda _, impl=impl: encoded(impl) for name, impl in forms.items()}
    timings = measure(calls, device=device, budget_s=budget_s)
    weights = sum(parameter.nbytes for parameter in tower.parameters())
    rows = []
    for name in forms:
        row = measured(
            "vision",
            case_name(config, size),
            name,
            device=device,
            dtype=dtype,
            num_bytes=weights + sum(view.nbytes for view in views),
            flops=tower_flops(grids, config),
            verdict=judged(errors[name], dtype),
            timing=timings[name],
        )
        row |= {"views": len(views), "tokens": tokens}
        if row["median_us"]:
            row["tflop_s"] = row["flops"] / row["median_us"] / 1e6
            row["gemm_pct"] = 100 * row["tflop_s"] / row["gemm_tflop_s"]
        rows.append(row)
    return with_speedups(rows)


def _views(tower: VisionTower, grids: Sequence[Grid]) -> list[Tensor]:
    """Random bytes, on the weights' device."""
    device, size = tower.projector.device, tower.config.patch_size
    generator = torch.Generator(device).manual_seed(0)

    def view(rows: int, columns: int) -> Tensor:
        shape = size * rows, size * columns, 3
        return torch.randint(0, 256, shape, generator=generator, device=device, dtype=torch.uint8)

    return [view(*grid) for grid in grids]
