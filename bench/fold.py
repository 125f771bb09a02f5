"""What folding the projector's last two layers does to its numbers: `python -m bench fold`.

Errors of both paths are against fp64 on the same 16-bit weights and tokens, at the 10B's depths:
every sum is as long as the model's. Each output channel is a fold of its own, so those looked at
stand for all. The fold made and run in fp64 shows the algebra: what is left is rounding.
Products and bytes are those of all channels, for one global view.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from bench import rows, show
from bench.inputs import projector_inputs
from bench.numerics import compare
from kernels.projector import fold, output_tokens, projector
from kernels.runtime.dtypes import dtype_name
from kernels.runtime.grids import Grid
from model.config import PRESETS

GRID, CHANNELS = (28, 28), 256  # 49 tokens: two errors of 12,544 results compare within 1 %
DTYPES = (torch.bfloat16, torch.float16)
PATHS = ("unfolded", "folded")
EXACT = 1e-12  # far above rounding in fp64, far below that in fp32


def run(device: torch.device, width: int | None = None, channels: int = CHANNELS) -> Iterator[dict]:
    """A row for each dtype, of the 10B's width if it is None."""
    model = PRESETS["step3-vl-10b"]
    width, out = width or model.vision.width, model.decoder.hidden
    for dtype in DTYPES:
        made = projector_inputs(0, device, dtype, grids=[GRID], width=width, out=channels)
        found = errors(made)
        wrong = not found["fp64_max_err"] <= EXACT
        yield {
            "op": "fold",
            "case": f"C{width}, {channels} of {out} channels, {output_tokens(GRID)} tokens",
            "dtype": dtype_name(dtype),
            **found,
            **work((model.vision.grid,) * 2, width, out, dtype.itemsize),
            "failure": f"off by {found['fp64_max_err']:.1e} in fp64" if wrong else None,
            **rows.origin(device),
        }


def errors(made: dict) -> dict:
    """Largest and RMS error of the inputs' unfolded and folded path, and of the fold in fp64."""
    wide = {name: x.double() if torch.is_tensor(x) else x for name, x in made.items()}

    def path(inputs: dict, folded: tuple[Tensor, Tensor] | None) -> Tensor:
        return projector(**inputs | {"folded": folded}, impl="portable" if folded else "eager")

    with torch.inference_mode():
        expected = path(wide, None)
        results = {
            "unfolded": path(made, None),
            "folded": path(made, made["folded"]),
            "fp64": path(wide, fold(wide["w2"], wide["b2"], wide["w3"])),
        }
    found = {name: compare(result, expected) for name, result in results.items()}
    return {
        f"{name}_{which}_err": getattr(found[name], which)
        for which in ("max", "rms")
        for name in found
    }


def work(grid: Grid, width: int, out: int, itemsize: int) -> dict:
    """Products and weights' bytes of the two layers for one view."""
    weights = {"unfolded": 72 * width**2 + 4 * width * out, "folded": 18 * width * out}
    products = {f"{path}_products": weights[path] * output_tokens(grid) for path in PATHS}
    return products | {f"{path}_bytes": weights[path] * itemsize for path in PATHS}


def display(made: Sequence[dict]) -> None:
    """The rows as a table."""
    pairs = (" max error", " RMS error", " G products", " MB of weights")
    header = ("case", "dtype", *(name for pair in pairs for name in (pair, " folded")))
    lines = [
        [
            row["case"],
            row["dtype"],
            *(f"{row[f'{path}_{which}_err']:.2e}" for which in ("max", "rms") for path in PATHS),
            *(f"{row[f'{path}_products'] / 1e9:.1f}" for path in PATHS),
            *(f"{row[f'{path}_bytes'] / 1e6:.0f}" for path in PATHS),
            f"{row['fp64_max_err']:.0e}",
            f"FAILED: {row['failure']}" if row["failure"] else "",
        ]
        for row in made
    ]
    title = "the projector's last two layers, as they are and folded into one"
    show.titled(title, made, (*header, " folded, all in fp64", ""), lines)
