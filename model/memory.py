"""Free memory of a device, a check that a model's weights fit into it, and what a prefill takes."""

import os
from collections.abc import Iterator
from pathlib import Path

import torch

from kernels.prefix_attention.portable import PRODUCT_QUERIES, SECTION_TOKENS
from kernels.runtime.dtypes import dtype_name
from model.config import DecoderConfig
from model.errors import InputError

# Of a prefill: on a GPU, cuBLAS's workspace and the partials of attention's CTAs; on a CPU, buffers
# of libraries, and freed memory that the allocator keeps.
WORKSPACE_BYTES = 64 << 20
TOKEN_BYTES = 96  # of a prompt's token: ids and KV slots as Python ints, and its share of a page's
_FP32 = 4

_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int:
    """Memory that can be allocated on `device`.

    On a CPU: what the system has available, or what the process's control groups (of a container
    or a batch job) still allow if that is less; the total where the system reports neither.
    """
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return max(0, min([_system_bytes(), *_cgroup_bytes()]))


def check_weights_fit(name: str, values: int, dtype: torch.dtype, device: torch.device) -> None:
    """Raise InputError unless `device` has memory for model `name`: `values` numbers of `dtype`."""
    need, free = values * dtype.itemsize, free_bytes(device)
    if need <= free:
        return
    half = values * torch.bfloat16.itemsize
    advice = "use a device with more memory"
    if half <= free:
        advice = f"in bfloat16 they need {half / 1e9:.2f} GB"
    raise InputError(
        f"the weights of {name} need {need / 1e9:.2f} GB in {dtype_name(dtype)}, but {device} has"
        f" {free / 1e9:.2f} GB of free memory: {advice}"
    )


def prefill_bytes(
    config: DecoderConfig, tokens: int, chunk: int, dtype: torch.dtype, *, sampled: int = 1
) -> int:
    """The most memory, besides weights and KV pages, that reading a prompt of `tokens` tokens in
    steps of at most `chunk` takes, with the default forms of all ops.

    dtype: of the model
    sampled: rows whose next token a step draws, for several prompts or rollouts

    Does not depend on the number of layers, nor on tokens * chunk: attention keeps no scores or
    masks of a whole context, and reads K and V from their pages. Tensors of `chunk` rows are those
    alive at the same time: hidden states, and either the feed-forward block's or attention's. The
    portable form of attention needs most: eight copies of the queries in fp32.
    """
    rows, size = min(tokens, chunk), dtype.itemsize
    q, kv = (heads * config.head_dim for heads in (config.heads, config.kv_heads))
    feed_forward = 3 * config.mlp_width * size  # gate, up, and their product
    attention = (q + 2 * kv) * size + 8 * (q + 2 * config.heads) * _FP32
    row = 4 * config.hidden * size + max(feed_forward, attention) + 2 * config.head_dim * _FP32
    section = max(rows, SECTION_TOKENS)  # tokens whose K and V are gathered, perhaps also in fp32
    scores = 3 * PRODUCT_QUERIES * section * _FP32  # of one head, and their softmax
    logits = (16 + 2 * sampled) * config.vocab_size * _FP32  # and what sampling makes of them
    token = TOKEN_BYTES + config.kv_heads  # the portable form has an int64 per page and KV head
    return (
        rows * (row + 256)  # ids, positions, slots
        + 4 * section * kv * _FP32
        + scores
        + logits
        + tokens * token
        + WORKSPACE_BYTES
    )


def _system_bytes() -> int:
    meminfo = _PROC / "meminfo"
    if meminfo.exists():  # MemAvailable includes the page cache
        lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _cgroup_bytes() -> Iterator[int]:
    """What each limit on this process's control group and the groups around it still allows.

    Files are those of the kernel's cgroup-v2.rst and cgroup-v1/memory.rst. Inside a container the
    group's path may not exist: its limits are then in the root that the container sees.
    """
    own = _PROC / "self/cgroup"
    for line in own.read_text().splitlines() if own.exists() else ():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, limit, usage, prefix = _CGROUPS, "memory.max", "memory.current", ""
        elif "memory" in controllers.split(","):
            root, prefix = _CGROUPS / "memory", "total_"
            limit, usage = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        group = root / path.strip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(root):
                yield from _allowed(folder, limit, usage, prefix)


def _allowed(folder: Path, limit: str, usage: str, prefix: str) -> Iterator[int]:
    """The bytes that a group may still use, if it has a limit; it can drop its page cache."""
    try:
        allowed = (folder / limit).read_text().strip()
        used = int((folder / usage).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except OSError:  # no such group, or none with a limit, such as the root
        return
    cache = sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("inactive", "active"))
    if allowed != "max":
        yield int(allowed) - used + cache
