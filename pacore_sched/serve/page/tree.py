"""The prefix tree as the page draws it: prompts, and the rollouts below each."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from heapq import nsmallest
from typing import Literal

from pacore_sched.sched.prefix_tree import NodeExtent
from pacore_sched.sched.scheduler import Scheduler

MAX_NODES = 64
MAX_BRANCHES = 16  # per node
MAX_READERS = 4  # per node


@dataclass(frozen=True, slots=True)
class KvPages:
    """KV pages by what they hold. The parts and `free` add up to `total`.

    prompts: of nodes that requests on the engine read
    rollouts: of what running rollouts have generated
    kept: of nodes that no request on the engine reads
    """

    total: int
    page_tokens: int
    prompts: int
    rollouts: int
    kept: int
    free: int


@dataclass(frozen=True, slots=True)
class Node:
    """A node of the prefix tree that is not a running rollout's own.

    parent: None for a root
    start: tokens before it, from the root
    tokens, pages: of the node itself
    state: "running" if running rollouts read it, "waiting" if only rollouts that wait will, "kept"
    if no request on the engine does
    problems: numbers of the requests on the engine that read it, oldest first
    problems_left_out: further ones
    running: running rollouts that read it, also those below other nodes
    branches: tokens of running rollouts whose own nodes are its children, oldest first
    branches_left_out: further ones
    """

    id: int
    parent: int | None
    start: int
    tokens: int
    pages: int
    state: Literal["running", "waiting", "kept"]
    problems: list[int]
    problems_left_out: int
    running: int
    branches: list[int]
    branches_left_out: int


def read_tree(scheduler: Scheduler) -> tuple[KvPages, list[Node], int]:
    """The pages, the nodes that most rollouts read, and how many nodes are left out.

    A node comes after its parent, and is left out if its parent is.
    """
    tree = scheduler.tree
    extents = {extent.node: extent for extent in tree.nodes()}
    own = [extents.pop(rollout.node) for rollout in scheduler.running]
    branches: dict[int, list[int]] = {}
    for extent in own:
        if extent.parent is not None:
            branches.setdefault(extent.parent, []).append(extent.tokens)
    running = _running(extents, branches)
    readers: dict[int, list[int]] = {}
    for group in scheduler.groups:
        for segment in group.path:
            readers.setdefault(segment.node, []).append(group.problem)

    def rank(extent: NodeExtent) -> tuple[int, bool, int, int]:
        """Of a node and its parent, the parent's is smaller."""
        return -running[extent.node], extent.node not in readers, extent.start, extent.node

    nodes = []
    for node, parent, start, tokens, pages in nsmallest(MAX_NODES, extents.values(), key=rank):
        below, problems = branches.get(node, []), readers.get(node, [])
        nodes.append(
            Node(
                id=node,
                parent=parent,
                start=start,
                tokens=tokens,
                pages=pages,
                state="running" if running[node] else "waiting" if problems else "kept",
                problems=problems[:MAX_READERS],
                problems_left_out=max(len(problems) - MAX_READERS, 0),
                running=running[node],
                branches=below[:MAX_BRANCHES],
                branches_left_out=max(len(below) - MAX_BRANCHES, 0),
            )
        )
    prompts = sum(extent.pages for extent in extents.values() if extent.node in readers)
    kv = KvPages(
        total=tree.num_pages,
        page_tokens=tree.page_size,
        prompts=prompts,
        rollouts=sum(extent.pages for extent in own),
        kept=sum(extent.pages for extent in extents.values()) - prompts,
        free=tree.free_pages,
    )
    return kv, nodes, len(extents) - len(nodes)


def _running(
    extents: Mapping[int, NodeExtent], branches: Mapping[int, Sequence[int]]
) -> Counter[int]:
    """How many running rollouts read each node."""
    running: Counter[int] = Counter()
    for below, rollouts in branches.items():
        node: int | None = below
        while node is not None:
            running[node] += len(rollouts)
            node = extents[node].parent
    return running
