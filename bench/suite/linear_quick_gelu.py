"""A linear layer with QuickGELU, of the vision tower's MLP."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from bench.errors import Error
from bench.fp64 import logistic
from bench.inputs.draws import Device, NormalDraws
from bench.inputs.presets import BIG, vision_of
from bench.inputs.views import global_view, photo
from bench.peers.compile_peer import COMPILE, compiled
from bench.peers.peer import Peer
from bench.suite.op import Case, Op, Shape
from kernels.linear_quick_gelu import linear_quick_gelu
from kernels.runtime.grids import tokens_of


def inputs(
    seed: int, device: Device, dtype: torch.dtype, *, rows: int, width: int, out: int
) -> dict:
    draw = NormalDraws(seed, device, dtype)
    return {
        "x": draw(rows, width),
        "weight": draw(out, width, scale=width**-0.5),
        "bias": draw(out, scale=0.1),
    }


def case(rows: int, width: int, out: int) -> Case:
    """Counts only the operations of the matrix product."""
    shape: Shape = {"rows": rows, "width": width, "out": out}
    return Case(
        op="linear_quick_gelu",
        name=f"T{rows} C{width} F{out}",
        inputs=partial(inputs, **shape),
        values=rows * width + out * width + out + rows * out,
        flops=2 * rows * width * out,
        shape=shape,
        modes=("triton-fused",),
    )


def cases(device_type: str) -> Iterator[Case]:
    vision = vision_of(BIG)
    rows = (324,) if device_type == "cpu" else map(tokens_of, (global_view(), photo()))
    for count in rows:
        yield case(count, vision.width, vision.mlp_width)


def checks() -> Iterator[Case]:
    yield case(7, 1536, 8960)
    yield case(131, 72, 200)
    yield case(1, 8, 8)


def formula(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    y = x @ weight.T + bias
    return (y * logistic(1.702 * y),)


OP = Op(
    name="linear_quick_gelu",
    rank=100,
    run=linear_quick_gelu,
    varies="x",
    cases=cases,
    checks=checks,
    formula=formula,
    tolerance_16=Error(3, 0.9),
    tolerance_32=Error(100, 13),
    peers=(Peer("compile", "linear_quick_gelu", partial(compiled, linear_quick_gelu), COMPILE),),
)
