"""The KV cache: the page pool's tensors for all layers. The caller assigns pages to sequences."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kernels.kv_pages import KVPages
from kernels.runtime.staging import on_device
from model.config import DecoderConfig

PAGE_SIZE = 64
SCALE_BYTES = 4  # FP8 pages have one fp32 scale per token, head, and K or V


def page_bytes(config: DecoderConfig, dtype: torch.dtype, page_size: int = PAGE_SIZE) -> int:
    """Bytes of one page of all layers."""
    values = config.kv_bytes_per_token(dtype.itemsize)
    scales = 2 * config.layers * config.kv_heads * SCALE_BYTES if dtype.itemsize == 1 else 0
    return page_size * (values + scales)


class KVCache:
    """k, v: [layers, num_pages, kv_heads, page_size, head_dim]; one head's page is contiguous.

    With dtype torch.float8_e4m3fn, k_scale and v_scale are fp32 [layers, num_pages, kv_heads,
    page_size], one scale per token and head (kernels/runtime/fp8.py); otherwise they are None.
    """

    def __init__(
        self,
        config: DecoderConfig,
        num_pages: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        page_size: int = PAGE_SIZE,
    ) -> None:
        shape = (config.layers, num_pages, config.kv_heads, page_size, config.head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.k_scale = self.v_scale = None
        if dtype == torch.float8_e4m3fn:
            self.k_scale, self.v_scale = torch.zeros((2, *shape[:-1]), device=device)
        self.num_pages = num_pages
        self.page_size = page_size

    def layer(self, index: int) -> KVPages:
        """One layer's pages, with their scales if any."""
        return KVPages(self.k, self.v, self.k_scale, self.v_scale).map(lambda x: x[index])

    def to_host(self, pages: Sequence[int]) -> list[Tensor]:
        """Bit-exact copies of pages in pinned memory, [layers, n, ...] for each of the tensors.

        The copies are enqueued on the current stream, without waiting for them: work enqueued later
        may overwrite the pages, and `from_host` may read the copies.
        """
        index, copies = self._index(pages), []
        for tensor in self._bytes():
            shape = (len(tensor), len(pages), *tensor.shape[2:])
            copy = torch.empty(shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            for copied, layer in zip(copy, tensor, strict=True):  # by layer: saves device memory
                copied.copy_(layer.index_select(0, index), non_blocking=True)
            copies.append(copy)
        return copies

    def from_host(self, copies: Sequence[Tensor], pages: Sequence[int]) -> None:
        """Write what `to_host` returned into the same number of pages, else raise ValueError."""
        if len(pages) != copies[0].shape[1]:
            raise ValueError(
                f"the copies are of {copies[0].shape[1]} pages, but `pages` lists {len(pages)}"
            )
        index = self._index(pages)
        for tensor, copy in zip(self._bytes(), copies, strict=True):
            for layer, copied in zip(tensor, copy, strict=True):
                layer.index_copy_(0, index, copied.to(tensor.device, non_blocking=True))

    def _index(self, pages: Sequence[int]) -> Tensor:
        return on_device(np.array(pages, np.int64), self.k.device)

    def _bytes(self) -> list[Tensor]:
        """All tensors of the cache, FP8 values viewed as bytes: not every op takes FP8."""
        tensors = [x for x in (self.k, self.v, self.k_scale, self.v_scale) if x is not None]
        return [x.view(torch.uint8) if x.dtype.itemsize == 1 else x for x in tensors]
