"""Tests of the KV cache's tensors."""

import pytest
import torch

from model.config import PRESETS
from model.kv_cache import KVCache
from tests.kernels.limits.reserved import reserved


def test_fp8_pages_have_scales():
    """Guards the scales: one fp32 per token and head, contiguous; none for other dtypes."""
    config = PRESETS["tiny"].decoder
    cache = KVCache(config, 3, dtype=torch.float8_e4m3fn, page_size=4)
    for pages, scale in ((cache.k, cache.k_scale), (cache.v, cache.v_scale)):
        assert pages.dtype == torch.float8_e4m3fn
        assert pages.shape == (config.layers, 3, config.kv_heads, 4, config.head_dim)
        assert scale.dtype == torch.float32 and scale.shape == pages.shape[:-1]
        assert scale.is_contiguous() and not scale.any()
    assert cache.k_scale.data_ptr() != cache.v_scale.data_ptr()
    assert KVCache(config, 1).k_scale is None and KVCache(config, 1).v_scale is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_to_the_host_and_back(device: str, dtype: torch.dtype):
    """Guards against lost bits, pages in another order, and writes to any other page."""
    config = PRESETS["tiny"].decoder
    cache = KVCache(config, 6, dtype=dtype, page_size=4, device=device)
    for x in cache._bytes():
        bits = torch.randint(0, 256, x.view(torch.uint8).shape, dtype=torch.uint8, device=device)
        x.view(torch.uint8).copy_(bits)
    before = [x.view(torch.uint8).clone() for x in cache._bytes()]
    copies = cache.to_host([4, 0, 1])
    cache.from_host(copies, [2, 3, 5])
    for x, was in zip(cache._bytes(), before, strict=True):
        after = x.view(torch.uint8)
        assert torch.equal(after[:, [2, 3, 5]], was[:, [4, 0, 1]])
        assert torch.equal(after[:, [0, 1, 4]], was[:, [0, 1, 4]])
    with pytest.raises(ValueError, match="the copies are of 3 pages, but `pages` lists 2"):
        cache.from_host(copies, [2, 3])


def test_to_the_host_from_large_offsets():
    """Guards pages past 2^31 elements and 2^32 bytes: their bits, and those of no other page."""
    config = PRESETS["tiny"].decoder
    cache, values = KVCache(config, 1, page_size=4), config.kv_heads * 4 * config.head_dim
    shape = (config.layers, 2**31 // values + 3, *cache.k.shape[2:])
    cache.k, cache.v = (reserved(shape, torch.float32) for _ in range(2))
    first, last = 1, shape[1] - 1
    for x in (cache.k, cache.v):
        x[:, last] = torch.randn(config.layers, *shape[2:])
    copies = cache.to_host([last])
    cache.from_host(copies, [last - 1])
    cache.from_host(copies, [first])
    for x, copy in zip((cache.k, cache.v), copies, strict=True):
        assert copy.any()
        for page in (first, last - 1, last):
            assert torch.equal(x[:, page], copy[:, 0]), page
        assert not x[:, 0].any() and not x[:, 2].any()
