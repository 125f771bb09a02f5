"""Prefix plans of trees on shuffled pages, the pages' unused slots, and which tokens rows see."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from bench.inputs.draws import Device
from bench.inputs.trees import Node
from kernels.kv_pages import KVPages
from kernels.plan_node import PlanNode
from kernels.prefix_plan import PrefixPlan
from kernels.runtime.fp8 import quantise_e4m3


def prefix_plan(
    seed: int, device: Device, *, forest: Sequence[Node], page_size: int = 64
) -> PrefixPlan:
    """A plan of several trees on pages with shuffled ids; about an eighth of the pages stays
    unused."""
    needed = sum(math.ceil(n.tokens / page_size) for root in forest for n in root.walk())
    num_pages = needed + needed // 8 + 1
    free = torch.randperm(num_pages, generator=torch.Generator().manual_seed(seed)).tolist()
    nodes: list[PlanNode] = []
    row = 0
    for root in forest:
        row = _add_nodes(root, row, page_size, free, nodes)
    return PrefixPlan.build(
        nodes, num_rows=row, num_pages=num_pages, page_size=page_size, device=device
    )


def quantised(pages: KVPages) -> KVPages:
    """The same values as FP8 pages; NaN stays NaN, in pages and scales."""
    (k, k_scale), (v, v_scale) = quantise_e4m3(pages.k), quantise_e4m3(pages.v)
    return KVPages(k, v, k_scale, v_scale)


def unused_slots(plan: PrefixPlan) -> Tensor:
    """Which slots hold no token: bool [num_pages, page_size]."""
    unused = torch.ones(plan.num_pages, plan.page_size, dtype=torch.bool)
    for node in plan.nodes:
        slots = torch.ones(len(node.pages) * plan.page_size, dtype=torch.bool)
        slots[: node.kv_len] = False
        unused[list(node.pages)] = slots.view(len(node.pages), plan.page_size)
    return unused


def _add_nodes(node: Node, row: int, page_size: int, free: list[int], nodes: list[PlanNode]) -> int:
    """Give `node` and its subtree pages, and rows starting at `row`; returns the next free row."""
    pages = [free.pop() for _ in range(math.ceil(node.tokens / page_size))]
    nodes.append(PlanNode(tuple(pages), node.tokens, row, row + node.rows, node.new))
    row += node.new
    for child in node.children:
        row = _add_nodes(child, row, page_size, free, nodes)
    return row


VisibleRange = tuple[np.ndarray, np.ndarray]  # the tokens [begin, end) that each of some rows sees


def visible_ranges(plan: PrefixPlan, window: int) -> list[VisibleRange]:
    """For each node, the tokens [begin, end) that each row sees; none where begin >= end."""
    ends, start, position = [], [], np.full(plan.num_rows, -1)
    path: list[int] = []  # KV lengths of the node's ancestors
    for node, depth in zip(plan.nodes, plan.depths, strict=True):
        row = np.arange(node.row_end - node.row_start)
        ends.append(np.minimum(node.kv_len - node.num_new + row + 1, node.kv_len))
        position[node.row_start : node.row_end] += ends[-1]
        del path[depth:]
        start.append(sum(path))
        path.append(node.kv_len)
    oldest = position - window + 1 if window else np.zeros_like(position)
    return [
        (np.maximum(oldest[node.row_start : node.row_end] - offset * bool(window), 0), end)
        for node, offset, end in zip(plan.nodes, start, ends, strict=True)
    ]


def tokens(plan: PrefixPlan, window: int) -> tuple[int, int, int]:
    """Numbers of visible tokens: counted once per node, once per sequence, and once per row."""
    edges = np.unique([edge for node in plan.nodes for edge in (node.row_start, node.row_end)])
    shared = unshared = pairs = 0
    for node, (begin, end) in zip(plan.nodes, visible_ranges(plan, window), strict=True):
        seen = np.maximum(end - begin, 0)
        if not seen.any():
            continue
        runs = edges[(edges >= node.row_start) & (edges < node.row_end)] - node.row_start
        shared += int(end.max() - begin.min())
        by_run = np.maximum.reduceat(end, runs) - np.minimum.reduceat(begin, runs)
        unshared += int(np.maximum(by_run, 0).sum())
        pairs += int(seen.sum())
    return shared, unshared, pairs


def visible_tokens(forest: Sequence[Node], window: int = 0) -> tuple[int, int]:
    """How many tokens are seen by any row, and how many (row, seen token) pairs there are."""
    if window:
        shared, _, pairs = tokens(prefix_plan(0, "cpu", forest=forest), window)
        return shared, pairs
    nodes = [node for root in forest for node in root.walk() if node.rows]
    pairs = sum(node.rows * node.tokens - node.new * (node.new - 1) // 2 for node in nodes)
    return sum(node.tokens for node in nodes), pairs  # a new token does not see later ones
