"""Attention, rotation and the KV store as operators.

KV pages are passed as their tensors: k, v and, with FP8, their scales. A plan is passed as the
tensors of `PrefixPlan.tensors`. Those of a plan that exists are recognised, so that all layers
share its schedules; from others a plan is built at every call, which reads them on the host.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels import prefix_attention as attention
from kernels import qk_norm_rope as rope
from kernels import rotary_attention as rotary
from kernels.kv_pages import KVPages
from kernels.prefix_plan import PlanTensors
from kernels.torch_ops.registration import torch_op

PAGES = ("k", "v", "k_scale", "v_scale")

# torch.compile's own CUDA graphs copy their inputs: a plan's tensors would not be recognised.
OUTSIDE_GRAPHS = (torch.Tag.cudagraph_unsafe,)


def _attended(q: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)


def _queries(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    frequencies: Tensor,
    positions: Tensor,
    slots: Tensor,
    k: Tensor,
    *_: object,
    **__: object,
) -> Tensor:
    kv_heads, head_dim = k.shape[1], k.shape[3]
    return qkv.new_empty(qkv.shape[0], qkv.shape[1] // head_dim - 2 * kv_heads, head_dim)


@torch_op(_attended, tags=OUTSIDE_GRAPHS)
def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    plan: Sequence[Tensor],
    scale: float,
    window: int = 0,
    batch_invariant: bool = False,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`prefix_attention.prefix_attention` of q [T, Hq, D], and its log-sum-exp."""
    out = attention.prefix_attention(
        q,
        KVPages(k, v, k_scale, v_scale),
        PlanTensors(*plan),
        scale=scale,
        window=window,
        batch_invariant=batch_invariant,
        return_lse=True,
        impl=impl,
    )
    assert isinstance(out, tuple)  # with return_lse
    return out


@torch_op(_queries, mutates=PAGES)
def qk_norm_rope(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    frequencies: Tensor,
    positions: Tensor,
    slots: Tensor,
    k: Tensor,
    v: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    eps: float = 1e-6,
    mrope_section: Sequence[int] | None = None,
    impl: str | None = None,
) -> Tensor:
    """`qk_norm_rope.qk_norm_rope`: q [T, Hq, D]; writes the pages."""
    time, height, width = mrope_section or (0, 0, 0)
    return rope.qk_norm_rope(
        qkv,
        q_weight,
        k_weight,
        frequencies,
        positions,
        slots,
        KVPages(k, v, k_scale, v_scale),
        eps=eps,
        mrope_section=(time, height, width) if mrope_section else None,
        impl=impl,
    )


@torch_op(_queries, mutates=PAGES, tags=OUTSIDE_GRAPHS)
def rotary_attention(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    frequencies: Tensor,
    positions: Tensor,
    slots: Tensor,
    k: Tensor,
    v: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    plan: Sequence[Tensor],
    scale: float,
    eps: float = 1e-6,
    window: int = 0,
    fused: bool | None = None,
    rope_impl: str | None = None,
    attention_impl: str | None = None,
) -> Tensor:
    """`rotary_attention.rotary_attention`: [T, Hq, D]; writes the pages."""
    return rotary.rotary_attention(
        qkv,
        q_weight,
        k_weight,
        frequencies,
        positions,
        slots,
        KVPages(k, v, k_scale, v_scale),
        PlanTensors(*plan),
        scale=scale,
        eps=eps,
        window=window,
        fused=fused,
        impl=(rope_impl, attention_impl),
    )
