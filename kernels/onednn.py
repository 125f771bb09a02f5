"""Matrix products by oneDNN instead of the BLAS that PyTorch uses for fp32, with packed weights.

A packed weight is in the blocked layout that oneDNN computes with. From a plain one, either library
first rearranges the whole weight, in every call: with the few rows of a decode step that costs more
than the product. Packing moves values without changing them.
"""

import time
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.runtime.environment import variable

ROWS = 16  # oneDNN chooses the layout for this many; measured to be as good from 1 row to 2,048
SPEEDUP = 1.25


def pack(weight: Tensor) -> Tensor:
    """A packed copy of a plain weight [N, K]."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias: [..., N] of x [..., K], with a weight [N, K] that is packed or plain."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear with a plain weight, by oneDNN where `is_faster` says so of packed ones: for many
    rows, where packing would gain little."""
    faster = x.device.type == "cpu" and is_faster(x.dtype)
    return product(x, weight, bias) if faster else F.linear(x, weight, bias)


@cache
def is_faster(dtype: torch.dtype) -> bool:
    """Whether products with packed weights are at least SPEEDUP times as fast on this CPU.

    Measured once, in some 30 ms, on the shape of a decode step. The margin keeps the choice, and
    with it the bits of all results, the same in all processes; PACORE_ONEDNN fixes it.
    """
    choice = variable("PACORE_ONEDNN")
    if choice == "0" or not _supported(dtype):
        return False
    return choice == "1" or _speedup(dtype) >= SPEEDUP


def _supported(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.float32:
        return True
    ops = torch.ops.mkldnn
    supports = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype)
    return supports is not None and bool(getattr(ops, f"_is_mkldnn_{supports}_supported")())


def _speedup(dtype: torch.dtype) -> float:
    """Of packed over plain weights, both read from memory or the last-level cache."""
    with torch.inference_mode():
        x = torch.full((ROWS, 512), 0.5, dtype=dtype)
        weights = [torch.full((2048, 512), 0.5, dtype=dtype) for _ in range(4)]
        packed = [pack(weight) for weight in weights]
        best = {"plain": float("inf"), "packed": float("inf")}
        for _ in range(7):
            for name, calls in (
                ("plain", [lambda w=w: F.linear(x, w) for w in weights]),
                ("packed", [lambda w=w: product(x, w) for w in packed]),
            ):
                start = time.perf_counter()
                for call in calls:
                    call()
                best[name] = min(best[name], time.perf_counter() - start)
    return best["plain"] / best["packed"]
