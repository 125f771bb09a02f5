"""The portable form of prefix attention: PyTorch reads each node once for all its rows.

Nodes are cut into sections of at most SECTION_TOKENS tokens, so few that their K and V stay in a
CPU's cache; new tokens, which attend to each other, are one section, however many. A section that
several rows read is one call of the flash kernel that SDPA uses, which also returns the
log-sum-exp, or if it is large two products by oneDNN for each KV head. Sections that one row reads,
such as rollouts' own tokens in a decode step, are batched into padded matrix products. The sections
on a row's path are on different levels; its results are merged level by level.

The sections depend on the plan, not on the layer: the plan keeps them (`Layout`), and when a decode
step advances (advance.py) only what its new tokens change is computed again.
"""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernels import onednn
from kernels.kv_pages import KVPages
from kernels.plan_node import PlanNode
from kernels.prefix_plan import PrefixPlan
from kernels.runtime.arithmetic import cdiv
from kernels.runtime.staging import on_device

SECTION_TOKENS = 2048
KEPT_BYTES = 64 << 20  # of a thread's buffer for K and V
PRODUCT_WORK = 1 << 22  # multiply-adds of one head's scores from which products by head pay
PRODUCT_QUERIES = 512  # at a time
UNSEEN = torch.finfo(torch.float32).min  # log-sum-exp of no token: finite, so differences exist

Partial = tuple[Tensor, Tensor]  # of n rows: out [n, Hkv, G, D], log-sum-exp fp32 [n, Hkv, G]


