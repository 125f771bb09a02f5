"""Per-head RMSNorm, rotary and the paged KV store: from the QKV projection to attention's inputs.

    q_h <- rotate(rms_norm(q_h) * q_weight)        k_h <- rotate(rms_norm(k_h) * k_weight)
    pages.k[slot // page_size, h, slot % page_size] <- k_h        and the same for v, unchanged

The rotation pairs element i with i + R/2 of a head's first R elements (half rotation, as in
GPT-NeoX, Llama and Qwen3) and rotates by positions * frequencies[i] turns; elements from R on are
unchanged.

The Triton form is one launch with a CTA per token and block of heads. It reads and writes every
element once: 24 KiB per token with 32 + 2 * 8 heads of 128 in bf16.
"""

from collections.abc import Callable
from inspect import unwrap

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.kv_pages import KVPages
from kernels.rotary_tables import RotaryTables, cos_sin_table, norm_rotate_store
from kernels.runtime.arithmetic import cdiv
from kernels.runtime.configs import Gpu, KernelConfig, Tunable
from kernels.runtime.dispatch import check, operators, pick
from kernels.runtime.dtypes import DTYPES
from kernels.runtime.fp8 import e4m3_scale, has_native_e4m3, magnitude_bits, quantise_e4m3, to_e4m3
from kernels.runtime.rotary import cos_sin_of, pair_columns

FEW_TOKENS = 64  # decode: the config should give every SM work


def qk_norm_rope(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    frequencies: Tensor,
    positions: Tensor,
    slots: Tensor,
    pages: KVPages,
    *,
    eps: float = 1e-6,
    mrope_section: tuple[int, int, int] | None = None,
    tables: RotaryTables | None = None,
    impl: str | None = None,
) -> Tensor:
    """Normalise and rotate Q and K, store K and V into their pages, return Q as [T, Hq, D].

    qkv: [T, (Hq + 2 Hkv) * D], heads of Q first, then K, then V
    q_weight, k_weight: [D], or both None for a model without qk-norm
    frequencies: int64 [R / 2], R <= D, turns per position in units of 2^-64
        (`rotary_frequencies`), which keeps angles exact at any position
    positions: int [T]; with mrope_section int [3, T], each token's time, height and width:
        frequency i uses axis i % 3 while i < 3 * mrope_section[i % 3], and time from there on
        (the interleaved order of Qwen3-VL); mrope_section adds up to R / 2
    slots: int [T], page * page_size + offset, or -1 to store nothing
    pages: written in place, of any dtype
    tables: those of these positions and slots (`RotaryTables.of`), which the portable form then
        does not compute again; the other forms ignore them
    Raises ValueError for shapes that do not fit together and pages that `KVPages.check` rejects;
    the Triton form also for dtypes, strides and devices that it does not support.
    """
    if torch.compiler.is_compiling():
        tensors = (qkv, q_weight, k_weight, frequencies, positions, slots, *pages)
        return operators().qk_norm_rope(*tensors, eps, mrope_section, impl)
    pages.check(qkv.device)
    inputs = (qkv, q_weight, k_weight, frequencies, positions, slots, pages)
    check_shapes(*inputs, mrope_section)
    run = pick("qk_norm_rope", impl, qkv.device, _FORMS)
    given = {"tables": tables} if unwrap(run) is _qk_norm_rope_portable else {}
    return run(*inputs, eps=eps, mrope_section=mrope_section, **given)


def check_shapes(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    frequencies: Tensor,
    positions: Tensor,
    slots: Tensor,
    pages: KVPages,
    mrope_section: tuple[int, int, int] | None,
) -> None:
    kv_heads, head_dim = pages.kv_heads, pages.head_dim
    heads, rest = divmod(qkv.shape[-1], head_dim)
    check(qkv.ndim == 2 and rest == 0 and heads > 2 * kv_heads, "qkv must be [T, (Hq + 2 Hkv) * D]")
    check((q_weight is None) == (k_weight is None), "give both q_weight and k_weight, or neither")
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        check(weight is None or weight.shape == (head_dim,), f"{name} must be [{head_dim}]")
    fits = frequencies.ndim == 1 and 2 * len(frequencies) <= head_dim
    check(fits and frequencies.dtype == torch.int64, "frequencies must be int64 [R/2], R <= D")
    tokens = len(qkv)
    expected = [tokens] if mrope_section is None else [3, tokens]
    check(list(positions.shape) == expected, f"positions must be {expected}")
    check(slots.shape == (tokens,), f"slots must be [{tokens}]")
    fits = mrope_section is None or sum(mrope_section) == len(frequencies)
    check(fits, "mrope_section must add up to R/2")


