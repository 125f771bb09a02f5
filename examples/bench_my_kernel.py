"""A kernel of your own in the op table: checked like every form, timed next to eager and ours.

Run it with `.venv/bin/python examples/bench_my_kernel.py`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from bench.measure.devices import MAIN_DTYPE, parse_device
from bench.measure.ops import time_case
from bench.rows import show
from bench.suite import cases
from bench.suite.forms import add_form, select


def my_rms_norm(x: Tensor, weight: Tensor, residual: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Launch your kernel here; plain PyTorch stands in for it."""
    total = x + residual
    wide = total.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale).to(x.dtype) * weight, total


def prepare(inputs: dict) -> Callable[[], object]:
    """The call to time, from the arguments of kernels.norm.rms_norm; it returns what that does."""
    return lambda: my_rms_norm(**inputs)  # what you do before this line is not timed


add_form("rms_norm", "mine", prepare)
device = parse_device(None)  # a GPU if there is one
forms = ("eager", "triton" if device.type == "cuda" else "portable", "mine")
rows = []
for case in select(cases(device.type), ["rms_norm"], impls=forms):
    # Each form is compared with the eager definition in fp32. One whose error is above the op's
    # tolerance gets no time: the table says FAILED, and by how much.
    rows += time_case(case, device, MAIN_DTYPE[device.type], forms)
show.times(rows)
