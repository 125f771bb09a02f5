"""qk_norm_rope and prefix_attention as one op: from the QKV projection to attention's output.

    rotary_attention(qkv, ...) = prefix_attention(qk_norm_rope(qkv, ...), ...)

In a decode step, where every row is the one new token of a leaf, the Triton form can be fused. The
CTAs of attention then normalise and rotate the queries of their row tiles themselves, and the CTA
whose piece includes a leaf's end takes the new K and V from the projection, attends to them, and
writes them to their page. That saves a launch and Q's round trip through memory; in return, each
CTA that works on a row tile rotates the tile's queries again.
"""

import torch
from torch import Tensor

from kernels.kv_pages import KVPages
from kernels.prefix_attention import check_attention, prefix_attention
from kernels.prefix_attention.configs import InputClass
from kernels.prefix_attention.fused_decode import Rotary
from kernels.prefix_attention.launch import launch, plan_launch
from kernels.prefix_plan import PlanTensors, PrefixPlan
from kernels.qk_norm_rope import check_layouts, check_shapes, qk_norm_rope
from kernels.rotary_tables import RotaryTables
from kernels.runtime.configs import Tunable
from kernels.runtime.dispatch import check, check_triton, operators, runs_on_gpu, without_grad
from kernels.runtime.spans import spanned


def rotary_attention(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    frequencies: Tensor,
    positions: Tensor,
    slots: Tensor,
    pages: KVPages,
    plan: PrefixPlan | PlanTensors,
    *,
    scale: float,
    eps: float = 1e-6,
    window: int = 0,
    fused: bool | None = None,
    tables: RotaryTables | None = None,
    impl: str | None | tuple[str | None, str | None] = None,
) -> Tensor:
    """Attention's output [T, Hq, D]; arguments as of `qk_norm_rope` and `prefix_attention`.

    impl: for both ops, or a pair with one for each
    fused: True requires the fused form, False the two ops; None lets the kernel config choose where
        a fused form exists. It exists for impl 'triton', a decode step (every row the only new
        token of its node) and heads that are rotated whole (2 * len(frequencies) = D).

    Raises ValueError as the two ops do, and for fused=True where no fused form exists.
    """
    impls = impl if isinstance(impl, tuple) else (impl, impl)
    if torch.compiler.is_compiling():
        tensors = (qkv, q_weight, k_weight, frequencies, positions, slots, *pages, plan.tensors)
        return operators().rotary_attention(*tensors, scale, eps, window, fused, *impls)
    pages.check(qkv.device)
    plan = PrefixPlan.of(plan, len(qkv), pages)
    can_fuse = plan.is_decode and 2 * len(frequencies) == pages.head_dim and positions.ndim == 1
    can_fuse = can_fuse and all(_is_triton(name, qkv) for name in impls)
    check(
        can_fuse or not fused,
        "fused: only for impl 'triton' in a decode step whose heads are rotated whole",
    )
    if can_fuse and (_prefers_fused(qkv, pages, plan) if fused is None else fused):
        rotary = Rotary(q_weight, k_weight, frequencies, positions, slots, eps)
        run = spanned("rotary_attention", without_grad("rotary_attention", _fused))
        return run(qkv, rotary, pages, plan, scale, window)
    inputs = (qkv, q_weight, k_weight, frequencies, positions, slots)
    q = qk_norm_rope(*inputs, pages, eps=eps, tables=tables, impl=impls[0])
    out = prefix_attention(q, pages, plan, scale=scale, window=window, impl=impls[1])
    assert isinstance(out, Tensor)  # without return_lse
    return out


def _is_triton(impl: str | None, qkv: Tensor) -> bool:
    return impl == "triton" or (impl is None and runs_on_gpu(qkv.device))


def _prefers_fused(qkv: Tensor, pages: KVPages, plan: PrefixPlan) -> bool:
    kv_heads, dim = pages.kv_heads, pages.head_dim
    group = (qkv.shape[1] // dim - 2 * kv_heads) // kv_heads
    input_class = InputClass.of(plan, group, dim, fp8=pages.fp8, invariant=False, fused=True)
    return bool(TUNABLE.choose(input_class.key, qkv.device, input_class)["fused"])


TUNABLE = Tunable(  # fused 0: two ops, 1: one
    "rotary_attention",
    rule=lambda gpu, input_class: {"fused": int(input_class.fuses())},
    candidates=lambda key, gpu: [{"fused": 0}, {"fused": 1}],
)


def _fused(
    qkv: Tensor, rotary: Rotary, pages: KVPages, plan: PrefixPlan, scale: float, window: int
) -> Tensor:
    check_triton("rotary_attention", qkv.device)
    tensors = rotary[:-1]  # all but eps
    check_shapes(qkv, *tensors, pages, None)
    check_layouts(qkv, *tensors, pages)
    check(qkv.is_contiguous(), "qkv must be contiguous")
    heads = qkv.shape[1] // pages.head_dim - 2 * pages.kv_heads
    check_attention(qkv, heads, pages, plan, scale, window)
    spec_and_configs = plan_launch(plan, qkv, heads, pages, window=window, fused=True)
    return launch(qkv, pages, plan, *spec_and_configs, scale, rotary)[0]
