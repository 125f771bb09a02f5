"""The memory plan: bytes for image embeddings, and the number of KV pages that fit next to them."""

import torch

from kernels.runtime.arithmetic import cdiv
from model.config import Config, DecoderConfig
from model.errors import InputError
from model.kv_cache import PAGE_SIZE, page_bytes
from model.memory import free_bytes

# Share of the memory that is free after loading the weights, for KV and image embeddings. The rest
# of a GPU's is for CUDA graphs, activations, including the images', and the cache of images seen
# recently (1 GiB at most); a CPU's is shared with other processes. Where a step needs more than the
# rest, KV gets less.
SHARE = {"cuda": 0.9, "cpu": 0.5}
# The part for image embeddings: next to the 10B, an 80 GB GPU has room for those of 118 images of
# 3024 x 3024.
IMAGE_SHARE = 0.05


def image_budget(config: Config, *, device: torch.device, kv_bytes: int = 0) -> int:
    """Bytes for the image embeddings of running problems: IMAGE_SHARE of the free memory that is
    left after `kv_bytes`, which are given where the user sets the number of pages; 0 for a
    text-only model."""
    if config.vision is None:
        return 0
    return int(IMAGE_SHARE * max(free_bytes(device) - kv_bytes, 0))


def pages_that_fit(
    config: DecoderConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    max_kv_tokens: int,
    min_kv_tokens: int = 1,
    image_bytes: int = 0,
    step_bytes: int = 0,
    share: float | None = None,
) -> int:
    """Pages for up to `max_kv_tokens`, as far as a share of the free memory has room for them.

    max_kv_tokens: the most tokens ever in use; prefix-tree nodes round up to whole pages
    min_kv_tokens: the number of tokens that must fit
    image_bytes: the part of the share that image embeddings take
    step_bytes: what the largest step takes besides KV (`prefill_bytes`), of all replicas
    share: share of the free memory; by default from SHARE

    Raises InputError if `min_kv_tokens` do not fit, with the memory needed and free.
    """
    share = SHARE.get(device.type, SHARE["cpu"]) if share is None else share
    if not 0 < share <= 1:
        raise InputError(
            f"the share of memory for KV must be more than 0 and at most 1, not {share}"
        )
    size, free = page_bytes(config, dtype), free_bytes(device)
    usable = min(int(share * free), free - step_bytes)
    fitting = (usable - image_bytes) // size
    min_pages = cdiv(max(min_kv_tokens, 1), PAGE_SIZE)
    if fitting < min_pages:
        part = f"only {share:.0%} of {free / 1e9:.2f} GB of free memory may be used"
        images = f", {image_bytes / 1e9:.2f} GB of it for images" if image_bytes else ""
        remedy = "max_tokens, or use FP8 KV"
        if usable < int(share * free):
            part = f"of {free / 1e9:.2f} GB of free memory a step takes {step_bytes / 1e9:.2f}"
            images = f", images {image_bytes / 1e9:.2f}" if image_bytes else ""
            remedy = f"max_running, {remedy}"
        raise InputError(
            f"KV for {min_pages * PAGE_SIZE} tokens needs {min_pages * size / 1e9:.2f} GB, but"
            f" {part}{images}: lower {remedy}"
        )
    return max(min_pages, min(fitting, cdiv(max_kv_tokens, PAGE_SIZE)))
