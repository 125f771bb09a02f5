"""A linear layer followed by quick_gelu: the first half of the vision tower's feed-forward block.

    y = quick_gelu(x W^T + b), quick_gelu(z) = z / (1 + e^(-1.702 z))

For 16-bit inputs the linear layer's result is rounded to their dtype before the activation, which
is computed in fp32 and rounded once more.

The Triton form is the library's matrix product and an activation kernel, or if `fused` our own
product (`gemm/op.py`), which applies the activation to its sums. Per element in 16 bits, the
separate activation kernel moves 4 bytes and the product computes 2 C operations: with C = 1536 and
an H200's peaks, 4.8 TB/s and 990 TFLOP/s, the kernel takes a quarter of the product's time. Fusing
therefore pays if our product is within a fifth of the library's speed. Until that is measured, the
rule does not fuse.
"""

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from kernels.activation import quick_gelu, quick_gelu_ref
from kernels.gemm import linear
from kernels.runtime.configs import Tunable
from kernels.runtime.dispatch import check, operators, pick
from kernels.runtime.dtypes import DTYPES


def linear_quick_gelu(
    x: Tensor, weight: Tensor, bias: Tensor, *, fused: bool | None = None, impl: str | None = None
) -> Tensor:
    """quick_gelu(x @ weight.T + bias): x [T, C], weight [F, C], bias [F] -> [T, F].

    fused: whether impl 'triton' is one kernel; None lets the kernel config choose
    Raises ValueError for shapes, dtypes or devices that do not fit.
    """
    if torch.compiler.is_compiling():
        return operators().linear_quick_gelu(x, weight, bias, fused, impl)
    check(x.ndim == 2, f"x must be [T, C], not {list(x.shape)}")
    check(x.dtype in DTYPES, f"x must be fp32, bf16 or fp16, not {x.dtype}")
    check(
        weight.ndim == 2 and weight.shape[1] == x.shape[1],
        f"weight must be [F, {x.shape[1]}] for x {list(x.shape)}, not {list(weight.shape)}",
    )
    check(bias.shape == weight.shape[:1], f"bias must be [{weight.shape[0]}] like weight")
    for name, tensor in (("weight", weight), ("bias", bias)):
        check(
            tensor.dtype == x.dtype and tensor.device == x.device,
            f"{name} must be {x.dtype} on {x.device} like x",
        )
    form = pick("linear_quick_gelu", impl, x.device, _FORMS)
    return form(x, weight, bias, fused)


def linear_quick_gelu_ref(
    x: Tensor, weight: Tensor, bias: Tensor, fused: bool | None = None
) -> Tensor:
    """The definition, the same with and without `fused`."""
    return quick_gelu_ref(F.linear(x, weight, bias))


def _portable(x: Tensor, weight: Tensor, bias: Tensor, fused: bool | None) -> Tensor:
    return quick_gelu(F.linear(x, weight, bias), impl="portable")


def _triton(x: Tensor, weight: Tensor, bias: Tensor, fused: bool | None) -> Tensor:
    if fused is None:
        bucket = triton.next_power_of_2(len(x))
        size = f"T<={bucket}" if bucket <= 4096 else "T>4096"
        key = f"{size} C{x.shape[1]} F{weight.shape[0]}"
        fused = bool(TUNABLE.choose(key, x.device)["fused"])
    if fused:
        return linear(x, weight, bias, quick_gelu=True)
    return quick_gelu(F.linear(x, weight, bias), impl="triton")


TUNABLE = Tunable(
    "linear_quick_gelu",
    rule=lambda gpu: {"fused": 0},
    candidates=lambda key, gpu: [{"fused": 0}, {"fused": 1}],
)
_FORMS = {"eager": linear_quick_gelu_ref, "portable": _portable, "triton": _triton}
