"""Helpers for tests of prefix attention: random prefix trees, a brute force in fp64, switches."""

import math
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from kernels.kv_pages import KVPages
from kernels.plan_node import PlanNode

# The switches of prefix attention's kernel config: 0 is the old form, 1 the new one.
SWITCHES = ("ahead", "steady", "pieces", "split", "fp16", "pdl")


@dataclass
class Node:
    length: int
    num_new: int
    children: list["Node"]


def trees(depth: int, page: int, most_new: int = 5) -> st.SearchStrategy[Node]:
    """Trees whose lengths are 0, 1, around a page, and primes that fill no page."""
    below = st.lists(trees(depth - 1, page, most_new), max_size=2) if depth > 1 else st.just([])
    lengths = (0, 1, page - 1, page, page + 1, 13, 37)
    return st.sampled_from(lengths).flatmap(
        lambda length: st.builds(
            Node, st.just(length), st.integers(0, min(length, most_new)), below
        )
    )


def lay_out(roots: list[Node], page: int) -> tuple[list[PlanNode], int, int]:
    """Depth-first nodes with shuffled pages; the number of rows; the number of pages."""
    sizes: list[int] = []
    flat: list[list] = []
    rows = 0

    def visit(node: Node) -> None:
        nonlocal rows
        sizes.append(-(-node.length // page))
        entry = [node.length, rows, None, node.num_new]
        flat.append(entry)
        rows += node.num_new
        for child in node.children:
            visit(child)
        entry[2] = rows

    for root in roots:
        visit(root)
    num_pages = sum(sizes) + 2  # two are unused
    pages = iter(torch.randperm(num_pages, generator=torch.Generator().manual_seed(rows)).tolist())
    nodes = [
        PlanNode([next(pages) for _ in range(size)], length, start, end, new)
        for size, (length, start, end, new) in zip(sizes, flat, strict=True)
    ]
    return nodes, rows, num_pages


def pools(nodes: list[PlanNode], num_pages: int, kv_heads: int, dim: int, page: int) -> KVPages:
    """K and V pages: random where a node has a token, NaN everywhere else."""
    generator = torch.Generator().manual_seed(num_pages)
    pair = []
    for _ in range(2):
        pool = torch.full((num_pages, kv_heads, page, dim), math.nan)
        for node in nodes:
            for token in range(node.kv_len):
                value = torch.randn(kv_heads, dim, generator=generator)
                pool[node.pages[token // page], :, token % page] = value
        pair.append(pool)
    return KVPages(*pair)


def brute_force(
    q: Tensor,
    pages: KVPages,
    nodes: list[PlanNode],
    scale: float,
    window: int = 0,
) -> tuple[Tensor, Tensor]:
    """Attention row by row in fp64, from the visibility formula alone: output and log-sum-exp."""
    out = torch.zeros_like(q, dtype=torch.float64)
    lse = torch.full(q.shape[:2], -math.inf, dtype=torch.float64)
    for row in range(q.shape[0]):
        seen = []
        for node in nodes:
            if node.row_start <= row < node.row_end:
                offset = node.kv_len - node.num_new
                visible = min(node.kv_len, offset + row - node.row_start + 1)
                offsets = (divmod(token, pages.page_size) for token in range(visible))
                seen += [(node.pages[index], at) for index, at in offsets]
        if not seen:
            continue
        index, at = torch.tensor(seen[-window:]).T
        group = q.shape[1] // pages.kv_heads
        k = pages.k[index, :, at].double().repeat_interleave(group, dim=1)  # [tokens, Hq, D]
        v = pages.v[index, :, at].double().repeat_interleave(group, dim=1)
        scores = (k * q[row].double()).sum(-1) * scale
        out[row] = (scores.softmax(0)[..., None] * v).sum(0)
        lse[row] = scores.logsumexp(0)
    return out, lse
