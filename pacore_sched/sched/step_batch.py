"""The batch of one step: its rows in depth-first order, and the rows that read each node.

Consists of ints, which the executor turns into tensors. The scheduler decides what a step does.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from kernels.plan_node import PlanNode
from pacore_sched.sched.prefix_tree import PrefixTree


@dataclass(frozen=True)
class StepBatch:
    """The model's input for one step: T rows, one for each new token, in B work items."""

    work: tuple[tuple[int, int], ...]  # [B] (node, number of new tokens), in the order of rows
    plan_nodes: tuple[PlanNode, ...]  # nodes that rows read, parents before children
    positions: tuple[int, ...]  # [T] position of each new token in its sequence
    slots: tuple[int, ...]  # [T] where K and V are written: page * page_size + offset
    last_rows: tuple[int, ...]  # [B] row of each item's last token, whose logits are used


def build_step_batch(tree: PrefixTree, work: Iterable[tuple[int, int]]) -> StepBatch:
    """Lay out the step that writes the last `num_new` tokens of each (node, num_new) of `work`.

    The tokens must have been appended to the tree, and earlier steps must have written all earlier
    ones. A node and an ancestor may be written in the same step if all tokens of the node, and of
    the nodes between them, are new: the node's rows follow the ancestor's and see all of it, as
    they would in a later step.
    Raises ValueError if a node is listed twice, if a number of new tokens is not in 1..length, or
    if a node below one that is being written holds tokens of earlier steps.
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
            raise ValueError(f"node {node} holds {length} tokens: {num_new} of them cannot be new")
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
    """Every node with tokens on the path to a work item, with the rows of the items below it."""
    first_row: dict[int, int] = {}  # keys in depth-first order, parents first
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
                " written in this step"
            )
        if node in new:
            written = node
