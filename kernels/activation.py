"""The two activations between a feed-forward block's matrix products."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels._launch import check, pick

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def silu_mul(gate_up: Tensor, *, impl: str | None = None) -> Tensor:
    """silu(gate) * up, where silu(g) = g * sigmoid(g) and gate_up = [gate | up].

    gate_up: [T, 2F]; returns [T, F] of its dtype. silu(gate) is computed in fp32 and rounded to
    that dtype before the product, as in transformers' Qwen3MLP. Raises ValueError for other shapes
    and dtypes.
    """
    _check_rows("silu_mul", "gate_up", gate_up)
    check(
        gate_up.shape[1] % 2 == 0,
        f"silu_mul: gate_up must be [T, 2F] with gate and up of equal width,"
        f" not {list(gate_up.shape)}",
    )
    return pick("silu_mul", impl, gate_up.device, _SILU_MUL)(gate_up)


def quick_gelu(x: Tensor, *, impl: str | None = None) -> Tensor:
    """x * sigmoid(1.702 x), computed in fp32 and rounded once.

    x: [T, F]; returns [T, F] of its dtype. Raises ValueError for other shapes and dtypes.
    """
    _check_rows("quick_gelu", "x", x)
    return pick("quick_gelu", impl, x.device, _QUICK_GELU)(x)


def silu_mul_ref(gate_up: Tensor) -> Tensor:
    """The definition of `silu_mul`."""
    gate, up = gate_up.chunk(2, dim=-1)
    wide = gate.float()
    return (wide * torch.sigmoid(wide)).to(gate.dtype) * up


def quick_gelu_ref(x: Tensor) -> Tensor:
    """The definition of `quick_gelu`."""
    wide = x.float()
    return (wide * torch.sigmoid(1.702 * wide)).to(x.dtype)


def _silu_mul_portable(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def _quick_gelu_portable(x: Tensor) -> Tensor:
    # In place: large fresh buffers cost a CPU more than the arithmetic.
    return (x.float() * 1.702).sigmoid_().mul_(x).to(x.dtype)


_SILU_MUL = {"eager": silu_mul_ref, "portable": _silu_mul_portable}
_QUICK_GELU = {"eager": quick_gelu_ref, "portable": _quick_gelu_portable}


def _check_rows(op: str, name: str, x: Tensor) -> None:
    check(x.dim() == 2, f"{op}: {name} must have two axes, not shape {list(x.shape)}")
    check(x.dtype in DTYPES, f"{op}: {name} must be fp32, bf16 or fp16, not {x.dtype}")
