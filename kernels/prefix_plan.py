"""The plan of prefix attention: the pages of each node of the prefix tree, and whose rows read it.

Query rows of a step stand in depth-first order of the tree: a node's own rows (tokens being written
into it) come first, then those of its first child's subtree, and so on. Every node then serves one
contiguous range of rows. Row r sees of node n, if row_start[n] <= r < row_end[n], the first

    visible(n, r) = min(kv_len[n], causal_offset[n] + (r - row_start[n]) + 1)

tokens. `kv_len` counts the tokens being written in this step as well. For a node into which m
tokens are being written, causal_offset = kv_len - m: the first of its rows ends at the first new
token, and rows of its children, which stand behind, see all of it. A node that is only read has
causal_offset = kv_len.

A decode step's plan may be padded: made for a `Capacity`, it keeps its tensors at fixed addresses
while `refill` gives it other nodes, so that a captured CUDA graph can serve whoever is running.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, pairwise

import numpy as np
import torch
from torch import Tensor

from kernels.plan_node import PlanNode
from kernels.runtime.arithmetic import cdiv
from kernels.runtime.staging import Packed, on_device


@dataclass(frozen=True)
class Capacity:
    """What a padded plan has room for. Its kernels are chosen for this, whatever the nodes are."""

    rows: int  # padding included
    most_rows: int  # that a node may have
    levels: int  # nodes on a path, a row's own included

    @property
    def nodes(self) -> int:
        """Each row lies in one node of each level; and one node that stays empty."""
        return self.rows * self.levels + 1

    def padding(self, rows: int, page: int) -> list[PlanNode]:
        """Leaves of one token for the rows from `rows` on, all in a page that nobody reads."""
        return [PlanNode((page,), 1, row, row + 1, 1) for row in range(rows, self.rows)]


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


@dataclass(eq=False)
class PrefixPlan:
    """A step's prefix tree as int32 tensors, nodes in depth-first order. Made by `build`.

    A padded plan's tensors are longer than its nodes need: behind them are empty nodes.
    """

    num_rows: int
    num_pages: int
    page_size: int
    capacity: Capacity | None  # of a padded plan
    nodes: tuple[PlanNode, ...]  # as it was built or filled last
    packed: Packed = field(repr=False)
    # What prefix_attention/schedule.py has made of this plan.
    schedules: dict = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        tensors = self.packed.tensors
        self.pages = tensors["pages"]  # [sum of pages] page ids, node after node
        # [N + 1] node n holds pages[page_start[n]:page_start[n + 1]]
        self.page_start = tensors["page_start"]
        self.kv_len = tensors["kv_len"]  # [N]
        self.row_start = tensors["row_start"]  # [N]
        self.row_end = tensors["row_end"]  # [N]
        self.causal_offset = tensors["causal_offset"]  # [N]

    @staticmethod
    def build(
        nodes: Iterable[PlanNode],
        *,
        num_rows: int,
        num_pages: int,
        page_size: int,
        device: torch.device | str = "cpu",
        capacity: Capacity | None = None,
    ) -> "PrefixPlan":
        """Check the nodes against the page pool and lay them out on `device`.

        With `capacity` the plan is padded: see `refill`, which this ends with.
        Raises ValueError naming the node for a page id outside [0, num_pages), too few pages for
        kv_len, a row range outside [0, num_rows) or across another's, nodes not in depth-first
        order, or more new tokens than rows or kv_len.
        """
        nodes = tuple(nodes)
        pages = sum(len(node.pages) for node in nodes)
        count, rows = len(nodes), 0
        if capacity:
            # Nodes own different pages, but for the page of the rows that pad.
            count, pages, rows = capacity.nodes, num_pages + capacity.rows, capacity.rows
        shapes = dict.fromkeys(("kv_len", "row_start", "row_end", "causal_offset"), (count,))
        shapes |= {"page_start": (count + 1,), "pages": (pages,)}
        if capacity:
            shapes |= {"leaf_of_row": (rows,), "row_position": (rows,)}
        packed = Packed(shapes, device=device)
        plan = PrefixPlan(num_rows, num_pages, page_size, capacity, (), packed)
        plan.refill(nodes)
        return plan

    def refill(self, nodes: Iterable[PlanNode]) -> None:
        """Lay out other nodes in the same tensors, and in those of the schedules made of the plan.

        For padded plans, whose nodes must make a decode step of all its rows; on a GPU in the order
        of its stream, and without waiting for it. Raises ValueError as `build` does, and for what
        is beyond the capacity; the plan is then what it was.
        """
        nodes = tuple(nodes)
        for index, node in enumerate(nodes):
            _check_node(index, node, self.num_rows, self.page_size)
        depths = _depths(nodes)  # refuses rows that do not nest
        self._check_capacity(nodes, depths)
        self.packed.fill(self._arrays(nodes, depths))
        for name in _FROM_NODES:
            self.__dict__.pop(name, None)
        self.nodes, self.__dict__["depths"] = nodes, depths
        for schedule in self.schedules.values():
            schedule.refill()

    def _arrays(self, nodes: tuple[PlanNode, ...], depths: list[int]) -> dict[str, np.ndarray]:
        """What the tensors hold of the nodes. Raises ValueError for a page that does not exist."""
        numbers = [(n.kv_len, n.row_start, n.row_end, n.num_new, len(n.pages)) for n in nodes]
        kv_len, row_start, row_end, num_new, count = np.array(numbers, int).reshape(-1, 5).T
        total = int(count.sum())
        pages = np.fromiter(chain.from_iterable(node.pages for node in nodes), int, total)
        page_start = np.concatenate([[0], np.cumsum(count)])
        wrong = np.flatnonzero((pages < 0) | (pages >= self.num_pages))
        if len(wrong):
            index = int(np.searchsorted(page_start, wrong[0], side="right")) - 1
            raise ValueError(
                f"node {index}: page id {pages[wrong[0]]} is not in [0, {self.num_pages})"
            )
        arrays = {
            "pages": pages,
            "page_start": page_start,
            "kv_len": kv_len,
            "row_start": row_start,
            "row_end": row_end,
            "causal_offset": kv_len - num_new,
        }
        if self.capacity:
            arrays["leaf_of_row"] = leaf = np.flatnonzero(num_new)
            starts = np.array(_starts(nodes, depths), int)
            arrays["row_position"] = (starts + kv_len - 1)[leaf]
        return arrays

    def _check_capacity(self, nodes: tuple[PlanNode, ...], depths: list[int]) -> None:
        room = self.capacity
        if room is None:
            return
        if not _is_decode(nodes, self.num_rows) or self.num_rows != room.rows:
            raise ValueError("a padded plan is for a decode step of all its rows")
        most = max(node.row_end - node.row_start for node in nodes)
        levels = max(depths) + 1
        if most > room.most_rows or levels > room.levels or len(nodes) >= room.nodes:
            raise ValueError(
                f"{len(nodes)} nodes, {levels} on a path, with up to {most} rows, are more than"
                f" {room} takes"
            )

    @cached_property
    def row_counts(self) -> tuple[int, int]:
        """Of the nodes that have rows, the fewest and the most; (0, 0) if there are none."""
        if self.capacity:
            return 1, self.capacity.most_rows
        counts = [n.row_end - n.row_start for n in self.nodes if n.row_end > n.row_start]
        return min(counts, default=0), max(counts, default=0)

    @cached_property
    def is_decode(self) -> bool:
        """Whether every row is the only new token, and the only row, of its node."""
        return _is_decode(self.nodes, self.num_rows)

    @cached_property
    def room(self) -> int:
        """Of a decode step's plan as it was built: by how many steps its pages let it advance."""
        written = [node for node in self.nodes if node.num_new]
        return min((len(n.pages) * self.page_size - n.kv_len for n in written), default=0)

    @cached_property
    def leaf_of_row(self) -> Tensor:
        """Of a decode step's plan: the node whose new token each row is, int32 [T]."""
        if self.capacity:
            return self.packed.tensors["leaf_of_row"]
        leaf = [index for index, node in enumerate(self.nodes) if node.num_new]
        return on_device(np.array(leaf, np.int32), self.kv_len.device)

    @cached_property
    def depths(self) -> list[int]:
        """How many nodes with rows contain each node's rows."""
        return _depths(self.nodes)

    @cached_property
    def levels(self) -> int:
        """Nodes on a path at most."""
        return self.capacity.levels if self.capacity else max(self.depths, default=0) + 1

    @cached_property
    def node_starts(self) -> list[int]:
        """Tokens before each node in the sequences that hold it."""
        return _starts(self.nodes, self.depths)

    @cached_property
    def row_position(self) -> Tensor:
        """Each row's own place in its sequence, the last that it sees: int32 [T]."""
        if self.capacity:
            return self.packed.tensors["row_position"]
        seen = np.zeros(self.num_rows, dtype=np.int32)
        for node in self.nodes:
            row = np.arange(node.row_end - node.row_start)
            new = node.kv_len - node.num_new + row + 1
            seen[node.row_start : node.row_end] += np.minimum(new, node.kv_len).astype(np.int32)
        return on_device(seen - 1, self.kv_len.device)

    @cached_property
    def parts(self) -> list[Part]:
        """All that some row sees, node by node once: nodes batched by depth, rows and pages."""
        shapes: dict[tuple[int, int, int], list[int]] = {}
        for index, (node, depth) in enumerate(zip(self.nodes, self.depths, strict=True)):
            rows, pages = node.row_end - node.row_start, cdiv(node.kv_len, self.page_size)
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


