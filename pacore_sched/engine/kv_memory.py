"""How many KV pages there is memory for."""

import os
from pathlib import Path

import torch

from kernels.runtime.arithmetic import cdiv
from model.config import DecoderConfig
from model.errors import InputError
from model.kv_cache import PAGE_SIZE, page_bytes

# Of the memory that is free once the weights are there. The rest of a GPU's is for activations,
# the images' too, and CUDA graphs; a CPU's is not ours alone.
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
    """Pages for up to `max_kv_tokens`, as many of them as a share of the free memory has room for.

    max_kv_tokens: that could ever be used; nodes of the prefix tree round up to whole pages
    min_kv_tokens: fewer are of no use
    share: of the free memory; by default that in SHARE

    Raises InputError if `min_kv_tokens` do not fit, with what they need and what is free.
    """
    share = SHARE.get(device.type, SHARE["cpu"]) if share is None else share
    if not 0 < share <= 1:
        raise InputError(f"the share of memory for KV must be above 0 and at most 1, not {share}")
    size, free = page_bytes(config, dtype), free_bytes(device)
    fitting, least = int(share * free) // size, cdiv(max(min_kv_tokens, 1), PAGE_SIZE)
    if fitting < least:
        raise InputError(
            f"KV for {least * PAGE_SIZE} tokens needs {least * size / 1e9:.2f} GB, but of"
            f" {free / 1e9:.2f} GB of free memory {share:.0%} may be used: lower max_tokens,"
            " or take FP8 KV"
        )
    return max(least, min(fitting, cdiv(max_kv_tokens, PAGE_SIZE)))


def free_bytes(device: torch.device) -> int:
    """Memory that can be allocated on `device`; on a CPU that does not tell, all there is."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():  # what the page cache holds can be had as well
        lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
