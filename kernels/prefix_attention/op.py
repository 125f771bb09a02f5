"""Attention of a step's query rows over the prefix tree of paged KV.

    out[r] = softmax(scale * q[r] K^T) V    over all tokens that row r sees (see prefix_plan.py)

One op for decode, prefill, chunked prefill and mixtures of them. The eager form, the definition,
gathers the whole KV of every sequence. The portable form reads each node once for all its rows and
merges the partials by log-sum-exp; it is the fast path on a CPU. The Triton form does the same on a
GPU, in two launches (schedule.py, kernel.py).

Floor of a decode step: K and V of every token of the tree once, 2 * Hkv * D * itemsize bytes each.
"""

import math
from inspect import unwrap

import torch
from torch import Tensor

from kernels.kv_pages import KVPages
from kernels.prefix_attention.launch import prefix_attention_triton
from kernels.prefix_plan import Part, PrefixPlan
from kernels.runtime.dispatch import check, pick


def prefix_attention(
    q: Tensor,
    pages: KVPages,
    plan: PrefixPlan,
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
    check(q.ndim == 3, "q must be [T, Hq, D]")
    pages.check(q.device)
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
    for start, end, path in plan.sequences:
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


def prefix_attention_portable(
    q: Tensor,
    pages: KVPages,
    plan: PrefixPlan,
    scale: float,
    *,
    window: int = 0,
) -> tuple[Tensor, Tensor]:
    """Read every node once for all its rows; merge the partials by log-sum-exp in fp32."""
    out = torch.zeros_like(q, dtype=torch.float32)
    lse = q.new_full(q.shape[:2], -math.inf, dtype=torch.float32)
    # One buffer for K and V of all parts: fresh memory costs more than the copy into it.
    size = max((part.pages.numel() for part in plan.parts), default=0) * pages.k[0].numel()
    buffers = pages.k.new_empty(2, size)
    for part in plan.parts:
        k = _gather(pages.k, pages.k_scale, buffers[0], part)
        v = _gather(pages.v, pages.v_scale, buffers[1], part)
        oldest = plan.row_position[part.rows] - (window - 1) if window else None
        _merge(out, lse, part.rows, *_attend(q, k, v, part, scale, oldest))
    return out.to(q.dtype), lse


def _gather(pages: Tensor, scales: Tensor | None, buffer: Tensor, part: Part) -> Tensor:
    """K or V of a part, fp32 [Hkv * n, tokens, D], in `buffer` if that is fp32."""
    _, kv_heads, page_size, dim = pages.shape
    head = torch.arange(kv_heads, device=pages.device)[:, None, None]
    tiles = (part.pages * kv_heads + head).flatten()  # one head's page each
    out = buffer[: tiles.numel() * page_size * dim].view(-1, page_size * dim)
    if scales is None:
        torch.index_select(pages.view(-1, page_size * dim), 0, tiles, out=out)
        return out.view(kv_heads * len(part.pages), -1, dim).float()
    values = pages.view(-1, page_size, dim)[tiles].float()
    values *= scales.view(-1, page_size)[tiles][..., None]
    return values.view(kv_heads * len(part.pages), -1, dim)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, part: Part, scale: float, oldest: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Partial attention of a part's rows: out [n, m, Hq, D] and lse [n, m, Hq], fp32."""
    (n, m), heads, (_, tokens, dim) = part.rows.shape, q.shape[1], k.shape
    kv_heads = len(k) // n
    rows = q[part.rows].float().mul_(scale).view(n, m, kv_heads, -1, dim)
    rows = rows.permute(2, 0, 1, 3, 4).reshape(kv_heads * n, -1, dim)  # m * Hq/Hkv rows each
    scores = rows @ k.transpose(1, 2)
    by_token = scores.view(kv_heads, n, m, -1, tokens)

    if part.min_visible < tokens:
        token = torch.arange(part.min_visible, tokens, device=q.device)
        hidden = token >= part.visible[:, :, None]  # [n, m, tokens that some row does not see]
        by_token[..., part.min_visible :].masked_fill_(hidden[None, :, :, None], -math.inf)
        # Memory past a node's last token may hold anything, even NaN: keep it out of P V.
        rest = v.view(kv_heads, n, tokens, dim)[:, :, part.min_visible :]
        rest.masked_fill_(hidden.all(1)[None, :, :, None], 0.0)
    if oldest is not None:  # [n, m]: the first position in its sequence that a row sees
        position = part.start[:, None, None] + torch.arange(tokens, device=q.device)
        by_token.masked_fill_((position < oldest[..., None])[None, :, :, None], -math.inf)
    # A row that sees none of these tokens has maximum -inf: avoid exp(-inf + inf).
    top = scores.amax(dim=-1, keepdim=True).clamp_min_(torch.finfo(torch.float32).min)
    weights = scores.sub_(top).exp_()
    total = weights.sum(dim=-1, keepdim=True)
    out = (weights @ v).div_(total.clamp_min(torch.finfo(torch.float32).tiny))
    lse = top.add_(total.log())

    def by_row(x: Tensor) -> Tensor:
        return x.view(kv_heads, n, m, heads // kv_heads, -1).permute(1, 2, 0, 3, 4)

    return by_row(out).reshape(n, m, heads, dim), by_row(lse).reshape(n, m, heads)


def _merge(out: Tensor, lse: Tensor, rows: Tensor, new_out: Tensor, new_lse: Tensor) -> None:
    """Merge partials into the running results, in place: a convex combination by exp(lse)."""
    old_lse = lse[rows]
    merged = torch.logaddexp(old_lse, new_lse)
    # If a row has seen no token, before or now, both weights are 0, not exp(-inf + inf).
    base = merged.clamp_min(torch.finfo(torch.float32).min)
    old_weight = (old_lse - base).exp_()[..., None]
    new_weight = (new_lse - base).exp_()[..., None]
    out[rows] = out[rows] * old_weight + new_out * new_weight
    lse[rows] = merged


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
    check(plan.kv_len.device == q.device, f"the plan must be on {q.device} like q")
    check(window >= 0, f"window must be 0 (off) or a number of tokens, not {window}")
    fits = pages.fp8 or pages.k.dtype == q.dtype
    check(fits, f"pages must be {q.dtype} like q, or float8_e4m3fn")
