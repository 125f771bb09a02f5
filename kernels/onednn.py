"""Matrix products by oneDNN instead of the BLAS that PyTorch uses for fp32, with packed weights.

A packed weight is in the blocked layout that oneDNN computes with. From a plain one, either library
first rearranges the whole weight, in every call: with the few rows of a decode step that costs more
than the product. Packing moves values without changing them.

Code for a product is generated per number of rows, and kept by oneDNN and by PyTorch, for 1,024
products each: 0.6 MB per product, which a server with prompts of all lengths fills (docs/log.md).
"""

import os
import platform
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.runtime.environment import variable

KEPT_PRODUCTS = 64  # a step needs five; generating the code takes one to three milliseconds
for _name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):  # read at the first product
    os.environ.setdefault(_name, str(KEPT_PRODUCTS))

ROWS = 16  # oneDNN chooses the layout for this many; measured to be as good from 1 row to 2,048


def pack(weight: Tensor) -> Tensor:
    """A packed copy of a plain weight [N, K]."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias: [..., N] of x [..., K], with a weight [N, K] that is packed or plain."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear with a plain weight: for many rows, where packing would gain little."""
    pays = x.device.type == "cpu" and products_pay(x.dtype)
    return product(x, weight, bias) if pays else F.linear(x, weight, bias)


@cache
def packing_pays(dtype: torch.dtype) -> bool:
    """Whether products with packed weights are faster than `F.linear` on this CPU.

    By what the CPU is, not by a measurement, so that results have the same bits in all processes.
    On x86 they are 0.9 to 3.5 times as fast with 4 to 64 rows (docs/log.md); others were not
    measured.
    PACORE_ONEDNN overrules it, where PyTorch has oneDNN.
    """
    return _choice(dtype, platform.machine().lower() in ("x86_64", "amd64"))


@cache
def products_pay(dtype: torch.dtype) -> bool:
    """Whether plain products are faster, too: with AVX-512, which PyTorch's BLAS does not use on
    every CPU, but not with AVX2, where they take a tenth longer."""
    return packing_pays(dtype) and _choice(
        dtype, "AVX512" in torch.backends.cpu.get_cpu_capability()
    )


def _choice(dtype: torch.dtype, pays: bool) -> bool:
    choice = variable("PACORE_ONEDNN")
    return _supported(dtype) and (pays if choice == "auto" else choice == "1")


def _supported(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.float32:
        return True
    ops = torch.ops.mkldnn
    supports = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype)
    return supports is not None and bool(getattr(ops, f"_is_mkldnn_{supports}_supported")())
