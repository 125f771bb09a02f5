"""Attention of a step's query rows over the prefix tree of paged KV.

    out[r] = softmax(scale * q[r] K^T) V    over all tokens that row r sees (see prefix_plan.py)

One op for decode, prefill, chunked prefill and mixtures of them. The eager form, the definition,
gathers the whole KV of every sequence. The portable form reads each node once for all its rows and
merges the partials by log-sum-exp; it is the fast path on a CPU. The Triton form does the same on a
GPU, in two launches (schedule.py, kernel.py).

Floor of a decode step: K and V of every token of the tree once, 2 * Hkv * D * itemsize bytes each.
"""

import math
from collections.abc import Iterator
from inspect import unwrap

import torch
from torch import Tensor

from kernels.kv_pages import KVPages
from kernels.plan_node import PlanNode
from kernels.prefix_attention.launch import prefix_attention_triton
from kernels.prefix_attention.portable import prefix_attention_portable
from kernels.prefix_plan import PlanTensors, PrefixPlan
from kernels.runtime.dispatch import check, operators, pick

EAGER_SCORES = 1 << 28  # of the eager form, at a time: 1 GiB in fp32


def prefix_attention(
    q: Tensor,
    pages: KVPages,
    plan: PrefixPlan | PlanTensors,
    *,
    scale: float,
    window: int = 0,
    batch_invariant: bool = False,
    return_lse: bool = False,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend q [T, Hq, D] to `pages`, which have q's dtype or are FP8, according to `plan`.

    Hq is a multiple of Hkv; query head h reads KV head h // (Hq / Hkv). Softmax and sums are fp32,
    the result has q's dtype. A row that sees no token gives zeros. With `return_lse` also returns
    log(sum(exp(scale * q k))), natural base, fp32 [T, Hq], -inf for such a row.

    scale: positive
    window: the most tokens at the end of its sequence that a row sees, itself included; 0: no limit
    batch_invariant: a row's bits depend on its own path alone, not on the rest of the batch, as
        long as the path is divided into the same nodes; Triton form only. Needs one partial per
        chunk: the workspace grows with rows and length, to gigabytes for a long prefill

    Raises ValueError for shapes, dtypes, strides and devices that do not fit together or the plan.
    """
    if torch.compiler.is_compiling():
        out, lse = operators().prefix_attention(
            q, *pages, plan.tensors, scale, window, batch_invariant, impl
        )
        return (out, lse) if return_lse else out
    check(q.ndim == 3, "q must be [T, Hq, D]")
    pages.check(q.device)
    plan = PrefixPlan.of(plan, len(q), pages)
    check_attention(q, q.shape[1], pages, plan, scale, window)
    check(q.shape[2] == pages.head_dim, "q and pages must have the same head_dim")
    forms = {"eager": prefix_attention_ref, "portable": prefix_attention_portable}
    forms["triton"] = prefix_attention_triton
    form = pick("prefix_attention", impl, q.device, forms)
    options = {"window": window}
    if batch_invariant:
        supported = unwrap(form) is prefix_attention_triton  # `form` may be wrapped in a span
        check(supported, "batch_invariant: only impl 'triton' supports it")
        options["batch_invariant"] = True
    out, lse = form(q, pages, plan, scale, **options)
    return (out, lse) if return_lse else out


def prefix_attention_ref(
    q: Tensor,
    pages: KVPages,
    plan: PrefixPlan,
    scale: float,
    *,
    window: int = 0,
) -> tuple[Tensor, Tensor]:
    """The definition: for each run of rows with one path, gather the path's KV and attend to it."""
    out = torch.zeros_like(q)
    lse = q.new_full(q.shape[:2], -math.inf, dtype=torch.float32)
    group = q.shape[1] // pages.kv_heads
    for start, end, path in _eager_rows(plan, q.shape[1]):
        index = torch.arange(start, end, device=q.device)[:, None]
        keys: list[Tensor] = []
        values: list[Tensor] = []
        masks = []
        for node in path:
            ids = torch.tensor(node.pages, dtype=torch.long, device=q.device)
            for parts, source, scales in (
                (keys, pages.k, pages.k_scale),
                (values, pages.v, pages.v_scale),
            ):
                kv = source[ids].float()
                kv = kv if scales is None else kv * scales[ids][..., None]
                kv = kv.transpose(0, 1).flatten(1, 2)[:, : node.kv_len]
                parts.append(kv.repeat_interleave(group, dim=0))  # [Hq, kv_len, D]
            token = torch.arange(node.kv_len, device=q.device)
            masks.append(token <= node.kv_len - node.num_new + index - node.row_start)
        seen = torch.cat(masks, dim=1)  # [rows, tokens]
        if window:
            age = seen.flip(1).cumsum(1).flip(1)  # 1 for the last token that the row sees
            seen = seen & (age <= window)
        rows = q[start:end].transpose(0, 1).float()  # [Hq, rows, D]
        scores = rows @ torch.cat(keys, dim=1).transpose(1, 2) * scale
        scores = scores.masked_fill(~seen, -math.inf)
        result = scores.softmax(dim=-1) @ torch.cat(values, dim=1)
        out[start:end] = result.transpose(0, 1).to(q.dtype)
        lse[start:end] = scores.logsumexp(dim=-1).transpose(0, 1)
    return out, lse


def _eager_rows(plan: PrefixPlan, heads: int) -> Iterator[tuple[int, int, list[PlanNode]]]:
    """Runs of rows with one path, cut so that their scores fit in EAGER_SCORES."""
    for start, end, path in plan.sequences:
        scores_of_row = heads * sum(node.kv_len for node in path)
        at_once = max(1, EAGER_SCORES // scores_of_row)
        for first in range(start, end, at_once):
            yield first, min(first + at_once, end), path


def check_attention(
    q: Tensor, heads: int, pages: KVPages, plan: PrefixPlan, scale: float, window: int
) -> None:
    """Raise ValueError unless q, the pages, the plan and the options fit together.

    q: [T, ...] or the projection, of which only rows, dtype and device are checked
    pages: checked by `KVPages.check` before
    """
    check(len(q) == plan.num_rows, f"the plan is for {plan.num_rows} rows, not {len(q)}")
    check(scale > 0, f"scale must be positive, not {scale}")
    check(heads % pages.kv_heads == 0, "query heads must be a multiple of KV heads")
    check(
        pages.num_pages == plan.num_pages,
        f"the plan is for {plan.num_pages} pages, not {pages.num_pages}",
    )
    check(
        pages.page_size == plan.page_size,
        f"the plan is for pages of {plan.page_size} tokens, not {pages.page_size}",
    )
    if plan.kv_len.device != q.device:
        raise ValueError(f"the plan must be on {q.device} like q")
    check(window >= 0, f"window must be 0 (off) or a number of tokens, not {window}")
    if not pages.fp8 and pages.k.dtype != q.dtype:
        raise ValueError(f"pages must be {q.dtype} like q, or float8_e4m3fn")
