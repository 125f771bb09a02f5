"""A plan as its tensors: the plan they belong to, or one that means the same."""

import gc

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.kv_pages import KVPages
from kernels.plan_node import PlanNode
from kernels.prefix_plan import Capacity, PlanTensors, PrefixPlan
from tests.support.prefix_trees import Node, lay_out, trees

PAGE = 4


def cache(num_pages: int) -> KVPages:
    return KVPages(*torch.zeros(2, num_pages, 1, PAGE, 2))


def clones(tensors: PlanTensors) -> PlanTensors:
    return PlanTensors(*(x.clone() for x in tensors))


def read(nodes: list[PlanNode]) -> list[tuple]:
    """What rows read and write: nodes without rows matter to none."""
    return [
        (list(n.pages), n.kv_len, n.row_start, n.row_end, n.num_new)
        for n in nodes
        if n.row_start < n.row_end
    ]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(roots=st.lists(trees(4, PAGE), min_size=1, max_size=3))
def test_copies_mean_the_same(roots: list[Node]):
    """Guards a plan built from copied tensors, as of functionalised or loaded programs."""
    nodes, rows, num_pages = lay_out(roots, PAGE)
    plan = PrefixPlan.build(nodes, num_rows=rows, num_pages=num_pages, page_size=PAGE)
    built = PrefixPlan.of(clones(plan.tensors), rows, cache(num_pages))
    assert built is not plan
    assert read(built.nodes) == read(nodes)
    assert (built.num_rows, built.num_pages, built.page_size) == (rows, num_pages, PAGE)


def test_padded_plan():
    """Guards a padded plan's empty nodes, which are no nodes of a copy, and its values after
    `refill`."""
    capacity = Capacity(rows=3, max_node_rows=3, levels=2)
    plan = PrefixPlan.build(
        [PlanNode([0, 1], 6, 0, 3), *(PlanNode([2 + r], 1, r, r + 1, 1) for r in range(3))],
        num_rows=3,
        num_pages=6,
        page_size=PAGE,
        capacity=capacity,
    )
    nodes = [PlanNode([5], 2, 0, 2), *(PlanNode([2 + r], 4, r, r + 1, 1) for r in range(3))]
    tensors = plan.tensors
    plan.refill(nodes)
    assert read(PrefixPlan.of(clones(tensors), 3, cache(6)).nodes) == read(nodes)
    assert PrefixPlan.of(tensors, 3, cache(6)) is plan


def test_an_existing_plan_is_recognised():
    """Guards the schedules that layers share: the plan is found, also through other views; and
    against finding a plan that no longer exists, or one whose first tensors only are the same."""
    nodes = [PlanNode([0], 3, 0, 1, num_new=1)]
    size = {"num_rows": 1, "num_pages": 1, "page_size": PAGE}
    plan = PrefixPlan.build(nodes, **size)
    views = PlanTensors(*(x.view(x.shape) for x in plan.tensors))
    assert PrefixPlan.of(views, 1, cache(1)) is plan
    mixed = plan.tensors._replace(pages=plan.pages.clone())
    assert PrefixPlan.of(mixed, 1, cache(1)) is not plan
    kept = clones(plan.tensors)
    del plan, views, mixed
    gc.collect()
    assert read(PrefixPlan.of(kept, 1, cache(1)).nodes) == read(nodes)
