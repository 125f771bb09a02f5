"""A step's batch: the rows of all its work in depth-first order, and which rows read which node.

Made of ints; the executor turns it into tensors. What a step shall do is not decided here.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from kernels.plan_node import PlanNode
from pacore_sched.sched.prefix_tree import PrefixTree


@dataclass(frozen=True)
class StepBatch:
    """What the model runs in one step: T rows, one per new token, of B work items."""

    work: tuple[tuple[int, int], ...]  # [B] (node, number of new tokens), in the order of rows
    plan_nodes: tuple[PlanNode, ...]  # nodes that some row reads, parents before children
    positions: tuple[int, ...]  # [T] of each new token in its sequence
    slots: tuple[int, ...]  # [T] where its K and V go: page * page_size + offset
    last_rows: tuple[int, ...]  # [B] the row of each item's last token, which gives its logits


def build_step_batch(tree: PrefixTree, work: Iterable[tuple[int, int]]) -> StepBatch:
    """Lay out the step that writes the last `num_new` tokens of each (node, num_new) of `work`.

    The tokens have been appended; all earlier ones were written by earlier steps. A node may be
    written in the same step as a node above it if all of its own tokens are new, and those of the
    nodes between: its rows stand behind the upper node's and see all of it, as they would later.
    Raises ValueError for a node listed twice, a number of new tokens outside of 1..length, and
    tokens of earlier steps below a node that is being written.
    """
    work = list(work)
    new = dict(work)
    if len(new) < len(work):
        raise ValueError("a node is listed twice in one step")
    paths = tree.depth_first(new)
    order = [path[-1] for path in paths]
    positions: list[int] = []
    slots: list[int] = []
    last_rows: list[int] = []
    for node in order:
        num_new, length, context = new[node], tree.length(node), tree.context_length(node)
        if not 1 <= num_new <= length:
            raise ValueError(f"node {node} holds {length} tokens, of which {num_new} cannot be new")
        positions.extend(range(context - num_new, context))
        slots.extend(tree.slots(node, length - num_new, length))
        last_rows.append(len(positions) - 1)
    return StepBatch(
        work=tuple((node, new[node]) for node in order),
        plan_nodes=_plan_nodes(tree, paths, new),
        positions=tuple(positions),
        slots=tuple(slots),
        last_rows=tuple(last_rows),
    )


def _plan_nodes(
    tree: PrefixTree, paths: Sequence[Sequence[int]], new: Mapping[int, int]
) -> tuple[PlanNode, ...]:
    """Every node with tokens on the path to some work item, and the rows of the items below it."""
    first_row: dict[int, int] = {}  # filled parents first, in depth-first order
    end_row: dict[int, int] = {}
    row = 0
    for path in paths:
        item = path[-1]
        _check_written_in_order(tree, path, new)
        for node in path:
            first_row.setdefault(node, row)
            end_row[node] = row + new[item]
        row += new[item]
    return tuple(
        PlanNode(tree.pages(node), tree.length(node), first, end_row[node], new.get(node, 0))
        for node, first in first_row.items()
        if tree.length(node)
    )


def _check_written_in_order(tree: PrefixTree, path: Sequence[int], new: Mapping[int, int]) -> None:
    written = None
    for node in path:
        if written is not None and new.get(node, 0) < tree.length(node):
            raise ValueError(
                f"node {node} holds tokens of earlier steps, but node {written} above it is"
                " written in this one"
            )
        if node in new:
            written = node
