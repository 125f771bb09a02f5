"""The prefix tree: which KV pages hold each token, and which nodes are still needed.

A node is a run of tokens that several sequences share: image and question, one rollout, a synthesis
prompt. It owns whole pages, some of them perhaps reserved for future tokens. Forking a sequence
adds a child and copies nothing. A node lives as long as it is held or has a child.

A node may also outlive its last user: a `keepable` one is then kept until its pages are needed,
those unused for the longest time first, from its end. Kept pages count as free ones.

The tree stores numbers of tokens, no tokens or tensors. It is plain Python, and all methods except
`path`, `depth_first` and `check_integrity` take constant time (amortised, per page and node given).
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, KeysView, Mapping
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
    users: int = 1  # holds, and children with users
    children: int = 0
    keepable: bool = False


class PrefixTree:
    """A forest of nodes over `num_pages` pages of `page_size` tokens each.

    Nodes are identified by ints that are never reused. Every method that takes a node raises
    ValueError if it is not, or no longer, in the tree.

    on_evict: called with every kept node whose pages were taken, and its length then; at 0 it has
        left the tree
    """

    on_evict: Callable[[int, int], object]

    def __init__(self, num_pages: int, page_size: int) -> None:
        if num_pages < 1 or page_size < 1:
            raise ValueError(f"num_pages {num_pages} and page_size {page_size} must be positive")
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = list(reversed(range(num_pages)))  # a stack: page 0 is taken first
        self._nodes: dict[int, _Node] = {}
        self._next_id = 0
        self.on_evict = lambda node, length: None
        # Nodes without users, those unused for the longest time first: children before parents.
        self._kept: OrderedDict[int, None] = OrderedDict()
        self._kept_pages = 0

    def add(self, parent: int | None = None) -> int:
        """Add an empty node below `parent`, or a root; the caller holds it once."""
        start = 0
        if parent is not None:
            start = self.context_length(parent)
            self._nodes[parent].children += 1
            self._use(parent)
        node = self._new_id()
        self._nodes[node] = _Node(parent, start)
        return node

    def split(self, node: int, length: int) -> int:
        """Cut a node after its first `length` tokens, whole pages; returns the new node that has
        them. The node keeps the rest, its holds and its children, and is the only child of the new
        one, which nothing holds.

        Raises ValueError for another `length`, and for a node without users.
        """
        entry, size = self._get(node), self.page_size
        if not entry.users or not 0 < length <= entry.length or length % size:
            raise ValueError(
                f"node {node} of {entry.length} tokens and {entry.users} users cannot be split"
                f" after {length}: pages have {size}"
            )
        above, pages = self._new_id(), length // size
        self._nodes[above] = _Node(
            entry.parent, entry.start, length, length, entry.pages[:pages],
            holds=0, users=1, children=1, keepable=entry.keepable,
        )  # fmt: skip
        entry.parent, entry.start = above, entry.start + length
        entry.length, entry.capacity = entry.length - length, entry.capacity - length
        entry.pages = entry.pages[pages:]
        return above

    def set_keepable(self, node: int, keepable: bool) -> None:
        """Whether a node outlives its last user, as its parent then must, too. It must have one."""
        self._get(node).keepable = keepable

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
        if needed > self.free_pages:
            raise OutOfPages(
                f"node {node} needs {needed} pages, the pool has {self.free_pages} free"
            )
        self._evict(needed)
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
        self._use(node)

    def release(self, node: int) -> None:
        """Drop one hold. Nodes that then have neither holds nor children return their pages, unless
        they are kept.

        Raises ValueError if only its children keep the node.
        """
        entry = self._get(node)
        if not entry.holds:
            raise ValueError(f"node {node} is not held")
        entry.holds -= 1
        above: int | None = node
        while above is not None:
            node, entry = above, self._nodes[above]
            entry.users -= 1
            if entry.users:
                return
            above = entry.parent
            if entry.keepable:
                self._kept[node] = None
                self._kept_pages += len(entry.pages)
            else:
                self._remove(node)

    def drop_kept(self) -> None:
        """Remove all kept nodes."""
        while self._kept:
            self._drop_kept(next(iter(self._kept)))

    @property
    def free_pages(self) -> int:
        """Pages that no node owns, or only kept ones."""
        return len(self._free) + self._kept_pages

    @property
    def kept(self) -> KeysView[int]:
        """Nodes without users, those unused for the longest time first."""
        return self._kept.keys()

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

    def is_idle(self, node: int) -> bool:
        """Whether a held node has no child with users."""
        entry = self._get(node)
        return entry.users == entry.holds

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
    def nodes(self) -> KeysView[int]:
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
        used = Counter(entry.parent for entry in self._nodes.values() if entry.users)
        for node, entry in self._nodes.items():
            self._check_node(node, entry, children[node], used[node])
        self._check_reached()
        self._check_kept()
        held = {node: entry.holds for node, entry in self._nodes.items() if entry.holds}
        if holds is not None and held != dict(holds):
            raise IntegrityError(f"holds per node are {held}, the caller counts {dict(holds)}")

    def _new_id(self) -> int:
        node, self._next_id = self._next_id, self._next_id + 1
        return node

    def _use(self, node: int) -> None:
        """Add a user to a node; a kept one is then no longer kept, nor are its ancestors."""
        above: int | None = node
        while above is not None:
            entry = self._nodes[above]
            entry.users += 1
            if entry.users > 1:
                return
            del self._kept[above]
            self._kept_pages -= len(entry.pages)
            above = entry.parent

    def _remove(self, node: int) -> None:
        """Remove a node without users and children, whose parent has counted that."""
        entry = self._nodes.pop(node)
        self._free.extend(reversed(entry.pages))
        if entry.parent is not None:
            self._nodes[entry.parent].children -= 1

    def _evict(self, pages: int) -> None:
        """Take pages of kept nodes until that many are free; there must be as many."""
        while (lacking := pages - len(self._free)) > 0:
            node = next(iter(self._kept))
            pages_before = len(self._nodes[node].pages)
            length = min(self.length(node), max(pages_before - lacking, 0) * self.page_size)
            if length:
                self.truncate(node, length)
                freed = pages_before - len(self._nodes[node].pages)
                if not freed:  # going on would never end
                    raise IntegrityError(f"cutting node {node} to {length} tokens freed no page")
                self._kept_pages -= freed
            else:
                self._drop_kept(node)
            self.on_evict(node, length)

    def _drop_kept(self, node: int) -> None:
        del self._kept[node]
        self._kept_pages -= len(self._nodes[node].pages)
        self._remove(node)

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

    def _check_reached(self) -> None:
        """Every node is below a root."""
        below: dict[int | None, list[int]] = {}
        for node, entry in self._nodes.items():
            below.setdefault(entry.parent, []).append(node)
        reached = [*below.get(None, ())]
        for node in reached:
            reached += below.get(node, ())
        if lost := self._nodes.keys() - reached:
            raise IntegrityError(f"nodes {sorted(lost)} are below no root")

    def _check_kept(self) -> None:
        entries = self._nodes
        unused = {node for node, entry in entries.items() if not entry.users}
        if unused != self._kept.keys():
            raise IntegrityError(f"nodes {[*self._kept]} are kept, {sorted(unused)} have no users")
        pages = sum(len(entries[node].pages) for node in self._kept)
        if pages != self._kept_pages:
            raise IntegrityError(f"kept nodes own {pages} pages, {self._kept_pages} are counted")
        order = {node: number for number, node in enumerate(self._kept)}
        for node, number in order.items():
            parent = entries[node].parent
            if parent is not None and order.get(parent, len(order)) < number:
                raise IntegrityError(f"node {node} is kept after its parent {parent}")

    def _check_node(self, node: int, entry: _Node, children: int, used: int) -> None:
        parent = None if entry.parent is None else self._nodes.get(entry.parent)
        start = parent.start + parent.length if parent else 0
        pages = cdiv(entry.length, self.page_size)
        orphan = entry.parent is not None and parent is None
        for fault, message in (
            (orphan, f"its parent {entry.parent} is not in the tree"),
            (
                entry.start != start,
                f"it starts at {entry.start}, its ancestors have {start} tokens",
            ),
            (entry.children != children, f"it counts {entry.children} children but has {children}"),
            (entry.holds < 0, f"it has {entry.holds} holds"),
            (
                entry.users != entry.holds + used,
                f"it counts {entry.users} users but has {entry.holds + used}",
            ),
            (
                not entry.users and not entry.keepable,
                "it has neither holds nor children with users",
            ),
            (
                entry.keepable and parent is not None and not parent.keepable,
                f"it is keepable, its parent {entry.parent} is not",
            ),
            (entry.length < 0, f"it has {entry.length} tokens"),
            (len(entry.pages) < pages, f"it owns {len(entry.pages)} pages but needs {pages}"),
            (
                entry.capacity != len(entry.pages) * self.page_size,
                f"its {len(entry.pages)} pages do not hold {entry.capacity} tokens",
            ),
        ):
            if fault:
                raise IntegrityError(f"node {node}: {message}")
