"""RMS norm, with the residual add if there is one."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from bench.errors import Error
from bench.formats.traffic import Point
from bench.fp64 import rms
from bench.inputs.draws import Device, NormalDraws
from bench.inputs.presets import BIG, DECODE_ROWS, SMOLLM2
from bench.peers import flashinfer_peer, liger_peer
from bench.peers.compile_peer import COMPILE, compiled
from bench.peers.flashinfer_peer import FLASHINFER
from bench.peers.liger_peer import LIGER
from bench.peers.peer import Peer
from bench.suite.op import Case, Op, Shape
from kernels.norm import rms_norm
from model.config import Config


def inputs(
    seed: int, device: Device, dtype: torch.dtype, *, rows: int, width: int, residual: bool = True
) -> dict:
    draw = NormalDraws(seed, device, dtype)
    return {
        "x": draw(rows, width),
        "weight": 1 + draw(width, scale=0.1),
        "residual": draw(rows, width) if residual else None,
        "eps": 1e-6,
    }


def case(rows: int, width: int, residual: bool = True, name: str = "") -> Case:
    shape: Shape = {"rows": rows, "width": width, "residual": residual}
    return Case(
        op="rms_norm",
        name=name or f"T{rows} C{width}" + ("" if residual else " alone"),
        inputs=partial(inputs, **shape),
        values=(4 if residual else 2) * rows * width + width,
        flops=5 * rows * width,
        shape=shape,
    )


def cases(device_type: str) -> Iterator[Case]:
    for rows in DECODE_ROWS if device_type == "cpu" else (*DECODE_ROWS, 4096):
        yield case(rows, BIG.decoder.hidden)


def of_traffic(point: Point, model: Config) -> Iterator[Case]:
    for rows in (point.batch, point.prefix):
        yield case(rows, model.decoder.hidden)


def checks() -> Iterator[Case]:
    yield case(7, 4096)
    yield case(1, 97, residual=False)


def compiled_cases() -> Iterator[Case]:
    yield case(16, 4096, residual=False)
    yield case(16, SMOLLM2.decoder.hidden, name="T16 smollm2")


def formula(x: Tensor, weight: Tensor, residual: Tensor | None, eps: float) -> tuple[Tensor, ...]:
    if residual is None:
        return (rms(x, weight, eps),)
    return rms(x + residual, weight, eps), x + residual


OP = Op(
    name="rms_norm",
    rank=40,
    run=rms_norm,
    varies="x",
    cases=cases,
    of_traffic=of_traffic,
    checks=checks,
    compiled=compiled_cases,
    formula=formula,
    tolerance_16=Error(4, 0.8),
    tolerance_32=Error(8, 3),
    approximate=Error(4.2, 3),
    results=("y", "total"),
    peers=(
        Peer("compile", "rms_norm", partial(compiled, rms_norm), COMPILE),
        Peer("liger", "rms_norm", liger_peer.rms_norm, LIGER),
        Peer("flashinfer", "rms_norm", flashinfer_peer.rms_norm, FLASHINFER, audited=False),
    ),
)
