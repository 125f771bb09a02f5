"""FlashInfer: paged decode (tensor cores) or prefill, multi-level cascade, norm and activation.

Attention is planned outside the timed call. FlashInfer's sampling is not a peer: it draws other
random numbers, so results cannot be compared. Written against flashinfer-python 0.6.13.
"""

from collections.abc import Callable
from functools import cache, partial
from types import ModuleType

import torch
from torch import Tensor

from bench.peers.layout import KVRange, indptr, levels, paged
from bench.peers.peer import Library, distribution, halves, imported, on_gpu

WORKSPACE_BYTES = 512 << 20


def plain(inputs: dict, *, copied: bool = False) -> Callable[[], Tensor]:
    """Attention of each sequence by itself, over shared physical pages or `copied` ones."""
    q = inputs["q"]
    flashinfer, layout = check(q.device), paged(inputs, copied=copied)
    tables = _tables(layout.kv_ranges, layout.k.shape[2])
    options = _options(inputs) | {"window_left": inputs["window"] - 1}
    if layout.decodes:
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            _workspace(q.device), "HND", use_tensor_cores=True
        )
        wrapper.plan(*tables, *_shape(q, layout.k), **options)
    else:
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(_workspace(q.device), "HND")
        rows = _rows(layout.kv_ranges)
        wrapper.plan(rows, *tables, *_shape(q, layout.k), causal=True, **options)
    return lambda: wrapper.run(q, (layout.k, layout.v))


def cascade(inputs: dict) -> Callable[[], Tensor]:
    """One launch per level of the tree, and a merge for each level except the last."""
    q, (k, v, *_) = inputs["q"], inputs["pages"]
    flashinfer, tree = check(q.device), levels(inputs)
    tables = [_tables(kv_ranges, k.shape[2]) for kv_ranges in tree]
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(len(tree), _workspace(q.device), "HND")
    wrapper.plan(
        [_rows(kv_ranges) for kv_ranges in tree],
        *(list(level_tables) for level_tables in zip(*tables, strict=True)),
        *_shape(q, k),
        causal=True,  # applies to the last level, which contains the rows' own tokens
        **_options(inputs),
    )
    return lambda: wrapper.run(q, (k, v))


def rms_norm(inputs: dict) -> Callable[[], object]:
    """RMS norm. A residual is added in place, in copies of x and of the residual."""
    x, weight, residual, eps = (inputs[name] for name in ("x", "weight", "residual", "eps"))
    flashinfer = check(x.device)
    if residual is None:
        return partial(flashinfer.rmsnorm, x, weight, eps)
    y, total = x.clone(), residual.clone()

    def call() -> tuple[Tensor, Tensor]:
        flashinfer.fused_add_rmsnorm(y, total, weight, eps)
        return y, total

    return call


def silu_mul(inputs: dict) -> Callable[[], Tensor]:
    gate_up = halves(inputs)
    return partial(check(gate_up.device).silu_and_mul, gate_up)


def check(device: torch.device) -> ModuleType:
    """The flashinfer module; raises Unavailable without it or without a GPU."""
    on_gpu(device)
    return imported("flashinfer")


@cache
def _workspace(device: torch.device) -> Tensor:
    """Memory for partial results, shared by all wrappers."""
    return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)


def _rows(kv_ranges: list[KVRange]) -> Tensor:
    return indptr([kv_range.rows for kv_range in kv_ranges])


def _tables(kv_ranges: list[KVRange], page_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """kv_indptr, kv_indices, last_page_len: int32 on the host."""
    last_lengths = [(s.length - 1) % page_size + 1 if s.length else 0 for s in kv_ranges]
    return (
        indptr([len(kv_range.pages) for kv_range in kv_ranges]),
        torch.cat([kv_range.pages for kv_range in kv_ranges]),
        torch.tensor(last_lengths, dtype=torch.int32),
    )


def _shape(q: Tensor, k: Tensor) -> tuple[int, int, int, int]:
    return q.shape[1], k.shape[1], q.shape[2], k.shape[2]


def _options(inputs: dict) -> dict:
    dtype = inputs["q"].dtype
    return {"sm_scale": inputs["scale"], "q_data_type": dtype, "kv_data_type": dtype}


FLASHINFER = Library(
    "FlashInfer",
    "pip install flashinfer-python==0.6.13",
    distribution("flashinfer-python"),
    check,
)
