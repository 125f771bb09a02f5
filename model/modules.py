"""Modules that the model consists of: linear layers, and lists of modules of one class.

A CPU can hold a linear layer's weight packed (kernels/onednn.py). Packing keeps every bit, so plain
and packed weights convert to each other.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import onednn
from kernels.runtime.dispatch import default_impl


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
            return onednn.product(x, self._pack())
        self._restore()
        return F.linear(x, self.weight)

    def packs(self, impl: str | None) -> bool:
        """Whether `forward` computes with a packed weight."""
        weight = self.weight
        portable = (impl or default_impl(weight.device)) == "portable"
        packable = weight.device.type == "cpu" and not weight.is_inference()
        return portable and packable and onednn.is_faster(weight.dtype)

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
            self._packed, self._version = onednn.pack(self.weight), self.weight._version
        return self._packed

    def _restore(self) -> None:
        if self.weight.is_mkldnn:
            self.weight = _parameter(self.weight.to_dense)
            self._version = self.weight._version

    def _apply(self, *args: Any, **options: Any) -> "Linear":
        """Called for every change of device or dtype."""
        self.unpack()
        return super()._apply(*args, **options)

    def __getstate__(self) -> dict[str, Any]:
        """For copies: a packed tensor has no storage that could be copied."""
        self.unpack()
        return self.__dict__.copy()


def _unpack(module: Linear, *_: object) -> None:
    module.unpack()


def _parameter(value: Callable[[], Tensor]) -> nn.Parameter:
    """A parameter whose later changes in place are counted: not an inference tensor."""
    with torch.inference_mode(False), torch.no_grad():
        return nn.Parameter(value(), requires_grad=False)


M = TypeVar("M", bound=nn.Module)


class ModuleList(nn.ModuleList, Generic[M]):
    """nn.ModuleList of modules of one class, for mypy: items of PyTorch's own are unchecked."""

    if TYPE_CHECKING:

        def __iter__(self) -> Iterator[M]: ...
