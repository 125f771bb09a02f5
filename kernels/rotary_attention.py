"""From the QKV projection to attention's output: qk_norm_rope and prefix_attention as one op.

    rotary_attention(qkv, ...) = prefix_attention(qk_norm_rope(qkv, ...), ...)

In decode, where every row is the one new token of a leaf, the Triton form can be fused: attention's
programs normalise and rotate the queries of their tiles themselves, and the program that owns a
leaf's last chunk takes the new K and V straight from the projection, attends to them, and writes
them to their page. That saves a launch and the trip of Q through memory; in return every program
that works on a tile rotates the tile's queries anew.
"""

import torch
from torch import Tensor

from kernels.prefix_attention import check_pages, prefix_attention
from kernels.prefix_attention.fused_decode import Rotary
from kernels.prefix_attention.launch import cut_up, launch
from kernels.prefix_attention.tiles import Kind
from kernels.prefix_plan import PrefixPlan
from kernels.qk_norm_rope import check_layouts, check_shapes, qk_norm_rope
from kernels.runtime.dispatch import check, check_triton, runs_on_gpu
from kernels.runtime.spans import spanned
from kernels.runtime.tiles import Tunable


def rotary_attention(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    inv_freq: Tensor,
    positions: Tensor,
    slots: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    plan: PrefixPlan,
    *,
    scale: float,
    eps: float = 1e-6,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    window: int = 0,
    fused: bool | None = None,
    impl: str | None | tuple[str | None, str | None] = None,
) -> Tensor:
    """Attention's output [T, Hq, D]; arguments as of `qk_norm_rope` and `prefix_attention`.

    impl: of both ops, or a pair of theirs
    fused: True demands the fused form, False the two ops; None leaves it to the tile choices where
        there is a fused form. That is the Triton form of a decode step (every row the only new
        token of its node) whose heads are rotated whole (2 * len(inv_freq) = D).

    Raises ValueError as the two ops do, and for `fused` where there is no such form.
    """
    impls = impl if isinstance(impl, tuple) else (impl, impl)
    offered = plan.is_decode and 2 * len(inv_freq) == k_pages.shape[-1] and positions.ndim == 1
    offered = offered and all(_is_triton(name, qkv) for name in impls)
    check(offered or not fused, "fused: only impl 'triton' of a decode step with whole rotation")
    if offered and (_prefers_fused(qkv, k_pages, plan) if fused is None else fused):
        rotary = Rotary(q_weight, k_weight, inv_freq, positions, slots, eps)
        run = spanned("rotary_attention", _fused)
        return run(qkv, rotary, k_pages, v_pages, plan, scale, k_scale, v_scale, window)
    scales = {"k_scale": k_scale, "v_scale": v_scale}
    args = (qkv, q_weight, k_weight, inv_freq, positions, slots, k_pages, v_pages)
    q = qk_norm_rope(*args, eps=eps, impl=impls[0], **scales)
    options = scales | {"scale": scale, "window": window, "impl": impls[1]}
    return prefix_attention(q, k_pages, v_pages, plan, **options)


def _is_triton(impl: str | None, qkv: Tensor) -> bool:
    return impl == "triton" or (impl is None and runs_on_gpu(qkv.device))


def _prefers_fused(qkv: Tensor, k_pages: Tensor, plan: PrefixPlan) -> bool:
    _, kv_heads, _, dim = k_pages.shape
    group = (qkv.shape[1] // dim - 2 * kv_heads) // kv_heads
    fp8 = k_pages.dtype == torch.float8_e4m3fn
    kind = Kind.of(plan, group, dim, fp8=fp8, invariant=False, fused=True)
    return bool(TUNABLE.choose(kind.key, qkv.device, kind)["fused"])


TUNABLE = Tunable(  # two ops, or one
    "rotary_attention",
    rule=lambda gpu, kind: {"fused": int(kind.fuses())},
    candidates=lambda key, gpu: [{"fused": 0}, {"fused": 1}],
)


def _fused(
    qkv: Tensor,
    rotary: Rotary,
    k_pages: Tensor,
    v_pages: Tensor,
    plan: PrefixPlan,
    scale: float,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    window: int,
) -> Tensor:
    check_triton("rotary_attention", qkv.device)
    weights = (rotary.q_weight, rotary.k_weight, rotary.inv_freq)
    where = (rotary.positions, rotary.slots, k_pages, v_pages)
    check_shapes(qkv, *weights, *where, None, k_scale, v_scale)
    written = {"k_pages": k_pages, "v_pages": v_pages, "k_scale": k_scale, "v_scale": v_scale}
    read = {name: x for name, x in rotary._asdict().items() if isinstance(x, Tensor)}
    positions = read.pop("positions")
    check_layouts(qkv, positions, read | written)
    check(qkv.is_contiguous(), "qkv must be contiguous")
    check(len(qkv) == plan.num_rows, f"the plan is for {plan.num_rows} rows, not {len(qkv)}")
    check(scale > 0, f"scale must be positive, not {scale}")
    heads = qkv.shape[1] // k_pages.shape[3] - 2 * k_pages.shape[1]
    check_pages(qkv, heads, k_pages, v_pages, k_scale, v_scale, plan, window)
    made = cut_up(plan, qkv, heads, k_pages, window=window, fused=True)
    return launch(qkv, k_pages, v_pages, plan, *made, scale, k_scale, v_scale, rotary)[0]
