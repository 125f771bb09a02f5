"""FlashInfer: its paged decode (tensor cores) or prefill, and its multi-level cascade.

Planned outside the timed call. Written against flashinfer-python 0.6.13.
"""

from collections.abc import Callable
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from bench.peers.layout import Segment, Unavailable, indptr, levels, paged

WORKSPACE_BYTES = 512 << 20


def plain(inputs: dict, *, copied: bool = False) -> Callable[[], Tensor]:
    """Every sequence by itself, over shared physical pages or `copied` ones."""
    flashinfer, layout, q = _flashinfer(), paged(inputs, copied=copied), inputs["q"]
    arguments = (*_tables(layout.segments, layout.k.shape[2]), *_shape(q, layout.k))
    options = _options(inputs) | {"window_left": inputs["window"] - 1}
    if layout.decodes:
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            _workspace(q.device), "HND", use_tensor_cores=True
        )
    else:
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(_workspace(q.device), "HND")
        arguments = (_rows(layout.segments), *arguments)
        options["causal"] = True
    wrapper.plan(*arguments, **options)
    return lambda: wrapper.run(q, (layout.k, layout.v))


def cascade(inputs: dict) -> Callable[[], Tensor]:
    """A launch for every level of the tree, and a merge for every level but the last."""
    flashinfer, tree, q, k = _flashinfer(), levels(inputs), inputs["q"], inputs["k_pages"]
    tables = [_tables(segments, k.shape[2]) for segments in tree]
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(len(tree), _workspace(q.device), "HND")
    wrapper.plan(
        [_rows(segments) for segments in tree],
        *(list(of_levels) for of_levels in zip(*tables, strict=True)),
        *_shape(q, k),
        causal=True,  # of the last level, which holds the rows' own tokens
        **_options(inputs),
    )
    return lambda: wrapper.run(q, (k, inputs["v_pages"]))


def _flashinfer() -> ModuleType:
    try:
        import flashinfer
    except ImportError as error:
        raise Unavailable(f"not installed ({error})") from None
    return flashinfer


@cache
def _workspace(device: torch.device) -> Tensor:
    """For partial results of the call that runs: one for all wrappers."""
    return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)


def _rows(segments: list[Segment]) -> Tensor:
    return indptr([segment.rows for segment in segments])


def _tables(segments: list[Segment], page_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """kv_indptr, kv_indices, last_page_len: int32 on the host."""
    lasts = [(s.length - 1) % page_size + 1 if s.length else 0 for s in segments]
    return (
        indptr([len(segment.pages) for segment in segments]),
        torch.cat([segment.pages for segment in segments]),
        torch.tensor(lasts, dtype=torch.int32),
    )


def _shape(q: Tensor, k: Tensor) -> tuple[int, int, int, int]:
    return q.shape[1], k.shape[1], q.shape[2], k.shape[2]


def _options(inputs: dict) -> dict:
    dtype = inputs["q"].dtype
    return {"sm_scale": inputs["scale"], "q_data_type": dtype, "kv_data_type": dtype}
