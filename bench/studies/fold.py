"""Rounding errors of folding the projector's last two layers: `python -m bench fold`.

Errors of both paths are against fp64 on the same 16-bit weights and tokens, at the 10B's depths:
every sum is as long as the model's. Output channels fold independently, so the measured ones
represent all. Folding and running in fp64 checks the algebra: the rest is rounding. Products and
bytes are those of all channels, for one global view.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from bench.errors import compare
from bench.inputs.presets import vision_of
from bench.measure.origin import origin
from bench.suite.projector import inputs as projector_inputs
from kernels.projector import fold, output_tokens, projector
from kernels.runtime.dtypes import dtype_name
from kernels.runtime.grids import Grid
from model.config import PRESETS

GRID, CHANNELS = (28, 28), 256  # 49 tokens, 12,544 results: errors are comparable within 1 %
DTYPES = (torch.bfloat16, torch.float16)
PATHS = ("unfolded", "folded")
EXACT = 1e-12  # far above rounding errors in fp64, far below those in fp32


def run(device: torch.device, width: int | None = None, channels: int = CHANNELS) -> Iterator[dict]:
    """One row per dtype; `width` defaults to the 10B's."""
    model = PRESETS["step3-vl-10b"]
    vision, out = vision_of(model), model.decoder.hidden
    width = width or vision.width
    for dtype in DTYPES:
        inputs = projector_inputs(0, device, dtype, grids=[GRID], width=width, out=channels)
        path_errors = errors(inputs)
        wrong = not path_errors["fp64_max_err"] <= EXACT
        yield {
            "op": "fold",
            "case": f"C{width}, {channels} of {out} channels, {output_tokens(GRID)} tokens",
            "dtype": dtype_name(dtype),
            **path_errors,
            **work((vision.grid,) * 2, width, out, dtype.itemsize),
            "failure": f"off by {path_errors['fp64_max_err']:.1e} in fp64" if wrong else None,
            **origin(device),
        }


def errors(inputs: dict) -> dict:
    """Largest and RMS error of the unfolded path, the folded path, and the fold in fp64."""
    wide = {name: x.double() if torch.is_tensor(x) else x for name, x in inputs.items()}

    def path(args: dict, folded: tuple[Tensor, Tensor] | None) -> Tensor:
        return projector(**args | {"folded": folded}, impl="portable" if folded else "eager")

    with torch.inference_mode():
        expected = path(wide, None)
        results = {
            "unfolded": path(inputs, None),
            "folded": path(inputs, inputs["folded"]),
            "fp64": path(wide, fold(wide["w2"], wide["b2"], wide["w3"])),
        }
    by_path = {name: compare(result, expected) for name, result in results.items()}
    return {
        f"{name}_{which}_err": getattr(by_path[name], which)
        for which in ("max", "rms")
        for name in by_path
    }


def work(grid: Grid, width: int, out: int, itemsize: int) -> dict:
    """Multiply-adds and weight bytes of the two layers for one view."""
    weights = {"unfolded": 72 * width**2 + 4 * width * out, "folded": 18 * width * out}
    products = {f"{path}_products": weights[path] * output_tokens(grid) for path in PATHS}
    return products | {f"{path}_bytes": weights[path] * itemsize for path in PATHS}
