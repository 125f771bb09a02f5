"""FlashAttention-3, from vLLM's shared object or from the package flash_attn_3; Hopper only.

The tile scheduler's metadata of paged calls is computed outside the timed call, as in vLLM. Written
against vllm 0.25.1.
"""

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from bench.peers.flash_attention.vllm_object import arguments, loaded, unmasked, version
from bench.peers.layout import KVRange, block_table, indptr, levels, paged
from bench.peers.peer import Library, Unavailable, imported, on_gpu

# Values of arguments that the op requires and these calls do not use; all others are None.
DEFAULTS = {
    "softcap": 0.0,
    "has_softcap": False,
    "is_rotary_interleaved": True,
    "num_splits": 0,  # chosen by FA3
    "sm_margin": 0,
    "attention_chunk": 0,
    "max_seqlen_k_new": 0,
    "cp_world_size": 1,
    "cp_rank": 0,
}


def one_call(inputs: dict, *, copied: bool = False) -> Callable[[], Tensor]:
    """Attention of each sequence by itself, over shared physical pages or `copied` ones."""
    library, layout = check(inputs["q"].device), paged(inputs, copied=copied)
    call = _paged_call(library, inputs, layout.k, layout.v, layout.kv_ranges, causal=True)
    return lambda: call()[0]


def cascade(inputs: dict) -> Callable[[], Tensor]:
    """One call per level of the tree (two for one prefix and its suffixes), and a merge."""
    library, tree = check(inputs["q"].device), levels(inputs)
    calls = [
        _paged_call(
            library,
            inputs,
            inputs["pages"].k,
            inputs["pages"].v,
            kv_ranges,
            causal=kv_ranges is tree[-1],
        )
        for kv_ranges in tree
    ]
    fused = torch.compile(merge, dynamic=True)
    return lambda: fused(*zip(*(call() for call in calls), strict=True))


def varlen(device: torch.device) -> Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]:
    """Unmasked attention of q, k, v [T, H, D] within sequences that start at `starts`.

    FA3 computes the scheduler's metadata within the call.
    """
    library = check(device)

    def attend(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, max_length: int) -> Tensor:
        named = DEFAULTS | unmasked(q, k, v, starts, max_length) | {"num_splits": 1}
        return library.fwd(*arguments(library.fwd, named))[0]

    return attend


def merge(outs: tuple[Tensor, ...], lses: tuple[Tensor, ...]) -> Tensor:
    """Merge partial results [T, Hq, D] by log-sum-exp [Hq, T] (natural base), in fp32."""
    weights = torch.stack(lses).softmax(0).transpose(1, 2)[..., None]
    return (torch.stack(outs).float() * weights).sum(0).to(outs[0].dtype)


def _paged_call(
    library: ModuleType,
    inputs: dict,
    k: Tensor,
    v: Tensor,
    kv_ranges: list[KVRange],
    causal: bool,
) -> Callable[[], tuple[Tensor, Tensor]]:
    """A call over block tables that returns out [T, Hq, D] and lse [Hq, T]."""
    q, window = inputs["q"], inputs["window"]
    lengths = [kv_range.length for kv_range in kv_ranges]
    rows = [kv_range.rows for kv_range in kv_ranges]
    named = DEFAULTS | {
        "q": q,
        "k": k.transpose(1, 2),  # [num_pages, page_size, Hkv, D]
        "v": v.transpose(1, 2),
        "cu_seqlens_q": indptr(rows).to(q.device),
        "seqused_k": torch.tensor(lengths, dtype=torch.int32, device=q.device),
        "max_seqlen_q": max(rows),
        "max_seqlen_k": max(lengths),
        "page_table": block_table(kv_ranges).to(q.device),
        "softmax_scale": inputs["scale"],
        "is_causal": causal,
        "window_size_left": window - 1,
        "window_size_right": 0 if window else -1,
        "batch_size": len(kv_ranges),
        "num_heads": q.shape[1],
        "num_heads_k": k.shape[1],
        "headdim": q.shape[2],
        "headdim_v": q.shape[2],
        "qkv_dtype": q.dtype,
        "page_size": k.shape[2],
    }
    metadata = library.get_scheduler_metadata
    named["scheduler_metadata"] = metadata(*arguments(metadata, named))
    values = arguments(library.fwd, named)
    return lambda: tuple(library.fwd(*values)[:2])


def check(device: torch.device) -> ModuleType:
    """The torch.ops namespace with `fwd` and `get_scheduler_metadata`, of vLLM or the package.

    Raises Unavailable without either, or without a Hopper GPU.
    """
    on_gpu(device)
    if torch.cuda.get_device_capability(device)[0] != 9:
        raise Unavailable("needs a Hopper GPU")
    ops = loaded(3)
    if ops is None:
        imported("flash_attn_interface")  # registers the ops
        ops = torch.ops.flash_attn_3
    return ops


FA3 = Library(
    "FlashAttention-3",
    "pip download --no-deps vllm==0.25.1, unzip FA3's object, set FA3_LIBRARY (docs/peers.md)",
    lambda: version(3, "flash_attn_3"),
    check,
)
