"""The number of KV pages that fit in memory."""

import torch

from kernels.runtime.arithmetic import cdiv
from model.config import DecoderConfig
from model.errors import InputError
from model.kv_cache import PAGE_SIZE, page_bytes
from model.memory import free_bytes

# Share of the memory that is free after loading the weights. The rest of a GPU's is for CUDA graphs
# and activations, including the images'; a CPU's is shared with other processes.
SHARE = {"cuda": 0.9, "cpu": 0.5}


def pages_that_fit(
    config: DecoderConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    max_kv_tokens: int,
    min_kv_tokens: int = 1,
    share: float | None = None,
) -> int:
    """Pages for up to `max_kv_tokens`, as far as a share of the free memory has room for them.

    max_kv_tokens: the most tokens ever in use; prefix-tree nodes round up to whole pages
    min_kv_tokens: the number of tokens that must fit
    share: share of the free memory; by default from SHARE

    Raises InputError if `min_kv_tokens` do not fit, with the memory needed and free.
    """
    share = SHARE.get(device.type, SHARE["cpu"]) if share is None else share
    if not 0 < share <= 1:
        raise InputError(
            f"the share of memory for KV must be more than 0 and at most 1, not {share}"
        )
    size, free = page_bytes(config, dtype), free_bytes(device)
    fitting, min_pages = int(share * free) // size, cdiv(max(min_kv_tokens, 1), PAGE_SIZE)
    if fitting < min_pages:
        raise InputError(
            f"KV for {min_pages * PAGE_SIZE} tokens needs {min_pages * size / 1e9:.2f} GB, but only"
            f" {share:.0%} of {free / 1e9:.2f} GB of free memory may be used: lower max_tokens,"
            " or use FP8 KV"
        )
    return max(min_pages, min(fitting, cdiv(max_kv_tokens, PAGE_SIZE)))
