"""The tensors behind the KV pages of all layers. Who owns which page is the caller's affair."""

import torch

from model.config import DecoderConfig

PAGE_SIZE = 64


class KVCache:
    """k, v: [layers, num_pages, kv_heads, page_size, head_dim]; one head's page is contiguous.

    With dtype torch.float8_e4m3fn, k_scale and v_scale are fp32 [layers, num_pages, kv_heads,
    page_size], one scale per token and head (kernels/fp8.py); with any other they are None.
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

    def layer(self, index: int) -> dict[str, torch.Tensor | None]:
        """One layer's pages, and their scales if they have any, by the names that ops take."""
        tensors = {"k_pages": self.k, "v_pages": self.v}
        tensors |= {"k_scale": self.k_scale, "v_scale": self.v_scale}
        return {name: x if x is None else x[index] for name, x in tensors.items()}
