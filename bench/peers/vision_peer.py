"""Attention libraries as vision_attention: rotation by torch.compile, then the library's attention.

A peer "-alone" gets Q and K already rotated: its time is that of attention alone, without the
rotation that our op includes. SDPA runs neighbouring views of one grid as a batch, and concatenates
the batches if grids differ; the other peers run all views in one call.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.peers.flash_attention import fa2_peer, fa3_peer
from bench.peers.layout import indptr
from bench.peers.peer import TORCH, TORCH_GPU, Library, imported, on_gpu
from bench.peers.projector_peer import CUDNN
from bench.peers.sdpa_peer import only
from kernels.runtime.grids import Grid
from kernels.vision_attention import axial_rotary

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # rotated Q, rotated K, V [T, H, D] -> the same
Varlen = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]  # also: views' starts, max length


def vision(
    inputs: dict, *, prepare: Callable[[Tensor, Sequence[Grid]], Attend], alone: bool = False
) -> Callable[[], Tensor]:
    """vision_attention by the attention that `prepare` returns, or that attention `alone`."""
    qkv, grids, heads = (inputs[name] for name in ("qkv", "grids", "heads"))
    attend = prepare(qkv, grids)
    shape = (qkv.shape[1] // (3 * heads), inputs.get("theta", 1e4), qkv.device)
    tables = [axial_rotary(*grid, *shape) for grid in grids]
    cos, sin = (torch.cat(views)[:, None] for views in zip(*tables, strict=True))
    if alone:
        q, k, v = rotated(qkv, heads, cos, sin)
        return lambda: attend(q, k, v).flatten(1)
    rotate = torch.compile(rotated, dynamic=True)
    return lambda: attend(*rotate(qkv, heads, cos, sin)).flatten(1)


def rotated(qkv: Tensor, heads: int, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[T, 3 * H * D] and fp32 [T, 1, D / 2] -> rotated Q, rotated K, V, each [T, H, D]."""
    q, k, v = qkv.view(len(qkv), 3, heads, -1).unbind(1)

    def rotate(x: Tensor) -> Tensor:
        a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2).to(x.dtype)

    return rotate(q), rotate(k), v


def sdpa(backend: str, qkv: Tensor, grids: Sequence[Grid]) -> Attend:
    """scaled_dot_product_attention with `only` one backend."""
    batches = [(len(list(same)), rows * columns) for (rows, columns), same in groupby(grids)]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outs = []
        split = (x.split([n * tokens for n, tokens in batches]) for x in (q, k, v))
        for (n, tokens), *qkv in zip(batches, *split, strict=True):
            batch = (x.view(n, tokens, *x.shape[1:]).transpose(1, 2) for x in qkv)
            outs.append(F.scaled_dot_product_attention(*batch).transpose(1, 2).flatten(0, 1))
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def attend_with_backend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with only(backend):
            return attend(q, k, v)

    return attend_with_backend


def varlen(library: Callable[[torch.device], Varlen], qkv: Tensor, grids: Sequence[Grid]) -> Attend:
    """All views in one call, as packed sequences of different lengths."""
    attend, sizes = library(qkv.device), [rows * columns for rows, columns in grids]
    starts, max_len = indptr(sizes).to(qkv.device), max(sizes)
    return lambda q, k, v: attend(q, k, v, starts, max_len)


def torch_varlen(device: torch.device) -> Varlen:
    """The FlashAttention-2 that is part of torch."""
    on_gpu(device)
    attend = imported("torch.nn.attention.varlen").varlen_attn
    return lambda q, k, v, starts, max_len: attend(q, k, v, starts, starts, max_len, max_len)


PREPARED: dict[str, tuple[Library, Callable[[Tensor, Sequence[Grid]], Attend]]] = {
    "sdpa-flash": (TORCH, partial(sdpa, "FLASH_ATTENTION")),
    "sdpa-cudnn": (CUDNN, partial(sdpa, "CUDNN_ATTENTION")),
    "sdpa-efficient": (TORCH_GPU, partial(sdpa, "EFFICIENT_ATTENTION")),
    "torch-varlen": (TORCH_GPU, partial(varlen, torch_varlen)),
    "fa2-varlen": (fa2_peer.FA2, partial(varlen, fa2_peer.varlen)),
    "fa3-varlen": (fa3_peer.FA3, partial(varlen, fa3_peer.varlen)),
}
