"""From the QKV projection to attention's inputs: per-head RMSNorm, rotary, and the paged KV store.

    q_h <- rotate(rms_norm(q_h) * q_weight)        k_h <- rotate(rms_norm(k_h) * k_weight)
    k_pages[slot // page_size, h, slot % page_size] <- k_h        and the same for v, unchanged

The rotation pairs element i with i + R/2 of the first R elements (half rotation, as GPT-NeoX, Llama
and Qwen3 have it) by the angle positions * inv_freq[i]; elements from R on pass through.
"""

import torch
from torch import Tensor

from kernels._launch import check, pick


def qk_norm_rope(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    inv_freq: Tensor,
    positions: Tensor,
    slots: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    *,
    eps: float = 1e-6,
    impl: str | None = None,
) -> Tensor:
    """Normalise and rotate Q and K, store K and V into their pages, return Q as [T, Hq, D].

    qkv: [T, (Hq + 2 Hkv) * D], heads of Q first, then K, then V
    q_weight, k_weight: [D], or both None for a model without qk-norm
    inv_freq: fp32 [R / 2], R <= D
    positions: int [T]; slots: int [T], page * page_size + offset, or -1 to store nothing
    k_pages, v_pages: [num_pages, Hkv, page_size, D], written in place
    Raises ValueError for shapes that do not fit together.
    """
    num_pages, kv_heads, page_size, head_dim = k_pages.shape
    heads, rest = divmod(qkv.shape[-1], head_dim)
    check(qkv.ndim == 2 and rest == 0 and heads > 2 * kv_heads, "qkv must be [T, (Hq + 2 Hkv) * D]")
    check(v_pages.shape == k_pages.shape, "v_pages must have the shape of k_pages")
    check((q_weight is None) == (k_weight is None), "give both q_weight and k_weight, or neither")
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        check(weight is None or weight.shape == (head_dim,), f"{name} must be [{head_dim}]")
    check(inv_freq.ndim == 1 and 2 * len(inv_freq) <= head_dim, "inv_freq must be [R/2], R <= D")
    for name, index in (("positions", positions), ("slots", slots)):
        check(index.shape == qkv.shape[:1], f"{name} must be [{qkv.shape[0]}]")
    run = pick("qk_norm_rope", impl, qkv.device, {"eager": qk_norm_rope_ref})
    return run(qkv, q_weight, k_weight, inv_freq, positions, slots, k_pages, v_pages, eps=eps)


def qk_norm_rope_ref(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    inv_freq: Tensor,
    positions: Tensor,
    slots: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    *,
    eps: float,
) -> Tensor:
    """The definition. Rounds to qkv's dtype after the norm, its weight, and the rotation."""
    _, kv_heads, page_size, head_dim = k_pages.shape
    heads = qkv.shape[-1] // head_dim - 2 * kv_heads
    q, k, v = qkv.view(-1, heads + 2 * kv_heads, head_dim).split([heads, kv_heads, kv_heads], dim=1)
    if q_weight is not None:
        q = _rms_norm(q, eps) * q_weight
        k = _rms_norm(k, eps) * k_weight
    angle = positions[:, None, None].float() * inv_freq
    cos, sin = angle.cos(), angle.sin()  # [T, 1, R/2]
    q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)

    keep = slots >= 0
    page, offset = slots[keep] // page_size, slots[keep] % page_size
    k_pages[page, :, offset] = k[keep].to(k_pages.dtype)
    v_pages[page, :, offset] = v[keep].to(v_pages.dtype)
    return q


def _rms_norm(x: Tensor, eps: float) -> Tensor:
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    a, b, rest = x.float().split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1).to(x.dtype)
