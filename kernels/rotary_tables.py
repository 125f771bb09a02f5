"""Rotary frequencies and tables, and the portable form of `qk_norm_rope`.

A frequency is an integer: turns per position in units of 2^-64, rounded from fp64. Products with a
position overflow by whole turns, which do not matter, so nothing else is rounded. In fp32 the angle
would have an error of 2^-25 of itself, up to 0.03 rad at position 2^20.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.kv_pages import KVPages
from kernels.runtime.fp8 import quantise_e4m3


def rotary_frequencies(inv_freq: Sequence[float] | Tensor) -> Tensor:
    """Frequencies in radians per position [R/2] as int64 [R/2] on the CPU."""
    turns = torch.as_tensor(inv_freq, dtype=torch.float64, device="cpu") / math.tau
    # The clamp keeps half a turn, 2^63, from overflowing.
    return ((turns - turns.round()) * 2.0**64).clamp(max=2.0**63 - 1024).long()


def cos_sin_table(frequencies: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of positions, int [T, 1] or [T, R/2], times frequencies: fp32 [T, 1, R/2]."""
    angle = (positions[:, None].long() * frequencies).double() * (math.tau / 2.0**64)
    return angle.cos().float(), angle.sin().float()


class RotaryTables(NamedTuple):
    """What a step's positions and slots determine in every layer: angles, and rows of the pages."""

    cos: Tensor  # fp32 [T, 1, R], each angle's twice: for both elements of a pair
    sin: Tensor  # fp32 [T, 1, R/2]
    stored: Tensor | None  # int64 [n] the tokens with a slot; None: all
    rows: Tensor  # int64 [n * Hkv] where they go, in pages viewed as rows of D elements

    @staticmethod
    def of(frequencies: Tensor, positions: Tensor, slots: Tensor, pages: KVPages) -> "RotaryTables":
        """frequencies: int64 [R/2], as of `rotary_frequencies`; positions: [T, 1], or [T, R/2] for
        each frequency; slots: [T]"""
        cos, sin = cos_sin_table(frequencies, positions)
        missing = slots < 0
        stored = (~missing).nonzero()[:, 0] if bool(missing.any()) else None
        slots = (slots if stored is None else slots[stored]).long()
        page, offset = slots // pages.page_size, slots % pages.page_size
        head = torch.arange(pages.kv_heads, device=slots.device)
        tiles = page[:, None] * pages.kv_heads + head
        rows = tiles * pages.page_size + offset[:, None]
        return RotaryTables(torch.cat([cos, cos], dim=-1), sin, stored, rows.flatten())


def norm_rotate_store(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    tables: RotaryTables,
    pages: KVPages,
    eps: float,
) -> Tensor:
    """The portable form of `qk_norm_rope`."""
    kv_heads = pages.kv_heads
    heads = qkv.unflatten(-1, (-1, pages.head_dim))
    q, k, v = heads.split([heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads], dim=1)
    q, k = _norm_rotate(q, q_weight, tables, eps), _norm_rotate(k, k_weight, tables, eps)
    if tables.stored is not None:
        k, v = k[tables.stored], v[tables.stored]
    for x, target, scale in ((k, pages.k, pages.k_scale), (v, pages.v, pages.v_scale)):
        values = x.flatten(0, 1)
        if scale is not None:
            values, scales = quantise_e4m3(values)
            scale.view(-1).index_copy_(0, tables.rows, scales)
            values, target = values.view(torch.uint8), target.view(torch.uint8)
        target.view(-1, pages.head_dim).index_copy_(0, tables.rows, values.to(target.dtype))
    return q


def _norm_rotate(x: Tensor, weight: Tensor | None, tables: RotaryTables, eps: float) -> Tensor:
    if weight is not None:  # separately, to round in between
        x = F.rms_norm(x, weight.shape, eps=eps).mul_(weight)
    width = tables.cos.shape[-1]
    half, wide = width // 2, x[..., :width].float()
    turned = wide * tables.cos
    turned[..., :half].addcmul_(wide[..., half:], tables.sin, value=-1)
    turned[..., half:].addcmul_(wide[..., :half], tables.sin)
    turned = turned.to(x.dtype)
    return torch.cat([turned, x[..., width:]], dim=-1) if width < x.shape[-1] else turned
