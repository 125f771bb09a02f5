"""The portable form of `qk_norm_rope`, and the tables that it shares between a step's layers."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.kv_pages import KVPages
from kernels.runtime.fp8 import quantise_e4m3


class RotaryTables(NamedTuple):
    """What a step's positions and slots determine in every layer: angles, and rows of the pages."""

    cos: Tensor  # fp32 [T, 1, R], each angle's twice: for both elements of a pair
    sin: Tensor  # fp32 [T, 1, R/2]
    stored: Tensor | None  # int64 [n] the tokens with a slot; None: all
    rows: Tensor  # int64 [n * Hkv] where they go, in pages viewed as rows of D elements

    @staticmethod
    def of(inv_freq: Tensor, positions: Tensor, slots: Tensor, pages: KVPages) -> "RotaryTables":
        """inv_freq: fp32 [R/2]; positions: [T, 1], or [T, R/2] for each frequency; slots: [T]"""
        angle = positions[:, None].float() * inv_freq
        cos, sin = angle.cos(), angle.sin()
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
