"""RMSNorm and LayerNorm over the last axis, each with the residual add that precedes it.

Rounding, for inputs of 16 bits: statistics are fp32. rms_norm rounds the normalised value to the
input's dtype before it multiplies with the weight, as transformers' Qwen3RMSNorm does; layer_norm
rounds once, at the end. Where a residual is added, the rounded sum is what gets normalised.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels._launch import check, pick

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float,
    residual: Tensor | None = None,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """y = s / sqrt(mean(s^2) + eps) * weight with s = x, or with s = x + residual.

    x, residual: [T, C]; weight: [C]; all of one dtype and device. Returns y [T, C], with a residual
    (y, s). Raises ValueError for shapes, dtypes or devices that do not fit.
    """
    _check_rows("rms_norm", x, {"weight": weight}, residual)
    return pick("rms_norm", impl, x.device, _RMS_NORM)(x, weight, eps, residual)


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
    device. Returns y [T, C], with a residual (y, s). Raises ValueError for shapes, dtypes or
    devices that do not fit, and for a gamma without a residual.
    """
    vectors = {"weight": weight, "bias": bias}
    if gamma is not None:
        check(residual is not None, "layer_norm: gamma scales x before the residual add: give both")
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
    # The fused op would multiply with its weight before it rounds, so it gets none.
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


_RMS_NORM = {"eager": rms_norm_ref, "portable": _rms_norm_portable}
_LAYER_NORM = {"eager": layer_norm_ref, "portable": _layer_norm_portable}


def _check_rows(op: str, x: Tensor, vectors: dict[str, Tensor], residual: Tensor | None) -> None:
    check(x.dim() == 2 and x.shape[1] > 0, f"{op}: x must be [T, C], not {list(x.shape)}")
    check(x.dtype in DTYPES, f"{op}: x must be fp32, bf16 or fp16, not {x.dtype}")
    expected = dict.fromkeys(vectors, x.shape[1:])
    given = dict(vectors)
    if residual is not None:
        expected["residual"], given["residual"] = x.shape, residual
    for name, tensor in given.items():
        shape = expected[name]
        check(
            tensor.shape == shape,
            f"{op}: {name} must be {list(shape)} like x {list(x.shape)}, not {list(tensor.shape)}",
        )
        check(
            tensor.dtype == x.dtype and tensor.device == x.device,
            f"{op}: {name} must be {x.dtype} on {x.device} like x,"
            f" not {tensor.dtype} on {tensor.device}",
        )
