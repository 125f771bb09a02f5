"""The plan of prefix attention: the pages of each node of the prefix tree, and whose rows read it.

Query rows of a step stand in depth-first order of the tree: a node's own rows (tokens being written
into it) come first, then those of its first child's subtree, and so on. Every node then serves one
contiguous range of rows. Row r sees of node n, if row_start[n] <= r < row_end[n], the first

    visible(n, r) = min(kv_len[n], causal_offset[n] + (r - row_start[n]) + 1)

tokens. `kv_len` counts the tokens being written in this step as well. For a node into which m
tokens are being written, causal_offset = kv_len - m: the first of its rows ends at the first new
token, and rows of its children, which stand behind, see all of it. A node that is only read has
causal_offset = kv_len.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class PlanNode:
    """One node on the host: page ids, tokens held, rows [row_start, row_end), new tokens."""

    pages: Sequence[int]
    kv_len: int
    row_start: int
    row_end: int
    num_new: int = 0  # tokens of this step written into the node: its first rows


# Tokens that one Part covers at most: enough for efficient matrix products, few enough for their K,
# V and scores to stay in a CPU's cache.
PART_TOKENS = 2048


@dataclass(frozen=True)
class Part:
    """What one batched product attends to: the same p pages of n nodes of equal shape and depth.

    Each node has m rows, and no row belongs to two of them.
    """

    pages: Tensor  # int64 [n, p]
    rows: Tensor  # int64 [n, m]
    visible: Tensor  # int64 [n, m] tokens of these pages that each row sees, from 0 up
    least_visible: int  # the smallest of `visible`
    start: Tensor  # int64 [n] tokens before these pages in the sequences


@dataclass(frozen=True)
class PrefixPlan:
    """A step's prefix tree as int32 tensors, nodes in depth-first order. Made by `build`."""

    pages: Tensor  # [sum of pages] page ids, node after node
    page_start: Tensor  # [N + 1] node n holds pages[page_start[n]:page_start[n + 1]]
    kv_len: Tensor  # [N]
    row_start: Tensor  # [N]
    row_end: Tensor  # [N]
    causal_offset: Tensor  # [N]
    num_rows: int
    num_pages: int
    page_size: int
    nodes: tuple[PlanNode, ...]  # the same on the host, as it was built
    schedules: dict = field(default_factory=dict, init=False, repr=False)  # by prefix_schedule.py

    @staticmethod
    def build(
        nodes: Iterable[PlanNode],
        *,
        num_rows: int,
        num_pages: int,
        page_size: int,
        device: torch.device | str = "cpu",
    ) -> "PrefixPlan":
        """Check the nodes against the page pool and lay them out on `device`.

        Raises ValueError naming the node for a page id outside [0, num_pages), too few pages for
        kv_len, a row range outside [0, num_rows) or across another's, nodes not in depth-first
        order, or more new tokens than rows or kv_len.
        """
        nodes = tuple(nodes)
        for index, node in enumerate(nodes):
            _check_node(index, node, num_rows, num_pages, page_size)
        _depths(nodes)  # refuses rows that do not nest
        page_start = [0]
        for node in nodes:
            page_start.append(page_start[-1] + len(node.pages))

        def tensor(values: Iterable[int]) -> Tensor:
            return torch.tensor(list(values), dtype=torch.int32, device=device)

        return PrefixPlan(
            pages=tensor(page for node in nodes for page in node.pages),
            page_start=tensor(page_start),
            kv_len=tensor(node.kv_len for node in nodes),
            row_start=tensor(node.row_start for node in nodes),
            row_end=tensor(node.row_end for node in nodes),
            causal_offset=tensor(node.kv_len - node.num_new for node in nodes),
            num_rows=num_rows,
            num_pages=num_pages,
            page_size=page_size,
            nodes=nodes,
        )

    @cached_property
    def row_counts(self) -> tuple[int, int]:
        """Of the nodes that have rows, the fewest and the most; (0, 0) if there are none."""
        counts = [n.row_end - n.row_start for n in self.nodes if n.row_end > n.row_start]
        return min(counts, default=0), max(counts, default=0)

    @cached_property
    def is_decode(self) -> bool:
        """Whether every row is the only new token, and the only row, of its node."""
        written = [node for node in self.nodes if node.num_new]
        alone = all(node.num_new == 1 == node.row_end - node.row_start for node in written)
        return alone and [node.row_start for node in written] == [*range(self.num_rows)]

    @cached_property
    def room(self) -> int:
        """Of a decode step's plan as it was built: by how many steps its pages let it advance."""
        written = [node for node in self.nodes if node.num_new]
        return min((len(n.pages) * self.page_size - n.kv_len for n in written), default=0)

    @cached_property
    def leaf_of_row(self) -> Tensor:
        """Of a decode step's plan: the node whose new token each row is, int32 [T]."""
        leaf = [index for index, node in enumerate(self.nodes) if node.num_new]
        return torch.tensor(leaf, dtype=torch.int32, device=self.kv_len.device)

    @cached_property
    def depths(self) -> list[int]:
        """How many nodes with rows contain each node's rows."""
        return _depths(self.nodes)

    @cached_property
    def node_start(self) -> Tensor:
        """Tokens before each node in the sequences that hold it: int32 [N]."""
        start, path = [], []
        for node, depth in zip(self.nodes, self.depths, strict=True):
            del path[depth:]
            start.append(sum(path))
            path.append(node.kv_len)
        return torch.tensor(start, dtype=torch.int32, device=self.kv_len.device)

    @cached_property
    def row_position(self) -> Tensor:
        """Each row's own place in its sequence, the last that it sees: int32 [T]."""
        seen = torch.zeros(self.num_rows, dtype=torch.int32)
        for node in self.nodes:
            row = torch.arange(node.row_end - node.row_start, dtype=torch.int32)
            seen[node.row_start : node.row_end] += (node.kv_len - node.num_new + row + 1).clamp(
                max=node.kv_len
            )
        return (seen - 1).to(self.kv_len.device)

    @cached_property
    def parts(self) -> list[Part]:
        """All that some row sees, node by node once: nodes batched by depth, rows and pages."""
        shapes: dict[tuple[int, int, int], list[int]] = {}
        for index, (node, depth) in enumerate(zip(self.nodes, self.depths, strict=True)):
            rows, pages = node.row_end - node.row_start, -(-node.kv_len // self.page_size)
            if rows and pages:
                shapes.setdefault((depth, rows, pages), []).append(index)
        most = max(1, PART_TOKENS // self.page_size)
        return [
            _part(members[at : at + max(1, most // pages)], first, min(most, pages - first), self)
            for (_, _, pages), members in shapes.items()
            for at in range(0, len(members), max(1, most // pages))
            for first in range(0, pages, most)
        ]

    @cached_property
    def sequences(self) -> list[tuple[int, int, list[PlanNode]]]:
        """Runs of rows (start, end, nodes they see from the root); rows that see none left out."""
        edges = sorted({edge for node in self.nodes for edge in (node.row_start, node.row_end)})
        runs = []
        for start, end in pairwise(edges):
            path = [n for n in self.nodes if n.row_start <= start and end <= n.row_end and n.kv_len]
            if path:
                runs.append((start, end, path))
        return runs


def _part(indices: list[int], first: int, pages: int, plan: PrefixPlan) -> Part:
    """Pages first..first+pages of nodes that have equally many rows."""
    device = plan.kv_len.device
    members = [plan.nodes[index] for index in indices]
    row = torch.arange(members[0].row_end - members[0].row_start)
    start, length, new = torch.tensor([[n.row_start, n.kv_len, n.num_new] for n in members]).T
    visible = torch.minimum(length[:, None], (length - new)[:, None] + row + 1)
    visible = (visible - first * plan.page_size).clamp_(0, pages * plan.page_size)
    return Part(
        pages=torch.tensor([list(node.pages[first : first + pages]) for node in members]).to(
            device
        ),
        rows=(start[:, None] + row).to(device),
        visible=visible.to(device),
        least_visible=int(visible.min()),
        start=plan.node_start[indices].long() + first * plan.page_size,
    )


def _depths(nodes: tuple[PlanNode, ...]) -> list[int]:
    """How many nodes contain each node's rows. Raises ValueError unless ranges are nested."""
    depths, open_ends, last_start, first_free = [], [], 0, 0
    for index, node in enumerate(nodes):
        if node.row_start < last_start:
            raise ValueError(f"node {index}: nodes must stand in depth-first order of their rows")
        last_start = node.row_start
        while open_ends and open_ends[-1] <= node.row_start and node.row_end > node.row_start:
            open_ends.pop()
        if open_ends and node.row_end > open_ends[-1]:
            raise ValueError(f"node {index}: its rows reach past those of the node around it")
        depths.append(len(open_ends))
        if node.row_end > node.row_start:
            if node.row_start < first_free:
                raise ValueError(f"node {index}: its rows begin among another node's new tokens")
            open_ends.append(node.row_end)
            first_free = node.row_start + node.num_new
    return depths


def _check_node(index: int, node: PlanNode, num_rows: int, num_pages: int, page_size: int) -> None:
    rows = node.row_end - node.row_start
    bad = [page for page in node.pages if not 0 <= page < num_pages]
    if bad:
        raise ValueError(f"node {index}: page id {bad[0]} is not in [0, {num_pages})")
    if not 0 <= node.kv_len <= len(node.pages) * page_size:
        raise ValueError(
            f"node {index}: kv_len {node.kv_len} does not fit {len(node.pages)} pages"
            f" of {page_size} tokens"
        )
    if not 0 <= node.row_start <= node.row_end <= num_rows:
        raise ValueError(
            f"node {index}: rows {node.row_start}..{node.row_end} are not within 0..{num_rows}"
        )
    if not 0 <= node.num_new <= min(rows, node.kv_len):
        raise ValueError(
            f"node {index}: {node.num_new} new tokens, but {rows} rows and {node.kv_len} tokens"
        )
