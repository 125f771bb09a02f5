"""x * sigmoid(1.702 x), of the vision tower's MLP."""

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
from kernels.activation import quick_gelu
from kernels.runtime.grids import tokens_of


def inputs(seed: int, device: Device, dtype: torch.dtype, *, rows: int, width: int) -> dict:
    return {"x": NormalDraws(seed, device, dtype)(rows, width)}


def case(rows: int, width: int) -> Case:
    shape: Shape = {"rows": rows, "width": width}
    return Case(
        op="quick_gelu",
        name=f"T{rows} F{width}",
        inputs=partial(inputs, **shape),
        values=2 * rows * width,
        flops=5 * rows * width,
        shape=shape,
    )


def cases(device_type: str) -> Iterator[Case]:
    rows = (324,) if device_type == "cpu" else map(tokens_of, (global_view(), photo()))
    for count in rows:
        yield case(count, vision_of(BIG).mlp_width)


def checks() -> Iterator[Case]:
    yield case(7, 8960)


def formula(x: Tensor) -> tuple[Tensor, ...]:
    return (x * logistic(1.702 * x),)


OP = Op(
    name="quick_gelu",
    rank=90,
    run=quick_gelu,
    varies="x",
    cases=cases,
    checks=checks,
    formula=formula,
    tolerance_16=Error(1.5, 0.35),
    tolerance_32=Error(8, 1),
    approximate=Error(5.4, 3),
    peers=(Peer("compile", "quick_gelu", partial(compiled, quick_gelu), COMPILE),),
)
