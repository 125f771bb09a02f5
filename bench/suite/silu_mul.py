"""silu(gate) * up of the decoder's MLP."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from bench.errors import Error
from bench.formats.traffic import Point
from bench.fp64 import logistic
from bench.inputs.draws import Device, NormalDraws
from bench.inputs.presets import BIG, DECODE_ROWS
from bench.peers import flashinfer_peer, liger_peer
from bench.peers.compile_peer import COMPILE, compiled
from bench.peers.flashinfer_peer import FLASHINFER
from bench.peers.liger_peer import LIGER
from bench.peers.peer import Peer
from bench.suite.op import Case, Op, Shape
from kernels.activation import silu_mul
from model.config import Config


def inputs(
    seed: int,
    device: Device,
    dtype: torch.dtype,
    *,
    rows: int,
    width: int,
    interleaved: bool = False,
) -> dict:
    """`width` is F: the input has 2F columns."""
    gate_up = NormalDraws(seed, device, dtype)(rows, 2 * width)
    return {"gate_up": gate_up, "interleaved": interleaved}


def case(rows: int, width: int, interleaved: bool = False) -> Case:
    shape: Shape = {"rows": rows, "width": width, "interleaved": interleaved}
    return Case(
        op="silu_mul",
        name=f"T{rows} F{width}" + (" interleaved" if interleaved else ""),
        inputs=partial(inputs, **shape),
        values=3 * rows * width,
        flops=5 * rows * width,
        shape=shape,
    )


def cases(device_type: str) -> Iterator[Case]:
    width = BIG.decoder.mlp_width
    for rows in DECODE_ROWS:
        yield case(rows, width)
    if device_type == "cuda":
        yield case(4096, width)
        yield case(16, width, interleaved=True)
        yield case(4096, width, interleaved=True)


def of_traffic(point: Point, model: Config) -> Iterator[Case]:
    for rows in (point.batch, point.prefix):
        yield case(rows, model.decoder.mlp_width)


def checks() -> Iterator[Case]:
    yield case(7, 12288)
    yield case(1, 97)
    yield case(7, 97, interleaved=True)


def formula(gate_up: Tensor, interleaved: bool) -> tuple[Tensor, ...]:
    gate, up = (gate_up[:, ::2], gate_up[:, 1::2]) if interleaved else gate_up.chunk(2, -1)
    return (gate * logistic(gate) * up,)


OP = Op(
    name="silu_mul",
    rank=50,
    run=silu_mul,
    varies="gate_up",
    cases=cases,
    of_traffic=of_traffic,
    checks=checks,
    formula=formula,
    tolerance_16=Error(3, 0.5),
    tolerance_32=Error(8, 1),
    approximate=Error(11.5, 3.4),
    peers=(
        Peer("compile", "silu_mul", partial(compiled, silu_mul), COMPILE),
        Peer("liger", "silu_mul", liger_peer.silu_mul, LIGER),
        Peer("flashinfer", "silu_mul", flashinfer_peer.silu_mul, FLASHINFER),
    ),
)