def prefix_attention_portable(
    q: Tensor, pages: KVPages, plan: PrefixPlan, scale: float, *, window: int = 0
) -> tuple[Tensor, Tensor]:
    """As the definition, with the partials of a row merged in fp32.

    In 16 bits, the flash kernel also rounds its probabilities and its partial results.
    """
    layout = _layout(plan, pages.kv_heads, window)
    rows, heads, dim = q.shape
    grouped = q.reshape(rows, pages.kv_heads, heads // pages.kv_heads, dim)
    partials = (layout.attend(level, grouped, pages, scale) for level in layout.levels)
    first = next(partials, None)
    if first is None:  # no row sees any token
        return torch.zeros_like(q), q.new_full(q.shape[:2], -torch.inf, dtype=torch.float32)
    out, lse = reduce(_merge, partials, first)
    if layout.some_row_sees_nothing:
        lse = lse.masked_fill(lse == UNSEEN, -torch.inf)
    return out.reshape(q.shape).to(q.dtype), lse.reshape(q.shape[:2])


def _merge(one: Partial, other: Partial) -> Partial:
    """The convex combination of two partials by exp(log-sum-exp)."""
    (out, lse), (new_out, new_lse) = one, other
    weight = torch.sigmoid(new_lse - lse)[..., None]
    return torch.lerp(out.float(), new_out.float(), weight), torch.logaddexp(lse, new_lse)


@dataclass(frozen=True)
class _Section:
    """Tokens [start, stop) of a node, and the rows that read them.

    Every row sees all of these tokens, or if `causal` row i the first i + 1. With a window, rows
    see only those that it reaches.
    """

    node: PlanNode
    start: int
    stop: int
    position: int  # of the first of these tokens in the rows' sequences
    row_start: int
    row_end: int
    causal: bool = False

    def pages(self, page_size: int) -> list[int]:
        return [*self.node.pages[self.start // page_size : cdiv(self.stop, page_size)]]


Levels = dict[tuple[int, int, int], list[_Section]]  # by depth, 0 or 1 for new tokens, and order


def _sections_by_level(plan: PrefixPlan) -> Levels:
    """The sections of all nodes; rows of the sections on a level are disjoint."""
    levels: Levels = {}
    most = max(1, SECTION_TOKENS // plan.page_size) * plan.page_size
    for node, depth, first in zip(plan.nodes, plan.depths, plan.node_starts, strict=True):
        length = plan.length(node)
        old = length - node.num_new
        if node.num_new == node.row_end - node.row_start == 1:
            old = length  # its one row sees the whole node
        new_end = node.row_start + node.num_new
        for new, start, stop, row in ((0, 0, old, node.row_start), (1, old, length, new_end)):
            for number, at in enumerate(range(start, stop, most)):
                if row < node.row_end:
                    tokens = (at, min(at + most, stop), first + at)
                    section = _Section(node, *tokens, row, node.row_end)
                    levels.setdefault((depth, new, number), []).append(section)
        if old < length:
            section = _Section(node, old, length, first + old, node.row_start, new_end, causal=True)
            levels.setdefault((depth, 1, 0), []).append(section)
    return levels


class _Shared:
    """A section that several rows read, or one that starts within a page or that a window cuts."""

    def __init__(self, section: _Section, seen: np.ndarray | None, layout: "Layout") -> None:
        self.rows, self.causal = slice(section.row_start, section.row_end), section.causal
        self.tiles = layout.tiles([section.pages(layout.page_size)])
        first = section.start % layout.page_size
        self.tokens = slice(first, first + section.stop - section.start)
        self.bias: Tensor | None = None  # added to the scores: 0 for tokens that a row sees
        if seen is not None:
            self.causal = False
            bias = np.where(seen, np.float32(0), np.float32(-np.inf))
            self.bias = on_device(bias, layout.device)
            self.blind = ~torch.from_numpy(seen).any(1).to(layout.device)[:, None, None]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Partial:
        """q [n, Hkv, G, D]; k, v [Hkv, tokens, D]."""
        n, kv_heads, group, dim = q.shape
        k, v = (x.view(kv_heads, -1, dim)[:, self.tokens] for x in (k, v))
        q = q.to(k.dtype)  # fp32 if the pages are FP8
        by_head = self.bias is None and _products_pay(n * group, k)
        if by_head:
            q, k, v = q.float(), k.float(), v.float()
        if by_head or (self.bias is None and not self.causal):
            # All queries of a KV head as one matrix.
            q = q.transpose(0, 1).reshape(kv_heads, n * group, dim)
            if by_head:
                out, lse = _by_products(q * scale, k, v, group if self.causal else 0)
            else:
                out, lse = _flash(q[None], k[None], v[None], scale=scale)
            out, lse = out.view(kv_heads, n, group, dim), lse.view(kv_heads, n, group)
            return out.transpose(0, 1), lse.transpose(0, 1)
        q = q.permute(1, 2, 0, 3)
        k, v = (x[:, None].expand(kv_heads, group, -1, dim) for x in (k, v))
        mask = None if self.bias is None else self.bias.to(q.dtype)
        out, lse = _flash(q, k, v, is_causal=self.causal, attn_mask=mask, scale=scale)
        out, lse = out.permute(2, 0, 1, 3), lse.permute(2, 0, 1)
        if self.bias is not None:
            lse = lse.masked_fill(self.blind, UNSEEN)
        return out, lse


def _flash(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Partial:
    """Attention of q [B, H, n, D] to k, v [B, H, tokens, D]: out [B, H, n, D], lse [B, H, n].

    options: those of `_without_flash`
    """
    if q.device.type != "cpu":
        return _without_flash(q, k, v, **options)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, **options)


def _without_flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    is_causal: bool = False,
    attn_mask: Tensor | None = None,
) -> Partial:
    """The same on devices whose flash kernels PyTorch does not offer with a log-sum-exp."""
    rows, partials = torch.arange(q.shape[2], device=q.device)[:, None], []
    for some in rows.split(PRODUCT_QUERIES):  # not all scores at a time
        scores = q[:, :, some[:, 0]].float() @ k.float().transpose(-1, -2) * scale
        if is_causal:
            scores.masked_fill_(torch.arange(k.shape[2], device=q.device) > some, UNSEEN)
        if attn_mask is not None:
            scores = (scores + attn_mask[some[:, 0]]).clamp_min_(UNSEEN)
        weights, lse = _softmax(scores)
        partials.append((weights @ v.float(), lse))
    outs, lses = zip(*partials, strict=True)
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)


def _products_pay(queries: int, k: Tensor) -> bool:
    """Whether oneDNN's products of a head's queries with its K and V take less time than the flash
    kernel, which calls BLAS."""
    enough = queries * k[0].numel() >= PRODUCT_WORK
    return enough and k.device.type == "cpu" and onednn.products_pay(torch.float32)


def _by_products(q: Tensor, k: Tensor, v: Tensor, group: int) -> Partial:
    """Scaled queries [Hkv, m, D] over k, v [Hkv, tokens, D]: out [Hkv, m, D], lse [Hkv, m].

    group: 0 if all queries see all tokens; else the first `group` see the first token, the next
        `group` one more, and so on
    """
    most = max(1, PRODUCT_QUERIES // max(1, group)) * max(1, group)  # whole rows
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:2])
    for head in range(len(q)):
        for at in range(0, q.shape[1], most):  # few at a time: their scores stay in the cache
            some = slice(at, at + most)
            seen = (at + len(q[head, some])) // group if group else k.shape[1]
            scores = onednn.product(q[head, some], k[head, :seen])
            if group:
                edge = scores[:, at // group :]
                later = _later(most // group, group)[: len(edge), : edge.shape[1]]
                edge.masked_fill_(later, -torch.inf)
            weights, lse[head, some] = _softmax(scores)
            out[head, some] = onednn.product(weights, v[head, :seen].T)
    return out, lse


@lru_cache(maxsize=4)
def _later(rows: int, group: int) -> Tensor:
    """Which of `rows` tokens come after each of as many rows of `group` queries: bool."""
    return torch.ones(rows, rows, dtype=torch.bool).triu(1).repeat_interleave(group, dim=0)


def _softmax(scores: Tensor) -> Partial:
    """The softmax over the last axis, and the log-sum-exp."""
    top = scores.amax(-1)
    weights = torch.softmax(scores, -1)
    return weights, top.sub_(weights.amax(-1).log_())  # the largest weight is 1 / sum


class _Single:
    """Sections that one row each reads, padded to the longest: one batched product for all."""

    def __init__(self, sections: Sequence[_Section], layout: "Layout") -> None:
        rows, device = [section.row_start for section in sections], layout.device
        self.rows: slice | Tensor = slice(rows[0], rows[0] + len(rows))
        if rows != [*range(rows[0], rows[0] + len(rows))]:
            self.rows = on_device(np.array(rows), device)
        pages = [section.pages(layout.page_size) for section in sections]
        longest = max(map(len, pages))
        self.tiles = layout.tiles([ids + ids[:1] * (longest - len(ids)) for ids in pages])
        self._kv_heads = layout.kv_heads
        self._token = torch.arange(longest * layout.page_size, device=device)
        # Rows of a decode step's plan see the new tokens at the ends of their nodes.
        ends = [p.node.num_new and p.stop == layout.plan.length(p.node) for p in sections]
        self._growth = on_device(np.array(ends).astype(bool), device)
        self._lengths = on_device(np.array([p.stop - p.start for p in sections]), device)
        self._hide()

    def grow(self) -> None:
        """Follow the nodes, which have grown by a token."""
        self._lengths += self._growth
        self._hide()

    def _hide(self) -> None:
        self._longest = int(self._lengths.max())
        hidden = self._token >= self._lengths[:, None]  # [n, tokens], whole pages
        hidden[:, self._longest :] = False
        self._hidden: Tensor | None = None
        if bool(hidden.any()):
            self._hidden = hidden[:, None, None, : self._longest]
            of_heads = hidden[:, None].expand(-1, self._kv_heads, -1)
            self._hidden_v = of_heads.flatten().nonzero()[:, 0]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Partial:
        """q [n, Hkv, G, D]; k, v [n * Hkv, tokens, D]."""
        n, kv_heads, group, dim = q.shape
        k, v = (x.view(n * kv_heads, -1, dim).float() for x in (k, v))
        if self._hidden is not None:
            # Memory past a node's last token may hold anything, even NaN, and 0 * NaN is NaN.
            v.view(-1, dim).index_fill_(0, self._hidden_v, 0.0)
        k, v = k[:, : self._longest], v[:, : self._longest]
        queries = q.reshape(n * kv_heads, group, dim).float()
        unused = queries.new_empty(())
        scores = torch.baddbmm(unused, queries, k.transpose(1, 2), beta=0, alpha=scale)
        if self._hidden is not None:
            scores.view(n, kv_heads, group, -1).masked_fill_(self._hidden, -torch.inf)
        weights, lse = _softmax(scores)
        return torch.bmm(weights, v).view(n, kv_heads, group, dim), lse.view(n, kv_heads, group)


_Part = _Shared | _Single


class Layout:
    """A plan's sections by level, for one number of KV heads and one window.

    One of the plan's schedules: `refill` follows new nodes, `update` the new tokens of a step.
    """

    def __init__(self, plan: PrefixPlan, kv_heads: int, window: int) -> None:
        self.plan, self.kv_heads, self.window = plan, kv_heads, window
        self.page_size, self.device = plan.page_size, plan.kv_len.device
        self.refill()

    def refill(self) -> None:
        positions = self.plan.row_position.cpu().numpy()
        self.some_row_sees_nothing = bool((positions < 0).any())
        levels = _sections_by_level(self.plan)
        self.levels = [[*self._parts(levels[key], positions)] for key in sorted(levels)]

    def update(self) -> None:
        plan = self.plan
        if plan.advanced > plan.steps_left:
            return  # a new token has no page: this plan cannot be used again
        written = (plan.length(node) - 1 for node in plan.nodes if node.num_new)
        new_page = any(token % self.page_size == 0 for token in written)
        if new_page or self.window:
            self.refill()
            return
        for part in chain.from_iterable(self.levels):
            if isinstance(part, _Single):
                part.grow()

    def attend(self, parts: Sequence[_Part], q: Tensor, pages: KVPages, scale: float) -> Partial:
        """The partials of all rows on one level; q [T, Hkv, G, D]."""
        if len(parts) == 1 and parts[0].rows == slice(0, len(q)):
            return parts[0].attend(q, *self._gather(pages, parts[0].tiles), scale)
        out = torch.zeros_like(q, dtype=torch.float32)
        lse = q.new_full(q.shape[:3], UNSEEN, dtype=torch.float32)
        for part in parts:
            kv = self._gather(pages, part.tiles)
            out[part.rows], lse[part.rows] = part.attend(q[part.rows], *kv, scale)
        return out, lse

    def tiles(self, pages: Sequence[Sequence[int]]) -> Tensor:
        """Where each head's part of the pages of n lists is: int64 [n * Hkv * pages]."""
        head = np.arange(self.kv_heads)[:, None]
        tiles = np.array(pages, int)[:, None] * self.kv_heads + head
        return on_device(tiles.reshape(-1), self.device)

    def _parts(self, sections: Sequence[_Section], positions: np.ndarray) -> Iterator[_Part]:
        single: dict[int, list[_Section]] = {}
        for section in sections:
            alone = section.row_end - section.row_start == 1 and section.start % self.page_size == 0
            seen = self._in_window(section, positions) if self.window else None
            if seen is not None and not seen.any():
                continue
            if alone and (seen is None or seen.all()):
                # Padding at most doubles the work.
                size = len(section.pages(self.page_size)).bit_length()
                single.setdefault(size, []).append(section)
            else:
                yield _Shared(section, seen, self)
        for size, similar in single.items():
            at_once = max(1, SECTION_TOKENS // (self.page_size << (size - 1)))
            for at in range(0, len(similar), at_once):
                yield _Single(similar[at : at + at_once], self)

    def _in_window(self, section: _Section, positions: np.ndarray) -> np.ndarray:
        """Which tokens each row sees: bool [rows, tokens]."""
        token = np.arange(section.start, section.stop)
        rows = slice(section.row_start, section.row_end)
        age = positions[rows, None] - (section.position + token - section.start)
        seen = age < self.window
        if section.causal:
            seen &= token - section.start <= np.arange(section.row_end - section.row_start)[:, None]
        return seen

    def _gather(self, pages: KVPages, tiles: Tensor) -> tuple[Tensor, Tensor]:
        """K and V of tiles, [tiles, page_size, D], overwritten by the next call."""
        shape = (len(tiles), *pages.k.shape[2:])
        if pages.k_scale is not None and pages.v_scale is not None:
            k, v = (x.view(-1, *shape[1:])[tiles].float() for x in (pages.k, pages.v))
            k *= pages.k_scale.view(-1, shape[1])[tiles][..., None]
            v *= pages.v_scale.view(-1, shape[1])[tiles][..., None]
            return k, v
        size = shape[1] * shape[2]
        k, v = _buffer(2 * len(tiles) * size, pages.k).view(2, -1, size)
        torch.index_select(pages.k.view(-1, size), 0, tiles, out=k)
        torch.index_select(pages.v.view(-1, size), 0, tiles, out=v)
        return k.view(shape), v.view(shape)


def _buffer(size: int, like: Tensor) -> Tensor:
    """Memory for `size` elements of the dtype and device of `like`: fresh memory costs more than
    the copy into it, so each thread keeps its last buffer unless that is large."""
    kept: Tensor | None = getattr(_kept, "buffer", None)
    if (
        kept is None
        or kept.numel() < size
        or (kept.dtype, kept.device) != (like.dtype, like.device)
    ):
        with torch.inference_mode(False):  # so that it can also be written outside inference mode
            kept = torch.empty(size, dtype=like.dtype, device=like.device)
        if kept.nbytes <= KEPT_BYTES:
            _kept.buffer = kept
    return kept[:size]


_kept = threading.local()


def _layout(plan: PrefixPlan, kv_heads: int, window: int) -> Layout:
    key = ("portable", kv_heads, window)
    if key not in plan.schedules:
        plan.schedules[key] = Layout(plan, kv_heads, window)
    return plan.schedules[key]
