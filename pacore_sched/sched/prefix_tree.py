"""The prefix tree: which KV pages hold each token, and which nodes are still needed.

A node is a run of tokens that several sequences share: image and question, one rollout, a synthesis
prompt. It owns whole pages, some of them perhaps reserved for future tokens. Forking a sequence
adds a child and copies nothing. A node lives as long as it is held or has a child. The tree stores
numbers of tokens, no tokens or tensors. It is plain Python, and all methods except `path`,
`depth_first` and `check_integrity` take constant time (amortised, per page and node given).
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from kernels.runtime.arithmetic import cdiv


class OutOfPages(Exception):
    """The pool has fewer free pages than a reservation needs. The tree is unchanged."""


class IntegrityError(AssertionError):
    """The tree is inconsistent: a bug, never a user's mistake."""


class NodeExtent(NamedTuple):
    """A node, the tokens before it and in it, and the number of its pages."""

    node: int
    parent: int | None
    start: int
    tokens: int
    pages: int


@dataclass(slots=True)
class _Node:
    parent: int | None
    start: int  # tokens of its ancestors: fixed, as a node with children does not grow
    length: int = 0
    capacity: int = 0  # tokens that the pages hold
    pages: list[int] = field(default_factory=list)
    holds: int = 1
    children: int = 0


