"""Prefix attention's inputs in libraries' formats: block tables per sequence, levels of the tree.

Slots without a token are set to zero, in the inputs themselves: a library may multiply by values
after the end of a sequence, where an engine's cache never holds NaN.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.peers.peer import Unavailable
from kernels.kv_pages import KVPages
from kernels.plan_node import PlanNode
from kernels.prefix_plan import PrefixPlan
from kernels.runtime.arithmetic import cdiv

EMPTY_NODE = PlanNode((), 0, 0, 0)


@dataclass(frozen=True)
class KVRange:
    """Rows [start, end) that see the first `length` tokens of the same pages."""

    start: int
    end: int
    pages: Tensor  # int32
    length: int

    @property
    def rows(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Paged:
    """Pages [num_pages, Hkv, page_size, D] and sequences over them, which cover all rows."""

    k: Tensor
    v: Tensor
    kv_ranges: list[KVRange]

    @property
    def decodes(self) -> bool:
        """Whether each sequence has one row."""
        return all(kv_range.rows == 1 for kv_range in self.kv_ranges)


def paged(inputs: dict, *, copied: bool = False, page_size: int | None = None) -> Paged:
    """Each sequence as one block table.

    Full pages are shared unchanged. A page that a node fills partly, followed by another node, is
    rebuilt for each sequence, as in an engine that shares only full pages. With `copied`, each
    sequence gets its own pages instead. If `page_size` differs from the plan's, all pages are
    rebuilt, and full pages of the same tokens are shared again.
    """
    sequences, plan_size = _sequences(inputs), inputs["plan"].page_size
    k, v = inputs["pages"][:2]
    size = page_size or plan_size
    rebuild_all = copied or size != plan_size
    num_kept = 0 if rebuild_all else len(k)
    kv_ranges: list[KVRange] = []
    rebuilt: dict[tuple[int, bytes], int] = {}  # the page's index by its tokens' slots
    for index, (start, end, path) in enumerate(sequences):
        slots = torch.cat([_slots(node, plan_size) for node in path])
        padding = torch.arange(1, -len(slots) % size + 1)
        pages = torch.cat([slots, slots[-1] + padding]).view(-1, size)
        unchanged = (pages == pages[:, :1] // size * size + torch.arange(size)).all(1)
        table = pages[:, 0] // size
        for page in torch.arange(len(pages))[~unchanged | rebuild_all].tolist():
            key = (index if copied else 0, pages[page].numpy().tobytes())
            table[page] = num_kept + rebuilt.setdefault(key, len(rebuilt))
        kv_ranges.append(KVRange(start, end, table.int(), len(slots)))
    if rebuilt:
        all_slots = bytearray().join(page_slots for _, page_slots in rebuilt)
        new_pages = torch.frombuffer(all_slots, dtype=torch.int64).view(-1, size)
        k, v = (_rebuild(pool, new_pages, num_kept) for pool in (k, v))
    return Paged(k, v, kv_ranges)


def levels(inputs: dict) -> list[list[KVRange]]:
    """The tree level by level; each level covers all rows. The nodes with the rows' own new tokens
    form the last level, nodes above them are at their depth, and the levels between are empty."""
    if inputs["window"]:
        raise Unavailable("does not support a window across levels")
    sequences = _sequences(inputs)
    depth = max(len(path) for _, _, path in sequences)
    tree = []
    for level in range(depth):
        kv_ranges: list[KVRange] = []
        previous = None
        for start, end, path in sequences:
            node = path[-1] if level == depth - 1 else (*path[:-1], *[EMPTY_NODE] * depth)[level]
            if node is previous:
                start = kv_ranges.pop().start
            previous = node
            used = node.pages[: cdiv(node.kv_len, inputs["plan"].page_size)]
            pages = torch.tensor(used, dtype=torch.int32)
            kv_ranges.append(KVRange(start, end, pages, node.kv_len))
        tree.append(kv_ranges)
    return tree


def indptr(sizes: list[int]) -> Tensor:
    """int32 [n + 1]: the start of each of n consecutive ranges of these sizes, and the end."""
    return torch.tensor([0, *sizes]).cumsum(0).int()


def block_table(kv_ranges: list[KVRange]) -> Tensor:
    """int32 [n, max pages], padded with page 0."""
    return torch.nn.utils.rnn.pad_sequence([kv_range.pages for kv_range in kv_ranges], True)


def _sequences(inputs: dict) -> list[tuple[int, int, list[PlanNode]]]:
    plan: PrefixPlan = inputs["plan"]
    pages: KVPages = inputs["pages"]
    if pages.k.dtype != inputs["q"].dtype:
        raise Unavailable("does not support K and V with a scale per token and head")
    sequences = plan.sequences
    if sum(end - start for start, end, _ in sequences) != plan.num_rows:
        raise Unavailable("does not support a row that sees no token")
    for x in (pages.k, pages.v):
        x.nan_to_num_(0.0)
    return sequences


def _slots(node: PlanNode, page_size: int) -> Tensor:
    """The slots of the node's tokens: page * page_size + offset."""
    token = torch.arange(node.kv_len)
    return torch.tensor(node.pages)[token // page_size] * page_size + token % page_size


def _rebuild(pool: Tensor, slots: Tensor, num_kept: int) -> Tensor:
    """The first `num_kept` pages of `pool`, then pages of the tokens in `slots` [n, page size]."""
    old_size, size = pool.shape[2], slots.shape[1]
    slots = slots.clamp(max=len(pool) * old_size - 1)
    pages = pool.new_empty(num_kept + len(slots), pool.shape[1], size, pool.shape[3])
    if num_kept:
        pages[:num_kept] = pool[:num_kept]
    for part, out in zip(slots.split(1024), pages[num_kept:].split(1024), strict=True):
        part = part.to(pool.device)
        out.copy_(pool[part // old_size, :, part % old_size].transpose(1, 2))
    return pages
