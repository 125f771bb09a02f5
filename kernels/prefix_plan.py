"""The prefix plan: one step's prefix tree as tensors, with each node's pages and query rows.

Query rows are in depth-first order of the tree: a node's own rows (the tokens written into it in
this step), then those of its first child's subtree, and so on. The rows that read a node are thus
one contiguous range, [row_start[n], row_end[n]). A row r in that range sees the first

    visible(n, r) = min(kv_len[n], causal_offset[n] + (r - row_start[n]) + 1)

tokens of node n. `kv_len` includes the tokens written in this step. If m tokens are written into a
node, causal_offset = kv_len - m: its first row sees up to the first new token, and the rows of its
children, which come later, see all of it. A node that is only read has causal_offset = kv_len.

The plan of a decode step can be padded: built for a `Capacity`, it keeps its tensors at fixed
addresses while `refill` replaces the nodes, so that one CUDA graph serves changing batches.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, pairwise
from typing import NamedTuple
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

from kernels.kv_pages import KVPages
from kernels.plan_node import PlanNode
from kernels.runtime.arithmetic import INT32_END
from kernels.runtime.staging import Packed, on_device

# What a plan's int32 numbers hold, with room for the sums of tokens and rows that kernels form.
MAX_TOKENS = 2**30


class PlanTensors(NamedTuple):
    """A plan as its tensors alone, which code that is compiled or exported takes; see `PrefixPlan`.

    Ops accept them in place of the plan, and recognise those of a plan that exists. From any
    others, such as copies, a plan is built at every call, which reads them on the host.
    """

    pages: Tensor
    page_start: Tensor
    kv_len: Tensor
    row_start: Tensor
    row_end: Tensor
    causal_offset: Tensor

    @property
    def tensors(self) -> "PlanTensors":
        return self


@dataclass(frozen=True)
class Capacity:
    """The size limits of a padded plan; its kernel configs depend on these, not on its nodes."""

    rows: int  # of the step, padding included
    max_node_rows: int  # the most rows that one node may have
    levels: int  # the most nodes on a path, leaf included

    @property
    def nodes(self) -> int:
        """The most nodes: one for each row and level, and one that stays empty."""
        return self.rows * self.levels + 1

    def padding(self, rows: int, page: int) -> list[PlanNode]:
        """One-token leaves for rows [rows, self.rows), all in `page`, which no other node uses."""
        return [PlanNode((page,), 1, row, row + 1, 1) for row in range(rows, self.rows)]


@dataclass(eq=False)
class PrefixPlan:
    """A step's prefix tree as int32 tensors, nodes in depth-first order; see `build`.

    A padded plan's tensors are longer than its nodes need; the remaining nodes are empty.
    """

    num_rows: int
    num_pages: int
    page_size: int
    capacity: Capacity | None  # of a padded plan
    nodes: tuple[PlanNode, ...]  # as of the last `build` or `refill`
    packed: Packed = field(repr=False)
    # What attention has derived from this plan, by its parameters: a Schedule for the Triton form
    # (prefix_attention/schedule.py), a Layout for the portable one (prefix_attention/portable.py).
    schedules: dict = field(default_factory=dict, init=False, repr=False)
    advanced: int = field(default=0, init=False)  # calls of `advance` since the last `refill`

    def __post_init__(self) -> None:
        tensors = self.packed.tensors
        self.pages = tensors["pages"]  # [sum of pages] page ids, node after node
        # [N + 1] node n holds pages[page_start[n]:page_start[n + 1]]
        self.page_start = tensors["page_start"]
        self.kv_len = tensors["kv_len"]  # [N]
        self.row_start = tensors["row_start"]  # [N]
        self.row_end = tensors["row_end"]  # [N]
        self.causal_offset = tensors["causal_offset"]  # [N]
        _existing[self.kv_len.data_ptr()] = self

    @property
    def tensors(self) -> PlanTensors:
        return PlanTensors(*(getattr(self, name) for name in PlanTensors._fields))

    @staticmethod
    def of(plan: "PrefixPlan | PlanTensors", num_rows: int, cache: KVPages) -> "PrefixPlan":
        """The plan itself, the plan that has these tensors, or one built from their values."""
        if not isinstance(plan, PlanTensors):
            return plan
        known = _existing.get(plan.kv_len.data_ptr())
        if known is not None and _same_memory(known.tensors, plan):
            return known
        pages, page_start, kv_len, row_start, row_end, causal_offset = (x.tolist() for x in plan)
        nodes = [
            PlanNode(pages[page_start[n] : page_start[n + 1]], length, start, end, length - old)
            for n, (length, start, end, old) in enumerate(
                zip(kv_len, row_start, row_end, causal_offset, strict=True)
            )
            if start < end  # not the empty nodes of a padded plan
        ]
        return PrefixPlan.build(
            nodes,
            num_rows=num_rows,
            num_pages=cache.num_pages,
            page_size=cache.page_size,
            device=plan.kv_len.device,
        )

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
        """Check the nodes against the page pool and write them to tensors on `device`.

        With `capacity` the plan is padded, and `refill` can replace its nodes later.
        Raises ValueError naming the node for a page id outside [0, num_pages), too few pages for
        kv_len, a row range outside [0, num_rows) or partly overlapping another's, nodes not in
        depth-first order, or more new tokens than rows or kv_len; also beyond 2^31 page ids, or
        pages for MAX_TOKENS tokens.
        """
        if num_pages > INT32_END:
            raise ValueError(f"num_pages must be at most 2^31, as page ids are int32: {num_pages}")
        nodes = tuple(nodes)
        pages = sum(len(node.pages) for node in nodes)
        count, rows = len(nodes), 0
        if capacity:
            # No two nodes share a page, except the one page of all padding rows.
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
        """Replace the nodes, in the same tensors, and update the plan's schedules.

        For padded plans: the nodes must form a decode step with exactly `capacity.rows` rows. On a
        GPU the copy is ordered by the stream and the host does not wait. Raises ValueError as
        `build` does, and if the nodes exceed the capacity; the plan is then unchanged.
        """
        nodes = tuple(nodes)
        for index, node in enumerate(nodes):
            _check_node(index, node, self.num_rows, self.page_size)
        depths = _depths(nodes)  # raises if row ranges do not nest
        self._check_capacity(nodes, depths)
        self.packed.fill(self._arrays(nodes, depths))
        for name in _CACHED_FROM_NODES:
            self.__dict__.pop(name, None)
        self.nodes, self.__dict__["depths"], self.advanced = nodes, depths, 0
        for schedule in self.schedules.values():
            schedule.refill()

    def length(self, node: PlanNode) -> int:
        """The tokens of one of the nodes, with those by which the plan has advanced."""
        return node.kv_len + (self.advanced if node.num_new else 0)

    def _arrays(self, nodes: tuple[PlanNode, ...], depths: list[int]) -> dict[str, np.ndarray]:
        """The tensors' new contents, by name. Raises ValueError for a page that does not exist."""
        numbers = [(n.kv_len, n.row_start, n.row_end, n.num_new, len(n.pages)) for n in nodes]
        kv_len, row_start, row_end, num_new, count = np.array(numbers, int).reshape(-1, 5).T
        total = int(count.sum())
        if total * self.page_size > MAX_TOKENS:
            raise ValueError(
                f"a plan's pages hold at most {MAX_TOKENS} tokens, not {total} x {self.page_size}"
            )
        pages = np.fromiter(chain.from_iterable(node.pages for node in nodes), int, total)
        page_start = np.concatenate([[0], np.cumsum(count)])
        invalid = np.flatnonzero((pages < 0) | (pages >= self.num_pages))
        if len(invalid):
            index = int(np.searchsorted(page_start, invalid[0], side="right")) - 1
            raise ValueError(
                f"node {index}: page id {pages[invalid[0]]} is not in [0, {self.num_pages})"
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
        capacity = self.capacity
        if capacity is None:
            return
        if not _is_decode(nodes, self.num_rows) or self.num_rows != capacity.rows:
            new = [node.num_new for node in nodes if node.num_new]
            raise ValueError(
                f"a padded plan takes a decode step of exactly {capacity.rows} rows, one new token"
                f" each; got {self.num_rows} rows and {sum(new)} new tokens in {len(new)} nodes"
            )
        max_rows = max(node.row_end - node.row_start for node in nodes)
        levels = max(depths) + 1
        if (
            max_rows > capacity.max_node_rows
            or levels > capacity.levels
            or len(nodes) >= capacity.nodes
        ):
            raise ValueError(
                f"{len(nodes)} nodes, {levels} on a path, with up to {max_rows} rows, exceed"
                f" {capacity}"
            )

    @cached_property
    def row_counts(self) -> tuple[int, int]:
        """The fewest and the most rows of a node that has rows; (0, 0) if none has."""
        if self.capacity:
            return 1, self.capacity.max_node_rows
        counts = [n.row_end - n.row_start for n in self.nodes if n.row_end > n.row_start]
        return min(counts, default=0), max(counts, default=0)

    @cached_property
    def is_decode(self) -> bool:
        """Whether every row is the only new token, and the only row, of its node."""
        return _is_decode(self.nodes, self.num_rows)

    @cached_property
    def steps_left(self) -> int:
        """How many further decode steps fit in the leaves' pages, as of `build` or `refill`."""
        written = [node for node in self.nodes if node.num_new]
        return min((len(n.pages) * self.page_size - n.kv_len for n in written), default=0)

    @cached_property
    def leaf_of_row(self) -> Tensor:
        """The leaf of each row of a decode step, int32 [T]: the node whose new token the row is."""
        if self.capacity:
            return self.packed.tensors["leaf_of_row"]
        leaf = [index for index, node in enumerate(self.nodes) if node.num_new]
        return on_device(np.array(leaf, np.int32), self.kv_len.device)

    @cached_property
    def depths(self) -> list[int]:
        """For each node, how many other nodes' row ranges contain its own."""
        return _depths(self.nodes)

    @cached_property
    def levels(self) -> int:
        """The most nodes on a path; of a padded plan, its capacity."""
        return self.capacity.levels if self.capacity else max(self.depths, default=0) + 1

    @cached_property
    def node_starts(self) -> list[int]:
        """For each node, the tokens that precede it in its sequences."""
        return _starts(self.nodes, self.depths)

    @cached_property
    def row_position(self) -> Tensor:
        """Each row's position in its sequence, the last that it sees: int32 [T]."""
        if self.capacity:
            return self.packed.tensors["row_position"]
        seen = np.zeros(self.num_rows, dtype=np.int32)
        for node in self.nodes:
            row = np.arange(node.row_end - node.row_start)
            new = node.kv_len - node.num_new + row + 1
            seen[node.row_start : node.row_end] += np.minimum(new, node.kv_len).astype(np.int32)
        return on_device(seen - 1, self.kv_len.device)

    @cached_property
    def sequences(self) -> list[tuple[int, int, list[PlanNode]]]:
        """Runs of rows with one path: (start, end, nodes from the root), without empty paths."""
        edges = sorted({edge for node in self.nodes for edge in (node.row_start, node.row_end)})
        runs = []
        for start, end in pairwise(edges):
            path = [n for n in self.nodes if n.row_start <= start and end <= n.row_end and n.kv_len]
            if path:
                runs.append((start, end, path))
        return runs


# Plans by the address of `kv_len`, for `PrefixPlan.of`.
_existing: WeakValueDictionary[int, PrefixPlan] = WeakValueDictionary()


def _same_memory(a: PlanTensors, b: PlanTensors) -> bool:
    pairs = zip(a, b, strict=True)
    return all(x.data_ptr() == y.data_ptr() and x.shape == y.shape for x, y in pairs)


# Cached properties that depend on the nodes: `refill` drops them.
_CACHED_FROM_NODES = ("is_decode", "steps_left", "depths", "node_starts", "sequences")


def _starts(nodes: tuple[PlanNode, ...], depths: list[int]) -> list[int]:
    """For each node, the tokens that precede it in its sequences."""
    starts: list[int] = []
    path: list[int] = []
    for node, depth in zip(nodes, depths, strict=True):
        del path[depth:]
        starts.append(sum(path))
        path.append(node.kv_len)
    return starts


def _is_decode(nodes: tuple[PlanNode, ...], num_rows: int) -> bool:
    written = [node for node in nodes if node.num_new]
    separate = all(node.num_new == 1 == node.row_end - node.row_start for node in written)
    return separate and [node.row_start for node in written] == [*range(num_rows)]


def _depths(nodes: tuple[PlanNode, ...]) -> list[int]:
    """For each node, how many others contain its rows. Raises ValueError unless ranges nest."""
    depths: list[int] = []
    open_ends: list[int] = []
    last_start = first_free = 0
    for index, node in enumerate(nodes):
        if node.row_start < last_start:
            raise ValueError(f"node {index}: nodes must be in depth-first order of their rows")
        last_start = node.row_start
        while open_ends and open_ends[-1] <= node.row_start and node.row_end > node.row_start:
            open_ends.pop()
        if open_ends and node.row_end > open_ends[-1]:
            raise ValueError(f"node {index}: its rows reach past those of its parent")
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
            f"node {index}: kv_len {node.kv_len} does not fit in {len(node.pages)} pages"
            f" of {page_size} tokens"
        )
    if not 0 <= node.row_start <= node.row_end <= num_rows:
        raise ValueError(
            f"node {index}: rows {node.row_start}..{node.row_end} are not within 0..{num_rows}"
        )
    if not 0 <= node.num_new <= min(rows, node.kv_len):
        raise ValueError(
            f"node {index}: {node.num_new} new tokens exceed its {rows} rows or its"
            f" {node.kv_len} tokens"
        )
