"""The tensors behind the KV pages of all layers. Who owns which page is the caller's affair."""

import torch

from model.config import DecoderConfig

PAGE_SIZE = 64


class KVCache:
    """k, v: [layers, num_pages, kv_heads, page_size, head_dim]; one head's page is contiguous."""

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
        self.num_pages = num_pages
        self.page_size = page_size