# What is cached of a plan's nodes, and of a padded one is other with every filling.
_FROM_NODES = ("is_decode", "room", "depths", "node_starts", "parts", "sequences")


def _part(indices: list[int], first: int, pages: int, plan: PrefixPlan) -> Part:
    """Pages first..first+pages of nodes that have equally many rows."""
    members = [plan.nodes[index] for index in indices]
    row = np.arange(members[0].row_end - members[0].row_start)
    start, length, new = np.array([(n.row_start, n.kv_len, n.num_new) for n in members]).T
    visible = np.minimum(length[:, None], (length - new)[:, None] + row + 1)
    visible = (visible - first * plan.page_size).clip(0, pages * plan.page_size)
    places = np.array([plan.node_starts[index] for index in indices]) + first * plan.page_size
    arrays = (
        np.array([node.pages[first : first + pages] for node in members]),
        start[:, None] + row,
        visible,
        places,
    )
    pages_, rows, visible_, places_ = (on_device(x, plan.kv_len.device) for x in arrays)
    return Part(pages_, rows, visible_, int(visible.min()), places_)


def _starts(nodes: tuple[PlanNode, ...], depths: list[int]) -> list[int]:
    """Tokens before each node in the sequences that hold it."""
    starts: list[int] = []
    path: list[int] = []
    for node, depth in zip(nodes, depths, strict=True):
        del path[depth:]
        starts.append(sum(path))
        path.append(node.kv_len)
    return starts


def _is_decode(nodes: tuple[PlanNode, ...], num_rows: int) -> bool:
    written = [node for node in nodes if node.num_new]
    alone = all(node.num_new == 1 == node.row_end - node.row_start for node in written)
    return alone and [node.row_start for node in written] == [*range(num_rows)]


def _depths(nodes: tuple[PlanNode, ...]) -> list[int]:
    """How many nodes contain each node's rows. Raises ValueError unless ranges are nested."""
    depths: list[int] = []
    open_ends: list[int] = []
    last_start = first_free = 0
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


def _check_node(index: int, node: PlanNode, num_rows: int, page_size: int) -> None:
    rows = node.row_end - node.row_start
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
