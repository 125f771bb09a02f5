"""FlashAttention-2 over paged KV, from vLLM's shared object or from the package flash-attn.

vLLM's kernels support pages of any multiple of 16 tokens, the package's only of 256; for the
package, pages are rebuilt outside the timed call. Written against vllm 0.25.1 and flash-attn 2.8.3.
"""

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from bench.peers.flash_attention.vllm_object import arguments, loaded, unmasked, version
from bench.peers.layout import Paged, block_table, indptr, paged
from bench.peers.peer import Library, Unavailable, imported, on_gpu

PACKAGE_PAGE = 256  # tokens per page that the package's kernels support

# Values of arguments that vLLM's op requires and these calls do not use; all others are None.
DEFAULTS = {
    "p_dropout": 0.0,
    "zero_tensors": False,
    "softcap": 0.0,
    "return_softmax": False,
    "num_splits": 0,  # chosen by FA2
}


def one_call(inputs: dict, *, copied: bool = False) -> Callable[[], Tensor]:
    """Attention of each sequence by itself, over shared physical pages or `copied` ones."""
    library = check(inputs["q"].device)
    if hasattr(library, "flash_attn_with_kvcache"):
        return _package_call(library, inputs, paged(inputs, copied=copied, page_size=PACKAGE_PAGE))
    return _vllm_call(library, inputs, paged(inputs, copied=copied))


def varlen(device: torch.device) -> Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]:
    """Unmasked attention of q, k, v [T, H, D] within sequences that start at `starts`."""
    library = check(device)
    if hasattr(library, "flash_attn_varlen_func"):
        function = library.flash_attn_varlen_func
        return lambda q, k, v, starts, max_length: function(
            q, k, v, starts, starts, max_length, max_length
        )

    def attend(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, max_length: int) -> Tensor:
        named = DEFAULTS | unmasked(q, k, v, starts, max_length)
        return library.varlen_fwd(*arguments(library.varlen_fwd, named))[0]

    return attend


def check(device: torch.device) -> ModuleType:
    """vLLM's ops, else the package; raises Unavailable without either, or without a GPU."""
    on_gpu(device)
    return loaded(2) or imported("flash_attn")


def _vllm_call(library: ModuleType, inputs: dict, layout: Paged) -> Callable[[], Tensor]:
    if layout.k.shape[2] % 16:
        raise Unavailable("supports only pages of a multiple of 16 tokens")
    q, window = inputs["q"], inputs["window"]
    starts, lengths, max_rows, max_length = _sizes(layout, q.device)
    named = DEFAULTS | {
        "q": q,
        "k": layout.k.transpose(1, 2),  # [num_pages, page_size, Hkv, D]
        "v": layout.v.transpose(1, 2),
        "cu_seqlens_q": starts,
        "cu_seqlens_k": torch.zeros_like(starts),  # required, but not read if seqused_k is given
        "seqused_k": lengths,
        "block_table": block_table(layout.kv_ranges).to(q.device),
        "max_seqlen_q": max_rows,
        "max_seqlen_k": max_length,
        "softmax_scale": inputs["scale"],
        "is_causal": True,
        "window_size_left": window - 1,
        "window_size_right": 0 if window else -1,
    }
    values = arguments(library.varlen_fwd, named)
    return lambda: library.varlen_fwd(*values)[0]


def _package_call(library: ModuleType, inputs: dict, layout: Paged) -> Callable[[], Tensor]:
    q, window = inputs["q"], inputs["window"]
    k, v = (x.transpose(1, 2) for x in (layout.k, layout.v))  # [num_pages, page_size, Hkv, D]
    starts, lengths, max_rows, max_length = _sizes(layout, q.device)
    options = {
        "block_table": block_table(layout.kv_ranges).to(q.device),
        "softmax_scale": inputs["scale"],
        "causal": True,
        "window_size": (window - 1, 0 if window else -1),
    }
    if layout.decodes:
        decode = library.flash_attn_with_kvcache
        return lambda: decode(q[:, None], k, v, cache_seqlens=lengths, **options)[:, 0]
    ends = indptr([kv_range.length for kv_range in layout.kv_ranges]).to(q.device)
    sizes = (starts, ends, max_rows, max_length)
    return lambda: library.flash_attn_varlen_func(q, k, v, *sizes, **options)


def _sizes(layout: Paged, device: torch.device) -> tuple[Tensor, Tensor, int, int]:
    """Start rows and lengths of the sequences (int32, on the device); largest row count, length."""
    rows = [kv_range.rows for kv_range in layout.kv_ranges]
    lengths = [kv_range.length for kv_range in layout.kv_ranges]
    on_device = torch.tensor(lengths, dtype=torch.int32, device=device)
    return indptr(rows).to(device), on_device, max(rows), max(lengths)


FA2 = Library(
    "FlashAttention-2",
    "pip download --no-deps vllm==0.25.1, unzip FA2's object, set FA2_LIBRARY (docs/peers.md)",
    lambda: version(2, "flash_attn"),
    check,
)
