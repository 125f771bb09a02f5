"""Layer norm, with the scaled residual add if there is one."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from bench.errors import Error
from bench.fp64 import layer
from bench.inputs.draws import Device, NormalDraws
from bench.inputs.presets import BIG, vision_of
from bench.inputs.views import global_view, photo
from bench.peers import liger_peer
from bench.peers.compile_peer import COMPILE, compiled
from bench.peers.liger_peer import LIGER
from bench.peers.peer import Peer
from bench.suite.op import Case, Op, Shape
from kernels.norm import layer_norm
from kernels.runtime.grids import tokens_of


def inputs(
    seed: int, device: Device, dtype: torch.dtype, *, rows: int, width: int, residual: bool = True
) -> dict:
    draw = NormalDraws(seed, device, dtype)
    return {
        "x": draw(rows, width),
        "weight": 1 + draw(width, scale=0.1),
        "bias": draw(width, scale=0.1),
        "residual": draw(rows, width) if residual else None,
        "gamma": draw(width, scale=0.1) if residual else None,
        "eps": 1e-5,
    }


def case(rows: int, width: int, residual: bool = True) -> Case:
    shape: Shape = {"rows": rows, "width": width, "residual": residual}
    return Case(
        op="layer_norm",
        name=f"T{rows} C{width}" + ("" if residual else " alone"),
        inputs=partial(inputs, **shape),
        values=(4 if residual else 2) * rows * width + (3 if residual else 2) * width,
        flops=8 * rows * width,
        shape=shape,
    )


def cases(device_type: str) -> Iterator[Case]:
    rows = (1296,) if device_type == "cpu" else map(tokens_of, (global_view(), photo()))
    for count in rows:
        yield case(count, vision_of(BIG).width)


def checks() -> Iterator[Case]:
    yield case(7, 1536)
    yield case(1, 97, residual=False)


def compiled_cases() -> Iterator[Case]:
    yield case(1296, 1536, residual=False)


def formula(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    gamma: Tensor | None,
    eps: float,
) -> tuple[Tensor, ...]:
    if residual is None:
        return (layer(x, weight, bias, eps),)
    total = residual + (x if gamma is None else gamma * x)
    return layer(total, weight, bias, eps), total


OP = Op(
    name="layer_norm",
    rank=80,
    run=layer_norm,
    varies="x",
    cases=cases,
    checks=checks,
    compiled=compiled_cases,
    formula=formula,
    tolerance_16=Error(3, 0.65),
    tolerance_32=Error(16, 2.5),
    approximate=Error(4.4, 3.1),
    results=("y", "total"),
    peers=(
        Peer("compile", "layer_norm", partial(compiled, layer_norm), COMPILE),
        Peer("liger", "layer_norm", liger_peer.layer_norm, LIGER),
    ),
)
