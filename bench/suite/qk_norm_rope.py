"""Norm and rotation of Q and K, with K and V written to their pages."""

import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from bench.errors import Error
from bench.formats.traffic import Point
from bench.fp64 import rms, rope_half
from bench.inputs.draws import Device, NormalDraws
from bench.inputs.presets import BIG, DECODE_ROWS, SMOLLM2, WIDE, Heads, heads_of
from bench.peers.compile_peer import COMPILE, compiled
from bench.peers.peer import Peer
from bench.suite.op import Case, Op, Shape
from kernels.kv_pages import KVPages
from kernels.qk_norm_rope import qk_norm_rope
from kernels.rotary_tables import rotary_frequencies
from model.config import Config
from model.rope import inverse_frequencies


def inputs(
    seed: int,
    device: Device,
    dtype: torch.dtype,
    *,
    rows: int,
    heads: int = 32,
    kv_heads: int = 8,
    head_dim: int = 128,
    page_size: int = 64,
    theta: float = 1e6,
    skip: int = 0,
) -> dict:
    """Rows go to distinct random slots in twice the pages needed; the first `skip` rows to none."""
    draw = NormalDraws(seed, device, dtype)
    num_pages = 2 * math.ceil(rows / page_size)
    slots = torch.randperm(num_pages * page_size, generator=draw.host)[:rows]
    slots[:skip] = -1
    shape = (num_pages, kv_heads, page_size, head_dim)
    empty = torch.full(shape, math.nan, device=device, dtype=dtype)
    return {
        "qkv": draw(rows, (heads + 2 * kv_heads) * head_dim),
        "q_weight": 1 + draw(head_dim, scale=0.1),
        "k_weight": 1 + draw(head_dim, scale=0.1),
        "frequencies": rotary_frequencies(inverse_frequencies(theta, head_dim)).to(device),
        "positions": torch.randint(0, 4096, (rows,), generator=draw.host).to(device),
        "slots": slots.to(device),
        "pages": KVPages(empty, empty.clone()),
        "eps": 1e-6,
    }


def case(rows: int, heads: Heads | None = None, skip: int = 0) -> Case:
    q_heads, kv_heads, dim = heads or heads_of(BIG)
    shape: Shape = {
        "rows": rows,
        "heads": q_heads,
        "kv_heads": kv_heads,
        "head_dim": dim,
        "skip": skip,
    }
    rotated = rows * (q_heads + kv_heads) * dim
    return Case(
        op="qk_norm_rope",
        name=f"T{rows} {q_heads}/{kv_heads} heads of {dim}",
        inputs=partial(inputs, **shape),
        values=2 * (rotated + rows * kv_heads * dim) + 2 * dim,
        flops=7 * rotated,  # square, sum, scale, weight; two products and a sum of the rotation
        shape=shape,
    )


def cases(device_type: str) -> Iterator[Case]:
    for rows in DECODE_ROWS if device_type == "cpu" else (*DECODE_ROWS, 4096):
        yield case(rows)


def of_traffic(point: Point, model: Config) -> Iterator[Case]:
    for rows in (point.batch, point.prefix):
        yield case(rows, heads_of(model))


def checks() -> Iterator[Case]:
    yield case(67, skip=3)
    yield case(5, heads_of(SMOLLM2))


def compiled_cases() -> Iterator[Case]:
    for heads in (heads_of(SMOLLM2), WIDE):
        for rows in (16, 4096):
            yield case(rows, heads)


def formula(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    frequencies: Tensor,
    positions: Tensor,
    slots: Tensor,
    pages: KVPages,
    eps: float,
) -> tuple[Tensor, ...]:
    _, kv_heads, page_size, dim = pages.k.shape
    heads = qkv.unflatten(1, (-1, dim))
    q, k, v = heads.tensor_split([heads.shape[1] - 2 * kv_heads, heads.shape[1] - kv_heads], 1)
    inv_freq = frequencies.double() * (math.tau / 2.0**64)
    q = rope_half(rms(q, q_weight, eps), positions, inv_freq)
    k = rope_half(rms(k, k_weight, eps), positions, inv_freq)
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            page, offset = divmod(slot, page_size)
            pages.k[page, :, offset], pages.v[page, :, offset] = k[token], v[token]
    return q, pages.k, pages.v


OP = Op(
    name="qk_norm_rope",
    rank=30,
    run=qk_norm_rope,
    varies="qkv",
    cases=cases,
    of_traffic=of_traffic,
    checks=checks,
    compiled=compiled_cases,
    formula=formula,
    tolerance_16=Error(7, 0.85),
    tolerance_32=Error(16, 2),
    approximate=Error(4.2, 3),
    results=("q",),
    stores=True,
    peers=(Peer("compile", "qk_norm_rope", partial(compiled, qk_norm_rope), COMPILE),),
)
