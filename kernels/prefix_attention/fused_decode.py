"""Device functions of fused decode, which attends straight from the QKV projection.

See rotary_attention.py. Values are rounded where `qk_norm_rope` rounds them.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from kernels.qk_norm_rope import norm_rotate
from kernels.runtime.fp8 import e4m3_scale, from_e4m3, magnitude_bits, to_e4m3
from kernels.runtime.rotary import cos_sin


class Rotary(NamedTuple):
    """The arguments of fused decode besides the projection and the pages, as of `qk_norm_rope`."""

    q_weight: Tensor | None
    k_weight: Tensor | None
    frequencies: Tensor
    positions: Tensor
    slots: Tensor
    eps: float


@triton.jit
def new_token(
    qkv,
    kv,
    rotary,
    row,
    head,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
):
    """Write a row's K and V to their page; returns both as read back from there, fp32 [1, D]."""
    index = tl.arange(0, 1)
    start = (row.to(tl.int64) * (KV_HEADS * (GROUP + 2)) + KV_HEADS * GROUP + head) * D
    k = rotated(
        qkv + start + index, rotary.k_weight, rotary.positions + row + index, index == 0, rotary, D
    )
    v = tl.load(qkv + start + KV_HEADS * D + tl.arange(0, D)[None, :])
    slot = tl.load(rotary.slots + row).to(tl.int64)
    tile = (slot // PAGE * KV_HEADS + head) * PAGE + slot % PAGE
    k = _write(kv.k, kv.k_scale, k, tile, slot >= 0, D, NATIVE_FP8)
    v = _write(kv.v, kv.v_scale, v, tile, slot >= 0, D, NATIVE_FP8)
    return k, v


@triton.jit
def rotated(start, weight, position, live, rotary, D: tl.constexpr):
    """Query or key vectors [M, D] from the projection at `start` [M]: normalised and rotated."""
    PAIRS: tl.constexpr = D // 2
    M: tl.constexpr = start.shape[0]
    pair = tl.arange(0, PAIRS)
    first = tl.load(start[:, None] + pair[None, :], mask=live[:, None], other=0.0)
    second = tl.load(start[:, None] + PAIRS + pair[None, :], mask=live[:, None], other=0.0)
    frequency = tl.load(rotary.frequencies + pair)[None, :]
    cos, sin = cos_sin(tl.load(position, mask=live, other=0)[:, None], frequency)
    columns = (pair, pair + PAIRS, pair < PAIRS)
    first, second = norm_rotate(first, second, weight, cos, sin, rotary.eps, columns, D)
    return tl.reshape(tl.permute(tl.join(first, second), (0, 2, 1)), (M, D))


@triton.jit
def _write(pages, scales, x, tile, keep, D: tl.constexpr, NATIVE_FP8: tl.constexpr):
    """Store a new token's K or V, x [1, D]; returns it as read back from there, fp32 [1, D]."""
    at = tile * D + tl.arange(0, D)[None, :]
    x = x.to(tl.float32)
    if scales is None:
        tl.store(pages + at, x.to(pages.dtype.element_ty), mask=keep)
    else:
        scale = e4m3_scale(magnitude_bits(x))  # [1]
        codes = to_e4m3(x * tl.div_rn(1.0, scale)[:, None], NATIVE_FP8)
        tl.store(scales + tile + tl.arange(0, 1), scale, mask=keep)
        tl.store(pages + at, codes, mask=keep)
        x = from_e4m3(codes, NATIVE_FP8).to(tl.float32) * scale[:, None]
    return x
