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
from kernels.errors import ImplError
from kernels.runtime.dispatch import default_impl


class Linear(nn.Module):
    """x W^T with a weight W [N, K] that is plain, packed, or both.

    `weight` is plain until `pack`. On a CPU the portable form computes with a packed weight if that
    is faster here; it packs the weight when it is first needed, and again after it was replaced or
    changed in place. (Changes through `.data` or NumPy go unnoticed: call `unpack` after them.)
    Impl "eager" computes with the plain weight. A layer that is used with both holds both.
    """

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight
        self._packed: Tensor | None = None
        self._packed_from: tuple[int, ...] = ()  # which weight: its identity, memory, version
        self._pack_next = False  # when it is next used: it was unpacked for a moment
        self._plain_freed = False  # as `weight.is_mkldnn`, which the compiler does not see
        self.register_state_dict_pre_hook(_unpack_for_now)
        self.register_load_state_dict_pre_hook(_unpack_for_now)

    def forward(self, x: Tensor, impl: str | None = None) -> Tensor:
        """[..., N] of x [..., K]."""
        if torch.compiler.is_compiling():
            if self._plain_freed:
                raise ImplError("a packed weight cannot be compiled: call `Decoder.unpack` first")
            return F.linear(x, self.weight)
        if self.packs(impl):
            if self._pack_next:
                self.pack()
            return onednn.product(x, self._pack())
        self._restore()
        return F.linear(x, self.weight)

    def packs(self, impl: str | None) -> bool:
        """Whether `forward` computes with a packed weight. Never with one that was created in
        inference mode, which does not count changes."""
        weight = self.weight
        portable = (impl or default_impl(weight.device)) == "portable"
        packable = weight.device.type == "cpu" and not weight.is_inference()
        return portable and packable and onednn.packing_pays(weight.dtype)

    def pack(self) -> None:
        """Hold the weight only packed: views of its plain storage no longer belong to it."""
        self.weight, self._packed = _parameter(self._pack), None
        self._pack_next, self._plain_freed = False, True

    def unpack(self, *, for_now: bool = False) -> None:
        """Hold the weight only plain; `for_now`: until it is next used, if it was packed only."""
        self._pack_next = for_now and (self._pack_next or self.weight.is_mkldnn)
        self._restore()
        self._packed = None

    def _pack(self) -> Tensor:
        weight, packed = self.weight, self._packed
        if weight.is_mkldnn:
            return weight
        now = (id(weight), weight.data_ptr(), weight._version)
        if packed is None or self._packed_from != now:
            with torch.inference_mode(False), torch.no_grad():
                self._packed = packed = onednn.pack(weight)
            self._packed_from = now
        return packed

    def _restore(self) -> None:
        if self.weight.is_mkldnn:
            packed = self.weight
            self.weight = weight = _parameter(packed.to_dense)
            self._packed, self._plain_freed = packed.detach(), False
            self._packed_from = (id(weight), weight.data_ptr(), weight._version)

    def _apply(self, *args: Any, **options: Any) -> "Linear":
        """Called for every change of device or dtype."""
        self.unpack(for_now=True)
        return super()._apply(*args, **options)

    def __getstate__(self) -> dict[str, Any]:
        """For copies, which are plain: a packed tensor has no storage that could be copied."""
        state = self.__dict__ | {"_packed": None, "_packed_from": ()}
        if self.weight.is_mkldnn:
            plain = {"weight": _parameter(self.weight.to_dense)}
            state |= {"_parameters": self._parameters | plain}
            state |= {"_pack_next": True, "_plain_freed": False}
        return state


def _unpack_for_now(module: Linear, *_: object) -> None:
    module.unpack(for_now=True)


def _parameter(value: Callable[[], Tensor]) -> nn.Parameter:
    """A parameter whose later changes in place are counted: not an inference tensor."""
    with torch.inference_mode(False), torch.no_grad():
        return nn.Parameter(value(), requires_grad=False)


M = TypeVar("M", bound=nn.Module)


class ModuleList(nn.ModuleList, Generic[M]):
    """nn.ModuleList of modules of one class, for mypy: items of PyTorch's own are unchecked."""

    if TYPE_CHECKING:

        def __iter__(self) -> Iterator[M]: ...
