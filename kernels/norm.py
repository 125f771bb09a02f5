"""RMSNorm and LayerNorm over the last axis, optionally fused with the preceding residual add.

Rounding, for 16-bit inputs: statistics are fp32. rms_norm rounds the normalised value to the
input's dtype before it multiplies by the weight, as transformers' Qwen3RMSNorm does; layer_norm
rounds once, at the end. With a residual, the rounded sum is normalised.

The Triton forms read and write each row once and keep it in registers in between: 4 bytes per
element in 16 bits, 8 with a residual.

rows        rows per CTA
num_warps
pdl         1: the kernel starts, and loads its vectors, while the kernel before it ends (sm_90).
            weight, bias and gamma must then have been written before that kernel started.
"""

from typing import overload

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.runtime.arithmetic import cdiv
from kernels.runtime.configs import Gpu, KernelConfig, Tunable
from kernels.runtime.dispatch import check, operators, pick
from kernels.runtime.dtypes import DTYPES
from kernels.runtime.pdl import pdl_options, release_next, wait_for_previous

MAX_WIDTH = 16384  # of the Triton forms: a row must fit in a CTA's registers


@overload
def rms_norm(
    x: Tensor, weight: Tensor, *, eps: float, residual: None = None, impl: str | None = None
) -> Tensor: ...


@overload
def rms_norm(
    x: Tensor, weight: Tensor, *, eps: float, residual: Tensor, impl: str | None = None
) -> tuple[Tensor, Tensor]: ...


def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float,
    residual: Tensor | None = None,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """y = s / sqrt(mean(s^2) + eps) * weight with s = x, or with s = x + residual.

    x, residual: [T, C]; weight: [C]; all of one dtype and device. Returns y [T, C], or with a
    residual (y, s). Raises ValueError for shapes, dtypes or devices that do not fit.
    """
    if torch.compiler.is_compiling():
        ops = operators()
        if residual is None:
            return ops.rms_norm(x, weight, eps, impl)
        return ops.add_rms_norm(x, residual, weight, eps, impl)
    _check_rows("rms_norm", x, {"weight": weight}, residual)
    return pick("rms_norm", impl, x.device, _RMS_NORM)(x, weight, eps, residual)


@overload
def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float,
    residual: None = None,
    gamma: None = None,
    impl: str | None = None,
) -> Tensor: ...


@overload
def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float,
    residual: Tensor,
    gamma: Tensor | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]: ...


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float,
    residual: Tensor | None = None,
    gamma: Tensor | None = None,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """y = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias with s = x, or residual + gamma * x.

    x, residual: [T, C]; weight, bias, gamma (LayerScale; None is 1): [C]; all of one dtype and
    device. Returns y [T, C], or with a residual (y, s). Raises ValueError for shapes, dtypes or
    devices that do not fit, and for a gamma without a residual.
    """
    if gamma is not None:
        check(residual is not None, "layer_norm: gamma scales x before the residual add: give both")
    if torch.compiler.is_compiling():
        ops = operators()
        if residual is None:
            return ops.layer_norm(x, weight, bias, eps, impl)
        return ops.add_layer_norm(x, residual, weight, bias, gamma, eps, impl)
    vectors = {"weight": weight, "bias": bias}
    if gamma is not None:
        vectors["gamma"] = gamma
    _check_rows("layer_norm", x, vectors, residual)
    form = pick("layer_norm", impl, x.device, _LAYER_NORM)
    return form(x, weight, bias, eps, residual, gamma)