class PrefixTree:
    """A forest of nodes over `num_pages` pages of `page_size` tokens each.

    Nodes are identified by ints that are never reused. Every method that takes a node raises
    ValueError if it is not, or no longer, in the tree.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        if num_pages < 1 or page_size < 1:
            raise ValueError(f"num_pages {num_pages} and page_size {page_size} must be positive")
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = list(reversed(range(num_pages)))  # a stack: page 0 is taken first
        self._nodes: dict[int, _Node] = {}
        self._next_id = 0

    def add(self, parent: int | None = None) -> int:
        """Add an empty node below `parent`, or a root; the caller holds it once."""
        start = 0
        if parent is not None:
            start = self.context_length(parent)
            self._nodes[parent].children += 1
        node, self._next_id = self._next_id, self._next_id + 1
        self._nodes[node] = _Node(parent, start)
        return node

    def append(self, node: int, tokens: int) -> None:
        """Append tokens to a node, taking pages as needed.

        Raises OutOfPages, and ValueError for a node with children, which start where it ends.
        """
        self.reserve(node, tokens)
        self._nodes[node].length += tokens

    def reserve(self, node: int, tokens: int) -> None:
        """Take the pages that appending `tokens` tokens to a node will need; raises as `append`."""
        entry = self._get(node)
        if entry.children:
            raise ValueError(f"node {node} cannot grow: it has children, which start where it ends")
        needed = self.pages_needed(node, tokens)
        if needed > len(self._free):
            raise OutOfPages(
                f"node {node} needs {needed} pages, the pool has {len(self._free)} free"
            )
        if needed:
            entry.pages.extend(self._free.pop() for _ in range(needed))
            entry.capacity += needed * self.page_size

    def grow(self, nodes: Iterable[int], tokens: int) -> None:
        """Append tokens to each of some nodes that have `room` for them and no children.

        Called for every rollout in every step, so it only checks the room.
        """
        entries = self._nodes
        for node in nodes:
            entry = entries[node]
            length = entry.length + tokens
            if length > entry.capacity:
                raise ValueError(
                    f"node {node} has no room for {tokens} more tokens: reserve pages first"
                )
            entry.length = length

    def truncate(self, node: int, length: int) -> None:
        """Cut a node without children to its first `length` tokens, and free its other pages."""
        entry = self._get(node)
        if entry.children or not 0 <= length <= entry.length:
            raise ValueError(
                f"node {node} of {entry.length} tokens and {entry.children} children"
                f" cannot be cut to {length}"
            )
        entry.length = length
        used = cdiv(length, self.page_size)
        self._free.extend(reversed(entry.pages[used:]))
        del entry.pages[used:]
        entry.capacity = used * self.page_size

    def hold(self, node: int) -> None:
        """Keep a node alive until one more `release`."""
        self._get(node).holds += 1

    def release(self, node: int) -> None:
        """Drop one hold. Nodes that then have neither holds nor children return their pages.

        Raises ValueError if only its children keep the node.
        """
        entry = self._get(node)
        if not entry.holds:
            raise ValueError(f"node {node} is not held")
        entry.holds -= 1
        while not entry.holds and not entry.children:
            del self._nodes[node]
            self._free.extend(reversed(entry.pages))
            if entry.parent is None:
                return
            node, entry = entry.parent, self._nodes[entry.parent]
            entry.children -= 1

    @property
    def free_pages(self) -> int:
        """Pages that no node owns."""
        return len(self._free)

    def pages_needed(self, node: int, new_tokens: int) -> int:
        """Pages that appending `new_tokens` to a node would take."""
        if new_tokens < 0:
            raise ValueError(
                f"node {node} cannot take {new_tokens} tokens: the number must not be negative"
            )
        entry = self._get(node)
        return max(0, -((entry.capacity - entry.length - new_tokens) // self.page_size))

    def pages_needed_by(self, nodes: Iterable[int], new_tokens: int) -> int:
        """Pages that appending `new_tokens` to each of some nodes would take."""
        entries = map(self._nodes.__getitem__, nodes)
        lacking = [new_tokens + entry.length - entry.capacity for entry in entries]
        return sum(cdiv(tokens, self.page_size) for tokens in lacking if tokens > 0)

    def room(self, node: int) -> int:
        """Tokens that can be appended to a node before it takes another page."""
        entry = self._get(node)
        return entry.capacity - entry.length

    def children(self, node: int) -> int:
        """Number of direct children."""
        return self._get(node).children

    def length(self, node: int) -> int:
        """Number of tokens in the node itself."""
        return self._get(node).length

    def context_length(self, node: int) -> int:
        """Tokens on the path from the root to the node, including the node's."""
        entry = self._get(node)
        return entry.start + entry.length

    def pages(self, node: int) -> tuple[int, ...]:
        """Pages that the node owns, in the order of its tokens."""
        return tuple(self._get(node).pages)

    def slots(self, node: int, start: int, stop: int) -> list[int]:
        """Slots of the node's tokens [start, stop). Raises ValueError outside its length."""
        entry = self._get(node)
        if not 0 <= start <= stop <= entry.length:
            raise ValueError(
                f"node {node} holds {entry.length} tokens: {start}..{stop} is out of range"
            )
        pages, size = entry.pages, self.page_size
        return [pages[token // size] * size + token % size for token in range(start, stop)]

    def path(self, node: int) -> tuple[int, ...]:
        """Nodes from the root to the node, inclusive."""
        path = [node]
        while (parent := self._get(path[-1]).parent) is not None:
            path.append(parent)
        return tuple(reversed(path))

    @property
    def nodes(self) -> Collection[int]:
        """All nodes, in the order of creation."""
        return self._nodes.keys()

    def extent(self, node: int) -> NodeExtent:
        """A node's place in the tree, and its size."""
        entry = self._get(node)
        return NodeExtent(node, entry.parent, entry.start, entry.length, len(entry.pages))

    def num_pages_of(self, nodes: Iterable[int]) -> int:
        """Pages that some nodes own together."""
        return sum(len(self._get(node).pages) for node in nodes)

    def depth_first(self, nodes: Iterable[int]) -> list[tuple[int, ...]]:
        """Paths to the nodes in depth-first order: parents first, siblings in the order of
        creation."""
        return sorted(map(self.path, nodes))

    def check_integrity(self, holds: Mapping[int, int] | None = None) -> None:
        """Raise IntegrityError with the first fault found, if there is one.

        `holds` is the number of holds on every held node as the caller counts them. With it, holds
        that were forgotten or dropped twice are found as well.
        """
        self._check_pages()
        children = Counter(entry.parent for entry in self._nodes.values())
        for node, entry in self._nodes.items():
            self._check_node(node, entry, children[node])
        held = {node: entry.holds for node, entry in self._nodes.items() if entry.holds}
        if holds is not None and held != dict(holds):
            raise IntegrityError(f"holds per node are {held}, the caller counts {dict(holds)}")

    def _get(self, node: int) -> _Node:
        entry = self._nodes.get(node)
        if entry is None:
            raise ValueError(f"node {node} is not in the tree")
        return entry

    def _check_pages(self) -> None:
        owners = [("the free list", self._free)]
        owners += [(f"node {node}", entry.pages) for node, entry in self._nodes.items()]
        owner: dict[int, str] = {}
        for name, pages in owners:
            for page in pages:
                if not 0 <= page < self.num_pages:
                    raise IntegrityError(f"page {page} of {name} is not in [0, {self.num_pages})")
                if page in owner:
                    raise IntegrityError(f"page {page} belongs to {owner[page]} and to {name}")
                owner[page] = name
        if len(owner) < self.num_pages:
            lost = next(page for page in range(self.num_pages) if page not in owner)
            raise IntegrityError(f"page {lost} is lost: neither free nor owned by a node")

    def _check_node(self, node: int, entry: _Node, children: int) -> None:
        parent = None if entry.parent is None else self._nodes.get(entry.parent)
        start = parent.start + parent.length if parent else 0
        pages = cdiv(entry.length, self.page_size)
        orphan = entry.parent is not None and (parent is None or entry.parent >= node)
        for fault, message in (
            (orphan, f"its parent {entry.parent} is not an older node of the tree"),
            (
                entry.start != start,
                f"it starts at {entry.start}, its ancestors have {start} tokens",
            ),
            (entry.children != children, f"it counts {entry.children} children but has {children}"),
            (entry.holds < 0, f"it has {entry.holds} holds"),
            (not entry.holds and not children, "it is neither held nor has children"),
            (entry.length < 0, f"it has {entry.length} tokens"),
            (len(entry.pages) < pages, f"it owns {len(entry.pages)} pages but needs {pages}"),
            (
                entry.capacity != len(entry.pages) * self.page_size,
                f"its {len(entry.pages)} pages do not hold {entry.capacity} tokens",
            ),
        ):
            if fault:
                raise IntegrityError(f"node {node}: {message}")