def qk_norm_rope_ref(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    frequencies: Tensor,
    positions: Tensor,
    slots: Tensor,
    pages: KVPages,
    *,
    eps: float,
    mrope_section: tuple[int, int, int] | None = None,
) -> Tensor:
    """The definition. Rounds to qkv's dtype after the norm, after its weight and after rotation."""
    kv_heads, page_size, head_dim = pages.kv_heads, pages.page_size, pages.head_dim
    heads = qkv.shape[-1] // head_dim - 2 * kv_heads
    q, k, v = qkv.view(-1, heads + 2 * kv_heads, head_dim).split([heads, kv_heads, kv_heads], dim=1)
    if q_weight is not None and k_weight is not None:
        q = _rms_norm(q, eps) * q_weight
        k = _rms_norm(k, eps) * k_weight
    positions = _positions_of_frequencies(positions, mrope_section)
    cos, sin = cos_sin_table(frequencies, positions)  # [T, 1, R/2]
    q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)

    keep = slots >= 0
    page, offset = slots[keep] // page_size, slots[keep] % page_size
    for x, target, scale in (
        (k[keep], pages.k, pages.k_scale),
        (v[keep], pages.v, pages.v_scale),
    ):
        if scale is None:
            target[page, :, offset] = x.to(target.dtype)
        else:  # as bytes: not every device supports indexed stores of e4m3
            stored, scale[page, :, offset] = quantise_e4m3(x)
            target.view(torch.uint8)[page, :, offset] = stored.view(torch.uint8)
    return q


def _qk_norm_rope_portable(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    frequencies: Tensor,
    positions: Tensor,
    slots: Tensor,
    pages: KVPages,
    *,
    eps: float,
    mrope_section: tuple[int, int, int] | None,
    tables: RotaryTables | None,
) -> Tensor:
    if tables is None:
        positions = _positions_of_frequencies(positions, mrope_section)
        tables = RotaryTables.of(frequencies, positions, slots, pages)
    return norm_rotate_store(qkv, q_weight, k_weight, tables, pages, eps)


def _positions_of_frequencies(positions: Tensor, section: tuple[int, int, int] | None) -> Tensor:
    """Positions [T, 1], or with a section [T, R/2]: for each frequency, that on its axis."""
    if section is None:
        return positions[:, None]
    axis = [i % 3 if i < 3 * section[i % 3] else 0 for i in range(sum(section))]
    return positions[axis].T


def _rms_norm(x: Tensor, eps: float) -> Tensor:
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    a, b, rest = x.float().split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1).to(x.dtype)


