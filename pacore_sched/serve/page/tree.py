"""The prefix tree as the page draws it: prompts, and the rollouts below each."""

from dataclasses import dataclass, field
from heapq import nsmallest
from typing import Literal

from pacore_sched.sched.prefix_tree import PrefixTree
from pacore_sched.sched.request import Group
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


@dataclass(slots=True)
class _Readers:
    """What reads a node; `branches` are the nodes of running rollouts right below it."""

    problems: list[int] = field(default_factory=list)
    running: int = 0
    branches: list[int] = field(default_factory=list)


def read_tree(scheduler: Scheduler) -> tuple[KvPages, list[Node], int]:
    """The pages, some nodes, and how many nodes are left out.

    The nodes are those that most running rollouts read, then those that are kept, the last used
    first.
    """
    tree, readers = scheduler.tree, _find_readers(scheduler)
    own = {rollout.node for rollout in scheduler.running}
    used = tree.nodes - readers.keys() - own - tree.kept  # kept between the rounds of a request
    kept = [*sorted(used), *list(tree.kept)[::-1]]
    prompts, rollouts = tree.num_pages_of(readers), tree.num_pages_of(own)
    kv = KvPages(
        total=tree.num_pages,
        page_tokens=tree.page_size,
        prompts=prompts,
        rollouts=rollouts,
        kept=tree.num_pages_of(kept),
        free=tree.num_pages - tree.num_pages_of(tree.nodes),
    )
    most_read = nsmallest(MAX_NODES, readers, key=lambda node: (-readers[node].running, node))
    shown = [*most_read, *kept][:MAX_NODES]
    nodes = [_describe(tree, node, readers.get(node, _Readers())) for node in shown]
    return kv, nodes, len(readers) + len(kept) - len(nodes)


def _find_readers(scheduler: Scheduler) -> dict[int, _Readers]:
    """The nodes that requests on the engine read."""
    running: dict[Group, list[int]] = {}
    for rollout in scheduler.running:
        running.setdefault(rollout.group, []).append(rollout.node)
    readers: dict[int, _Readers] = {}
    for group in scheduler.groups:
        written = [segment.node for segment in group.path if segment.node >= 0]
        branches = running.get(group, [])
        for node in scheduler.tree.path(written[-1]) if written else ():
            found = readers.setdefault(node, _Readers())
            found.problems.append(group.problem)
            found.running += len(branches)
        if written:
            readers[written[-1]].branches += branches
    return readers


def _describe(tree: PrefixTree, node: int, readers: _Readers) -> Node:
    extent = tree.extent(node)
    problems, branches = readers.problems, readers.branches
    return Node(
        id=node,
        parent=extent.parent,
        start=extent.start,
        tokens=extent.tokens,
        pages=extent.pages,
        state="running" if readers.running else "waiting" if problems else "kept",
        problems=problems[:MAX_READERS],
        problems_left_out=max(len(problems) - MAX_READERS, 0),
        running=readers.running,
        branches=[tree.length(branch) for branch in branches[:MAX_BRANCHES]],
        branches_left_out=max(len(branches) - MAX_BRANCHES, 0),
    )
