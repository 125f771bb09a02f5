"""Prefix trees by their numbers of tokens, without pages."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Node:
    """A node of a prefix tree: its tokens, how many of them this step writes, its children."""

    tokens: int
    new: int = 0
    children: tuple["Node", ...] = ()

    @property
    def rows(self) -> int:
        """Query rows of the node and its subtree."""
        return self.new + sum(child.rows for child in self.children)

    def walk(self) -> Iterator["Node"]:
        """The node and its subtree, depth-first."""
        yield self
        for child in self.children:
            yield from child.walk()


def fork(prefix: int, suffixes: Iterable[int]) -> Node:
    """A decode step's rollouts: a shared prefix, and a leaf per suffix whose last token is new."""
    return Node(prefix, children=tuple(Node(suffix, new=1) for suffix in suffixes))
