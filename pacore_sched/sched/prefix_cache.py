"""The prefix cache: finds the KV of a prompt's first tokens by their content.

The nodes of prompts are a radix tree: each child of a node, or of a salt at the top, begins with
another page of content. A prompt takes what it shares with an earlier one, in whole pages; if that
ends within a node, the node is split. A prompt therefore needs the same number of pages, however
it is cut into nodes. Nodes are found as soon as tokens are written, and after their last user has
ended until their pages are needed (prefix_tree.py).

A content has an int for each token: its id, or what identifies the image embedding in its place.
"""

from collections.abc import Collection, Sequence
from itertools import takewhile
from typing import NamedTuple

from pacore_sched.sched.prefix_tree import PrefixTree

Content = tuple[int, ...]


class Found(NamedTuple):
    """The node at whose end a known beginning of a content ends, and its length in tokens.

    wait: whether the token that follows is being written: after this step, it can be found
    """

    node: int | None
    length: int
    wait: bool = False


class PrefixCache:
    """The contents of a tree's nodes."""

    def __init__(self, tree: PrefixTree) -> None:
        self.tree, tree.on_evict = tree, self._cut
        self._contents: dict[int, Content] = {}  # by node, with tokens that are not written yet
        self._places: dict[
            int, tuple[int | str, Content]
        ] = {}  # by node: parent or salt, first page
        self._nodes: dict[tuple[int | str, Content], int] = {}

    def add(self, node: int, parent: int | None, salt: str, content: Content) -> None:
        """Enter a new node and what will be written to it.

        Does nothing if another child has the same first page, or its parent is not in the cache.
        """
        place = salt if parent is None else parent
        known = parent is None or parent in self._places
        if known and self._enter(node, place, content):
            self.tree.set_keepable(node, True)

    def take(
        self, parent: int | None, salt: str, content: Content, writing: Collection[int]
    ) -> Found:
        """Find a content below `parent`, or at the top; a node that has only its beginning is
        split. Without `length`, the node is `parent`.

        writing: nodes that are written in the step that is being scheduled
        """
        found, size = Found(parent, 0), self.tree.page_size
        place: int | str = salt if parent is None else parent
        while (rest := content[found.length :]) and (place, rest[:size]) in self._nodes:
            node = self._nodes[place, rest[:size]]
            if node in writing:
                return found._replace(wait=True)
            own, written = self._contents[node], self.tree.length(node)
            common = _common(own[:written], rest)
            if common < len(own) or (common < len(rest) and common % size):
                common -= common % size
            if not common:
                break
            if common < len(own):
                node = self._split(node, common)
            found = Found(node, found.length + common)
            if self._contents.get(node) is not own:  # it was split
                break
            place = node
        return found

    def close(self, node: int) -> None:
        """Nothing more will be written to a node, which has no children if some is missing."""
        written = self.tree.length(node)
        if node in self._places and written < len(self._contents[node]):
            self.tree.truncate(node, written)
            self._contents[node] = self._contents[node][:written]
            if written < self.tree.page_size:
                self.forget(node)
                self.tree.set_keepable(node, False)

    def clear(self) -> None:
        """Forget all nodes: what was to be written to them may be missing."""
        self.tree.drop_kept()
        for node in self._places.keys() & self.tree.nodes:
            self.tree.set_keepable(node, False)
        for table in (self._contents, self._places, self._nodes):
            table.clear()

    def _cut(self, node: int, length: int) -> None:
        """The tree has taken pages of a kept node, and left it `length` tokens."""
        if length < self.tree.page_size:
            self.forget(node)
        else:
            self._contents[node] = self._contents[node][:length]

    def forget(self, node: int) -> None:
        """Remove a node, if it is here."""
        if node in self._places:
            del self._nodes[self._places.pop(node)], self._contents[node]

    def _enter(self, node: int, place: int | str, content: Content) -> bool:
        key = place, content[: self.tree.page_size]
        if key in self._nodes:
            return False
        self._contents[node], self._places[node], self._nodes[key] = content, key, node
        return True

    def _split(self, node: int, length: int) -> int:
        """Split a node; less than a page of rest is only found as a prompt's end."""
        (place, _), content = self._places[node], self._contents[node]
        self.forget(node)
        self.tree.hold(node)
        above = self.tree.split(node, length)
        self._enter(above, place, content[:length])
        self._enter(node, above, content[length:])
        self.tree.release(node)
        return above


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many first values are equal."""
    if one[: len(other)] == other[: len(one)]:
        return min(len(one), len(other))
    pairs = zip(one, other, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
