"""The tensors behind the pages."""

import torch

from model.config import PRESETS
from model.kv_cache import KVCache


def test_fp8_pages_have_scales():
    """One fp32 scale per token and head, contiguous by layer, and none for other dtypes."""
    config = PRESETS["tiny"].decoder
    cache = KVCache(config, 3, dtype=torch.float8_e4m3fn, page_size=4)
    for pages, scale in ((cache.k, cache.k_scale), (cache.v, cache.v_scale)):
        assert pages.dtype == torch.float8_e4m3fn
        assert pages.shape == (config.layers, 3, config.kv_heads, 4, config.head_dim)
        assert scale.dtype == torch.float32 and scale.shape == pages.shape[:-1]
        assert scale.is_contiguous() and not scale.any()
    assert cache.k_scale.data_ptr() != cache.v_scale.data_ptr()
    assert KVCache(config, 1).k_scale is None and KVCache(config, 1).v_scale is None
