"""How libraries see prefix attention's inputs: block tables per sequence, levels of the tree.

Slots without a token become zeros, in the inputs themselves: a library may well multiply by what
lies behind a sequence, where no engine's cache holds NaN.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.peers.peer import Unavailable
from kernels.kv_pages import KVPages
from kernels.plan_node import PlanNode
from kernels.prefix_plan import PrefixPlan
from kernels.runtime.arithmetic import cdiv

NOTHING = PlanNode((), 0, 0, 0)


@dataclass(frozen=True)
class Segment:
    """Rows [start, end) that see the same pages, of which the first `length` tokens count."""

    start: int
    end: int
    pages: Tensor  # int32
    length: int

    @property
    def rows(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Paged:
    """Pages [num_pages, Hkv, page_size, D] and the sequences over them, which cover all rows."""

    k: Tensor
    v: Tensor
    segments: list[Segment]

    @property
    def decodes(self) -> bool:
        """Whether every sequence has a single row."""
        return all(segment.rows == 1 for segment in self.segments)


def paged(inputs: dict, *, copied: bool = False, page_size: int | None = None) -> Paged:
    """Every sequence as one block table.

    Full pages are shared as they are. A page that a node fills in part, with another node behind
    it, is rebuilt for each sequence, as an engine that shares full pages would have it. `copied`
    gives every sequence pages of its own instead. With another `page_size` than the plan's all
    pages are rebuilt, and what is full of the same tokens is one page again.
    """
    runs, held = _sequences(inputs), inputs["plan"].page_size
    pools, size = list(inputs["pages"][:2]), page_size or held
    anew = copied or size != held
    kept = 0 if anew else len(pools[0])
    segments: list[Segment] = []
    rebuilt: dict[tuple[int, bytes], int] = {}  # by its tokens' slots, which page
    for index, (start, end, path) in enumerate(runs):
        slots = torch.cat([_slots(node, held) for node in path])
        behind = torch.arange(1, -len(slots) % size + 1)
        tokens = torch.cat([slots, slots[-1] + behind]).view(-1, size)
        whole = (tokens == tokens[:, :1] // size * size + torch.arange(size)).all(1)
        table = tokens[:, 0] // size
        for at in torch.arange(len(tokens))[~whole | anew].tolist():
            key = (index if copied else 0, tokens[at].numpy().tobytes())
            table[at] = kept + rebuilt.setdefault(key, len(rebuilt))
        segments.append(Segment(start, end, table.int(), len(slots)))
    if rebuilt:
        slots = b"".join(tokens for _, tokens in rebuilt)
        made = torch.frombuffer(bytearray(slots), dtype=torch.int64).view(-1, size)
        pools = [_rebuild(pool, made, kept) for pool in pools]
    return Paged(*pools, segments)


def levels(inputs: dict) -> list[list[Segment]]:
    """The tree level by level, each covering all rows: the nodes that hold a row's own new token
    are the last level, those above them stand at their depth, and what lies between is empty."""
    if inputs["window"]:
        raise Unavailable("has no window across levels")
    runs = _sequences(inputs)
    depth = max(len(path) for _, _, path in runs)
    found = []
    for level in range(depth):
        segments: list[Segment] = []
        before = None
        for start, end, path in runs:
            node = path[-1] if level == depth - 1 else (*path[:-1], *[NOTHING] * depth)[level]
            if node is before:
                start = segments.pop().start
            before = node
            pages = node.pages[: cdiv(node.kv_len, inputs["plan"].page_size)]
            pages = torch.tensor(pages, dtype=torch.int32)
            segments.append(Segment(start, end, pages, node.kv_len))
        found.append(segments)
    return found


def indptr(sizes: list[int]) -> Tensor:
    """int32 [n + 1]: where each of n runs of these sizes begins, and the end."""
    return torch.tensor([0, *sizes]).cumsum(0).int()


def block_table(segments: list[Segment]) -> Tensor:
    """int32 [n, most pages], padded with page 0."""
    return torch.nn.utils.rnn.pad_sequence([segment.pages for segment in segments], True)


def _sequences(inputs: dict) -> list[tuple[int, int, list[PlanNode]]]:
    plan: PrefixPlan = inputs["plan"]
    pages: KVPages = inputs["pages"]
    if pages.k.dtype != inputs["q"].dtype:
        raise Unavailable("has no scale of K and V per token and head")
    runs = plan.sequences
    if sum(end - start for start, end, _ in runs) != plan.num_rows:
        raise Unavailable("cannot take a row that sees no token")
    for x in (pages.k, pages.v):
        x.nan_to_num_(0.0)
    return runs


def _slots(node: PlanNode, page_size: int) -> Tensor:
    """Where the node's tokens are, heads aside: page * page_size + place."""
    token = torch.arange(node.kv_len)
    return torch.tensor(node.pages)[token // page_size] * page_size + token % page_size


def _rebuild(pool: Tensor, tokens: Tensor, kept: int) -> Tensor:
    """The first `kept` pages of `pool`, and behind them pages of `tokens` [n, page size]."""
    held, size = pool.shape[2], tokens.shape[1]
    tokens = tokens.clamp(max=len(pool) * held - 1)
    made = pool.new_empty(kept + len(tokens), pool.shape[1], size, pool.shape[3])
    if kept:
        made[:kept] = pool[:kept]
    for part, out in zip(tokens.split(1024), made[kept:].split(1024), strict=True):
        part = part.to(pool.device)
        out.copy_(pool[part // held, :, part % held].transpose(1, 2))
    return made