@triton.jit
def load_heads(
    token: tl.tensor,
    head: tl.tensor,
    columns: tl.tuple,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """The first and second elements of the pairs of heads [BLOCK]: two tiles [BLOCK, PAIRS]."""
    first, second, valid = columns
    mask = (head < HEADS)[:, None] & valid
    start = token + head[:, None] * HEAD_DIM
    return tl.load(start + first, mask=mask, other=0), tl.load(start + second, mask=mask, other=0)


@triton.jit
def norm_rotate(
    x: tl.tensor,
    y: tl.tensor,
    weight: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    eps: tl.tensor,
    columns: tl.tuple,
    HEAD_DIM: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Normalise, weight and rotate the pairs (x, y) [BLOCK, PAIRS], rounding after each step."""
    first, second, valid = columns
    dtype: tl.constexpr = x.dtype
    if weight is not None:
        x_weight = tl.load(weight + first, mask=valid, other=0)  # [PAIRS]
        y_weight = tl.load(weight + second, mask=valid, other=0)
        x, y = x.to(tl.float32), y.to(tl.float32)
        scale = tl.rsqrt(tl.sum(x * x + y * y, axis=1) / HEAD_DIM + eps)[:, None]
        x, y = (x * scale).to(dtype) * x_weight, (y * scale).to(dtype) * y_weight
    x, y = x.to(tl.float32), y.to(tl.float32)
    return (x * cos - y * sin).to(dtype), (y * cos + x * sin).to(dtype)


@triton.jit
def store_heads(
    out: tl.tensor,
    scales: tl.tensor,
    row: tl.tensor,
    x: tl.tensor,
    y: tl.tensor,
    mask: tl.tensor,
    columns: tl.tuple,
    HEAD_DIM: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
) -> None:
    """Store the pairs (x, y) [BLOCK, PAIRS] to rows [BLOCK] of `out`; with `scales`, as e4m3."""
    first, second, valid = columns
    if scales is not None:
        x, y = x.to(tl.float32), y.to(tl.float32)
        scale = e4m3_scale(tl.maximum(magnitude_bits(x), magnitude_bits(y)))
        tl.store(scales + row, scale, mask=mask)
        inverse = tl.div_rn(1.0, scale)[:, None]
        x, y = to_e4m3(x * inverse, NATIVE_FP8), to_e4m3(y * inverse, NATIVE_FP8)
    out += row[:, None] * HEAD_DIM
    mask = mask[:, None] & valid
    tl.store(out + first, x.to(out.dtype.element_ty), mask=mask)
    tl.store(out + second, y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def qk_norm_rope_kernel(
    qkv: tl.tensor,
    q_weight: tl.tensor,
    k_weight: tl.tensor,
    frequencies: tl.tensor,
    positions: tl.tensor,
    slots: tl.tensor,
    k_pages: tl.tensor,
    v_pages: tl.tensor,
    k_scale: tl.tensor,
    v_scale: tl.tensor,
    q_out: tl.tensor,
    qkv_stride: tl.tensor,
    axis_stride: tl.tensor,
    eps: tl.tensor,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY: tl.constexpr,
    PAIRS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEIGHT: tl.constexpr,  # end of the frequencies of this axis, or 0
    WIDTH: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
) -> None:
    """BLOCK_Q heads of one token's Q, or BLOCK_KV heads of its K or V."""
    Q_BLOCKS: tl.constexpr = (HEADS + BLOCK_Q - 1) // BLOCK_Q
    KV_BLOCKS: tl.constexpr = (KV_HEADS + BLOCK_KV - 1) // BLOCK_KV
    t = (tl.program_id(0) // (Q_BLOCKS + 2 * KV_BLOCKS)).to(tl.int64)
    block = tl.program_id(0) % (Q_BLOCKS + 2 * KV_BLOCKS)
    token = qkv + t * qkv_stride
    columns = pair_columns(HEAD_DIM, ROTARY, PAIRS)
    if block < Q_BLOCKS:
        head = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
        x, y = load_heads(token, head, columns, HEADS, HEAD_DIM)
        cos, sin = cos_sin_of(frequencies, positions + t, axis_stride, ROTARY, PAIRS, HEIGHT, WIDTH)
        x, y = norm_rotate(x, y, q_weight, cos, sin, eps, columns, HEAD_DIM)
        mask = head < HEADS
        store_heads(q_out, None, t * HEADS + head, x, y, mask, columns, HEAD_DIM, NATIVE_FP8)
        return
    block -= Q_BLOCKS
    head = block % KV_BLOCKS * BLOCK_KV + tl.arange(0, BLOCK_KV)
    slot = tl.load(slots + t).to(tl.int64)
    mask = (head < KV_HEADS) & (slot >= 0)
    row = (slot // PAGE_SIZE * KV_HEADS + head) * PAGE_SIZE + slot % PAGE_SIZE
    token += HEADS * HEAD_DIM
    if block < KV_BLOCKS:
        x, y = load_heads(token, head, columns, KV_HEADS, HEAD_DIM)
        cos, sin = cos_sin_of(frequencies, positions + t, axis_stride, ROTARY, PAIRS, HEIGHT, WIDTH)
        x, y = norm_rotate(x, y, k_weight, cos, sin, eps, columns, HEAD_DIM)
        store_heads(k_pages, k_scale, row, x, y, mask, columns, HEAD_DIM, NATIVE_FP8)
    else:
        x, y = load_heads(token + KV_HEADS * HEAD_DIM, head, columns, KV_HEADS, HEAD_DIM)
        store_heads(v_pages, v_scale, row, x, y, mask, columns, HEAD_DIM, NATIVE_FP8)


def _qk_norm_rope_triton(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    frequencies: Tensor,
    positions: Tensor,
    slots: Tensor,
    pages: KVPages,
    *,
    eps: float,
    mrope_section: tuple[int, int, int] | None,
) -> Tensor:
    check_layouts(qkv, q_weight, k_weight, frequencies, positions, slots, pages)
    kv_heads, head_dim = pages.kv_heads, pages.head_dim
    tokens, heads = len(qkv), qkv.shape[1] // head_dim - 2 * kv_heads
    q = qkv.new_empty(tokens, heads, head_dim)
    if tokens == 0:
        return q
    few = tokens <= FEW_TOKENS
    key = f"T{'<=' if few else '>'}{FEW_TOKENS} {heads}/{kv_heads} D{head_dim}"
    config = TUNABLE.choose(key, qkv.device, few, heads, kv_heads, head_dim)
    blocks = cdiv(heads, config["block_q"]) + 2 * cdiv(kv_heads, config["block_kv"])
    qk_norm_rope_kernel[(tokens * blocks,)](
        qkv,
        q_weight,
        k_weight,
        frequencies,
        positions,
        slots,
        *pages.as_bytes(),
        q,
        qkv_stride=qkv.stride(0),
        axis_stride=positions.stride(0),
        eps=eps,
        HEADS=heads,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        ROTARY=2 * len(frequencies),
        PAIRS=triton.next_power_of_2(head_dim // 2),
        PAGE_SIZE=pages.page_size,
        HEIGHT=3 * mrope_section[1] if mrope_section else 0,
        WIDTH=3 * mrope_section[2] if mrope_section else 0,
        NATIVE_FP8=has_native_e4m3(qkv.device),
        BLOCK_Q=config["block_q"],
        BLOCK_KV=config["block_kv"],
        num_warps=config["num_warps"],
    )
    return q


def check_layouts(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    frequencies: Tensor,
    positions: Tensor,
    slots: Tensor,
    pages: KVPages,
) -> None:
    """Check what the kernel assumes beyond `check_shapes` and `KVPages.check`."""
    check(qkv.dtype in DTYPES, f"qkv must be fp32, bf16 or fp16, not {qkv.dtype}")
    check(qkv.stride(1) == 1, "qkv must have neighbouring columns (stride 1)")
    check(pages.head_dim % 2 == 0, "pages must have an even head_dim")
    stored = pages.k.dtype
    check(pages.fp8 or stored in DTYPES, f"pages must be fp32, bf16, fp16 or e4m3, not {stored}")
    integers = (torch.int32, torch.int64)
    for name, x, dtypes in (
        ("q_weight", q_weight, (qkv.dtype,)),
        ("k_weight", k_weight, (qkv.dtype,)),
        ("frequencies", frequencies, (torch.int64,)),
        ("positions", positions, integers),
        ("slots", slots, integers),
    ):
        if x is None:
            continue
        check(x.dtype in dtypes, f"{name} must be {' or '.join(map(str, dtypes))}, not {x.dtype}")
        check(x.device == qkv.device, f"{name} must be on {qkv.device} like qkv, not {x.device}")
        check(x.is_contiguous(), f"{name} must be contiguous")


def _rule(gpu: Gpu, few: bool, heads: int, kv_heads: int, head_dim: int) -> KernelConfig:
    """Heads of Q and heads of K or V per CTA, and warps.

    A warp loads 16 bytes of both halves per thread at once: 512 elements. Few tokens are spread
    that thin. With many, each warp has two such loads in flight; 32 warps make 64 KiB per SM.
    """
    heads_at_once = max(1, 512 // triton.next_power_of_2(head_dim))
    block = heads_at_once if few else 2 * heads_at_once
    return {
        "block_q": min(block, triton.next_power_of_2(heads)),
        "block_kv": min(block, triton.next_power_of_2(kv_heads)),
        "num_warps": 1,
    }


def _candidates(key: str, gpu: Gpu) -> list[KernelConfig]:
    shapes = ((1, 1), (2, 1), (4, 1), (8, 1), (16, 1), (8, 2), (16, 2), (32, 4))
    return [{"block_q": m, "block_kv": min(m, 8), "num_warps": warps} for m, warps in shapes]


_FORMS: dict[str, Callable] = {
    "eager": qk_norm_rope_ref,
    "portable": _qk_norm_rope_portable,
    "triton": _qk_norm_rope_triton,
}


TUNABLE = Tunable("qk_norm_rope", _rule, _candidates)
