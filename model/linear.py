"""Linear layers whose weight a CPU can hold packed: in the blocked layout that oneDNN uses.

Without it, a product first rearranges the whole weight, in every call: with the few rows of a
decode step that costs more than the product. Packing moves the weight's values without changing
them, so plain and packed weights convert to each other bit for bit.
"""

import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.runtime.dispatch import default_impl
from kernels.runtime.environment import variable

ROWS = 16  # oneDNN chooses the layout for this many; measured to be as good from 1 row to 2,048


class Linear(nn.Module):
    """x W^T with a weight W [N, K] that is plain, packed, or both.

    `weight` is plain unless `pack` has been called. Impl "eager" computes with the plain weight,
    and unpacks it if necessary. On a CPU the portable form computes with a packed one if that is
    faster here; it packs the weight when it is first needed, and again after changes in place.
    """

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight
        self._packed: Tensor | None = None
        self._version = 0  # of the weight when it was packed
        self.register_state_dict_pre_hook(_unpack)
        self.register_load_state_dict_pre_hook(_unpack)

    def forward(self, x: Tensor, impl: str | None = None) -> Tensor:
        """[..., N] of x [..., K]."""
        if self.packs(impl):
            return packed_product(x, self._pack())
        self._restore()
        return F.linear(x, self.weight)

    def packs(self, impl: str | None) -> bool:
        """Whether `forward` computes with a packed weight."""
        weight = self.weight
        portable = (impl or default_impl(weight.device)) == "portable"
        packable = weight.device.type == "cpu" and not weight.is_inference()
        return portable and packable and packing_pays(weight.dtype)

    def pack(self) -> None:
        """Pack the weight and free its plain storage: views of that no longer belong to it."""
        self.weight = _parameter(self._pack)

    def unpack(self) -> None:
        """Keep the weight only in its plain form."""
        self._restore()
        self._packed = None

    def _pack(self) -> Tensor:
        if self._packed is None or not (
            self.weight.is_mkldnn or self.weight._version == self._version
        ):
            self._packed, self._version = pack(self.weight), self.weight._version
        return self._packed

    def _restore(self) -> None:
        if self.weight.is_mkldnn:
            self.weight = _parameter(self.weight.to_dense)
            self._version = self.weight._version

    def _apply(self, *args: Any, **options: Any) -> "Linear":
        """Called for every change of device or dtype."""
        self.unpack()
        return super()._apply(*args, **options)


def _unpack(module: Linear, *_: object) -> None:
    module.unpack()


def _parameter(value: Callable[[], Tensor]) -> nn.Parameter:
    """A parameter whose later changes in place are counted: not an inference tensor."""
    with torch.inference_mode(False), torch.no_grad():
        return nn.Parameter(value(), requires_grad=False)


def pack(weight: Tensor) -> Tensor:
    """A packed copy of a plain weight [N, K]."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)


def packed_product(x: Tensor, packed: Tensor) -> Tensor:
    """x W^T: [..., N] of x [..., K]."""
    return torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


@cache
def packing_pays(dtype: torch.dtype) -> bool:
    """Whether products with packed weights are at least 1.25 times as fast on this CPU.

    Measured once, in some 30 ms, on the shape of a decode step. The margin keeps the choice, and
    with it the bits of all results, the same in all processes; PACORE_PACKED_WEIGHTS fixes it.
    """
    choice = variable("PACORE_PACKED_WEIGHTS")
    if choice == "0" or not _supported(dtype):
        return False
    return choice == "1" or _speedup(dtype) >= 1.25


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
                ("packed", [lambda w=w: packed_product(x, w) for w in packed]),
            ):
                start = time.perf_counter()
                for call in calls:
                    call()
                best[name] = min(best[name], time.perf_counter() - start)
    return best["plain"] / best["packed"]
