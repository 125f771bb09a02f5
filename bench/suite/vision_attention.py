"""Attention of the vision tower: each view over itself, with 2D rotation."""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from bench.errors import Error
from bench.fp64 import attention, rope_axial, split_views
from bench.inputs.draws import Device, NormalDraws
from bench.inputs.presets import BIG, TINY, vision_of
from bench.inputs.views import attention_flops, crop, global_view, named, photo, views_of
from bench.peers.peer import Peer
from bench.peers.vision_peer import PREPARED, vision
from bench.suite.op import Case, Op, Shape
from kernels.runtime.grids import Grid, tokens_of
from kernels.vision_attention import vision_attention


def inputs(
    seed: int,
    device: Device,
    dtype: torch.dtype,
    *,
    grids: Sequence[Grid],
    heads: int,
    head_dim: int = 96,
) -> dict:
    qkv = NormalDraws(seed, device, dtype)(tokens_of(grids), 3 * heads * head_dim)
    return {"qkv": qkv, "grids": tuple(grids), "heads": heads}


def case(grids: Sequence[Grid], heads: int, head_dim: int = 96) -> Case:
    shape: Shape = {"heads": heads, "head_dim": head_dim}
    width = heads * head_dim
    return Case(
        op="vision_attention",
        name=f"{named(grids)} H{heads} D{head_dim}",
        inputs=partial(inputs, grids=tuple(grids), **shape),
        values=4 * tokens_of(grids) * width,
        flops=attention_flops(grids, width),
        shape={"grids": [list(grid) for grid in grids], **shape},
    )


def cases(device_type: str) -> Iterator[Case]:
    if device_type == "cpu":
        for grids in ([(36, 36)], [(8, 8)] * 4 + [(12, 12)]):
            yield case(grids, vision_of(TINY).heads)
        return
    largest = views_of(3024, 3024, vision_of(BIG))
    for grids in (photo(), global_view(), crop(), largest, 4 * global_view()):
        yield case(grids, vision_of(BIG).heads)


def checks() -> Iterator[Case]:
    yield case([(5, 7), (5, 7), (8, 3)], heads=2)
    yield case([(1, 1), (9, 15), (1, 13)], heads=3)
    for dim in (64, 72, 80, 128):
        yield case([(11, 6), (2, 1)], heads=1, head_dim=dim)


def compiled_cases() -> Iterator[Case]:
    for dim in (64, 72, 80, 128):
        yield case([(36, 36)], heads=2, head_dim=dim)


def formula(
    qkv: Tensor, grids: Sequence[Grid], heads: int, theta: float = 1e4
) -> tuple[Tensor, ...]:
    outs = []
    for view, grid in split_views(qkv, grids):
        q, k, v = view.view(len(view), 3, heads, -1).unbind(1)
        q, k = rope_axial(q, grid, theta), rope_axial(k, grid, theta)
        outs.append(attention(q, k, v, q.shape[-1] ** -0.5)[0].flatten(1))
    return (torch.cat(outs),)


OP = Op(
    name="vision_attention",
    rank=70,
    run=vision_attention,
    varies="qkv",
    cases=cases,
    checks=checks,
    compiled=compiled_cases,
    formula=formula,
    tolerance_16=Error(8, 1.1),
    tolerance_32=Error(220, 24),
    peers=tuple(
        Peer(
            name + suffix,
            "vision_attention",
            partial(vision, prepare=prepare, alone=bool(suffix)),
            library,
            audited=not suffix,
        )
        for name, (library, prepare) in PREPARED.items()
        for suffix in ("", "-alone")
    ),
)
