"""xformers' split-K Triton decode over paged KV. Written against xformers 0.0.35.

It needs pages of [page_size, Hkv, D], which are built outside the timed call.
"""

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from bench.peers.layout import block_table, paged
from bench.peers.peer import Library, Unavailable, distribution, imported, on_gpu


def split_k(inputs: dict) -> Callable[[], Tensor]:
    """Attention of each sequence by itself, over shared physical pages."""
    q = inputs["q"]
    fmha, layout = check(q.device), paged(inputs)
    if inputs["window"] or not layout.decodes:
        raise Unavailable("is only called for decode without a window")
    bias = fmha.attn_bias.PagedBlockDiagonalPaddedKeysMask.from_seqlens(
        q_seqlen=[1] * len(layout.kv_ranges),
        kv_seqlen=[kv_range.length for kv_range in layout.kv_ranges],
        block_tables=block_table(layout.kv_ranges).to(q.device),
        page_size=layout.k.shape[2],
        device=q.device,
    )
    kv_heads, dim = layout.k.shape[1], q.shape[2]
    query = q.view(1, len(q), kv_heads, -1, dim)  # [1, T, Hkv, group, D]
    k, v = (
        x.transpose(1, 2).reshape(1, -1, kv_heads, 1, dim).expand(-1, -1, -1, query.shape[3], -1)
        for x in (layout.k, layout.v)
    )
    op, scale = fmha.triton_splitk.FwOp, inputs["scale"]

    def call() -> Tensor:
        out = fmha.memory_efficient_attention_forward(query, k, v, bias, scale=scale, op=op)
        return out.view_as(q)

    return call


def check(device: torch.device) -> ModuleType:
    """xformers' attention module; raises Unavailable without it or without a GPU."""
    on_gpu(device)
    return imported("xformers.ops.fmha")


XFORMERS = Library(
    "xformers",
    "pip install xformers==0.0.35",
    distribution("xformers"),
    check,
)
