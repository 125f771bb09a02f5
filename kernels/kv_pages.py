"""The paged KV cache of one layer, as all ops take it."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.runtime.dispatch import check


class KVPages(NamedTuple):
    """Pages of K and V of one layer, written in place by ops that store K and V.

    k, v: [num_pages, Hkv, page_size, D], contiguous and of one dtype
    k_scale, v_scale: fp32 [num_pages, Hkv, page_size] with pages of float8_e4m3fn
        (runtime/fp8.py), else None
    """

    k: Tensor
    v: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None

    @property
    def num_pages(self) -> int:
        return self.k.shape[0]

    @property
    def kv_heads(self) -> int:
        return self.k.shape[1]

    @property
    def page_size(self) -> int:
        return self.k.shape[2]

    @property
    def head_dim(self) -> int:
        return self.k.shape[3]

    @property
    def fp8(self) -> bool:
        return self.k.dtype == torch.float8_e4m3fn

    def map(self, function: Callable[[Tensor], Tensor]) -> "KVPages":
        """Apply `function` to every tensor that is not None."""
        scales = (x if x is None else function(x) for x in (self.k_scale, self.v_scale))
        return KVPages(function(self.k), function(self.v), *scales)

    def as_bytes(self) -> "KVPages":
        """The pages with FP8 values viewed as uint8: before sm_89 Triton has no e4m3 type."""
        if not self.fp8:
            return self
        return self._replace(k=self.k.view(torch.uint8), v=self.v.view(torch.uint8))

    def check(self, device: torch.device) -> None:
        """Raise ValueError unless the tensors fit together and are on `device`."""
        check(self.k.ndim == 4, "pages.k must be [num_pages, Hkv, page_size, D]")
        check(self.v.shape == self.k.shape, "pages.v must have the shape of pages.k")
        check(self.v.dtype == self.k.dtype, "pages.v must have the dtype of pages.k")
        shape, fp8 = self.k.shape[:3], self.fp8
        for name, scale in (("k_scale", self.k_scale), ("v_scale", self.v_scale)):
            if (scale is not None) != fp8:
                rule = "goes with pages of float8_e4m3fn: required there, None otherwise"
                raise ValueError(f"pages.{name} {rule}")
            if scale is not None and (scale.dtype != torch.float32 or scale.shape != shape):
                raise ValueError(f"pages.{name} must be fp32 {list(shape)}")
        for name, x in zip(self._fields, self, strict=True):
            if x is not None and not x.is_contiguous():
                raise ValueError(f"pages.{name} must be contiguous")
            if x is not None and x.device != device:
                raise ValueError(f"pages.{name} must be on {device}, not {x.device}")