def rms_norm_ref(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """The definition of `rms_norm`."""
    total = x if residual is None else x + residual
    wide = total.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    y = normed.to(x.dtype) * weight
    return y if residual is None else (y, total)


def layer_norm_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    residual: Tensor | None = None,
    gamma: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The definition of `layer_norm`."""
    total = x
    if residual is not None:
        update = x.float() if gamma is None else gamma.float() * x.float()
        total = (residual.float() + update).to(x.dtype)
    wide = total.float()
    wide = wide - wide.mean(-1, keepdim=True)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    y = (normed * weight.float() + bias.float()).to(x.dtype)
    return y if residual is None else (y, total)


def _rms_norm_portable(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None
) -> Tensor | tuple[Tensor, Tensor]:
    total = x if residual is None else x + residual
    # Without weight: F.rms_norm would multiply by it before rounding.
    y = F.rms_norm(total, weight.shape, eps=eps).mul_(weight)
    return y if residual is None else (y, total)


def _layer_norm_portable(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    residual: Tensor | None,
    gamma: Tensor | None,
) -> Tensor | tuple[Tensor, Tensor]:
    total = x
    if residual is not None:
        total = residual + x if gamma is None else torch.addcmul(residual, gamma, x)
    y = F.layer_norm(total, weight.shape, weight, bias, eps)
    return y if residual is None else (y, total)


@triton.jit(do_not_specialize=["rows"])
def rms_norm_kernel(
    x: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    y: tl.tensor,
    total: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    x_stride: tl.tensor,
    residual_stride: tl.tensor,
    eps: tl.tensor,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """ROWS rows, each of `width` <= BLOCK columns."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = tl.arange(0, BLOCK)
    mask = (row < rows) & (column < width)  # [ROWS, BLOCK]
    scale = tl.load(weight + column, mask=column < width, other=0)  # before the PDL wait
    wait_for_previous(PDL)
    release_next(PDL)
    s = tl.load(x + row * x_stride + column, mask=mask, other=0)
    if residual is not None:
        added = tl.load(residual + row * residual_stride + column, mask=mask, other=0)
        s = (s.to(tl.float32) + added.to(tl.float32)).to(s.dtype)
        tl.store(total + row * width + column, s, mask=mask)
    wide = s.to(tl.float32)
    wide *= tl.rsqrt(tl.sum(wide * wide, axis=1) / width + eps)[:, None]
    tl.store(y + row * width + column, wide.to(s.dtype) * scale, mask=mask)


@triton.jit(do_not_specialize=["rows"])
def layer_norm_kernel(
    x: tl.tensor,
    residual: tl.tensor,
    gamma: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    total: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    x_stride: tl.tensor,
    residual_stride: tl.tensor,
    eps: tl.tensor,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """ROWS rows, each of `width` <= BLOCK columns."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = tl.arange(0, BLOCK)
    valid = column < width
    mask = (row < rows) & valid  # [ROWS, BLOCK]
    scale = tl.load(weight + column, mask=valid, other=0).to(tl.float32)  # before the PDL wait
    shift = tl.load(bias + column, mask=valid, other=0).to(tl.float32)
    if gamma is not None:
        factor = tl.load(gamma + column, mask=valid, other=0).to(tl.float32)
    wait_for_previous(PDL)
    release_next(PDL)
    s = tl.load(x + row * x_stride + column, mask=mask, other=0)
    if residual is not None:
        update = s.to(tl.float32)
        if gamma is not None:
            update *= factor
        added = tl.load(residual + row * residual_stride + column, mask=mask, other=0)
        s = (added.to(tl.float32) + update).to(s.dtype)
        tl.store(total + row * width + column, s, mask=mask)
    wide = s.to(tl.float32)
    wide = tl.where(mask, wide - (tl.sum(wide, axis=1) / width)[:, None], 0.0)
    wide *= tl.rsqrt(tl.sum(wide * wide, axis=1) / width + eps)[:, None]
    tl.store(y + row * width + column, (wide * scale + shift).to(s.dtype), mask=mask)


def _rms_norm_triton(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None
) -> Tensor | tuple[Tensor, Tensor]:
    return _launch("rms_norm", rms_norm_kernel, x, residual, {"weight": weight}, eps)


def _layer_norm_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    residual: Tensor | None,
    gamma: Tensor | None,
) -> Tensor | tuple[Tensor, Tensor]:
    vectors = {"gamma": gamma, "weight": weight, "bias": bias}
    return _launch("layer_norm", layer_norm_kernel, x, residual, vectors, eps)


def _launch(
    op: str,
    kernel: triton.JITFunction,
    x: Tensor,
    residual: Tensor | None,
    vectors: dict[str, Tensor | None],
    eps: float,
) -> Tensor | tuple[Tensor, Tensor]:
    rows, width = x.shape
    check(width <= MAX_WIDTH, f"{op}: x must be at most {MAX_WIDTH} wide, not {width}")
    for name, tensor in ({"x": x, "residual": residual} | vectors).items():
        contiguous = tensor is None or tensor.stride(-1) == 1 or width == 1
        check(contiguous, f"{op}: {name} must have neighbouring columns (stride 1)")
    y = x.new_empty(x.shape)
    total = None if residual is None else x.new_empty(x.shape)
    if rows:
        bucket = triton.next_power_of_2(rows)
        key = f"{f'T<={bucket}' if bucket <= 64 else 'T>64'} C{width}"
        config = TUNABLE[op].choose(key, x.device, rows, width)
        kernel[(cdiv(rows, config["rows"]),)](
            x=x,
            residual=residual,
            **vectors,
            y=y,
            total=total,
            rows=rows,
            width=width,
            x_stride=x.stride(0),
            residual_stride=0 if residual is None else residual.stride(0),
            eps=eps,
            ROWS=config["rows"],
            BLOCK=triton.next_power_of_2(width),
            num_warps=config["num_warps"],
            **pdl_options(config, x.device),
        )
    return y if total is None else (y, total)


def _rule(gpu: Gpu, rows: int, width: int) -> KernelConfig:
    """Two loads of 16 bytes per thread and operand; narrow rows share a CTA once there are enough
    for every SM."""
    block = triton.next_power_of_2(width)
    rows_per_program = 1
    while block * rows_per_program < 1024 and rows >= 4 * rows_per_program * gpu.sms:
        rows_per_program *= 2
    num_warps = min(16, max(1, block * rows_per_program // 512))
    return {"rows": rows_per_program, "num_warps": num_warps, "pdl": 0}


def _candidates(key: str, gpu: Gpu) -> list[KernelConfig]:
    pairs = [(rows, warps) for rows in (1, 2) for warps in (1, 2, 4, 8, 16)]
    # Two rows of 4096 do not fit in the registers of one warp.
    plain = [{"rows": rows, "num_warps": warps, "pdl": 0} for rows, warps in pairs if warps >= rows]
    with_pdl = [config | {"pdl": 1} for config in plain if config["rows"] == 1]
    return plain + with_pdl * (gpu.arch >= 90)


TUNABLE = {op: Tunable(op, _rule, _candidates) for op in ("rms_norm", "layer_norm")}
_RMS_NORM = {"eager": rms_norm_ref, "portable": _rms_norm_portable, "triton": _rms_norm_triton}
_LAYER_NORM = {
    "eager": layer_norm_ref,
    "portable": _layer_norm_portable,
    "triton": _layer_norm_triton,
}


def _check_rows(op: str, x: Tensor, vectors: dict[str, Tensor], residual: Tensor | None) -> None:
    if x.dim() != 2 or x.shape[1] == 0:
        raise ValueError(f"{op}: x must be [T, C], not {list(x.shape)}")
    if x.dtype not in DTYPES:
        raise ValueError(f"{op}: x must be fp32, bf16 or fp16, not {x.dtype}")
    for name, tensor in [*vectors.items(), ("residual", residual)]:
        if tensor is None:
            continue
        shape = x.shape if name == "residual" else x.shape[1:]
        if tensor.shape != shape:
            raise ValueError(
                f"{op}: {name} must be {list(shape)} like x {list(x.shape)},"
                f" not {list(tensor.shape)}"
            )
        if tensor.dtype != x.dtype or tensor.device != x.device:
            raise ValueError(
                f"{op}: {name} must be {x.dtype} on {x.device} like x,"
                f" not {tensor.dtype} on {tensor.device}"
            )
