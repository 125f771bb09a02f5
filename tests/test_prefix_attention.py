"""prefix_attention against a brute force in fp64 over random prefix trees."""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels._launch import ImplError
from kernels.prefix_attention import prefix_attention
from kernels.prefix_plan import PlanNode, PrefixPlan
from tests.errors import max_error

PAGE = 4
LENGTHS = (0, 1, PAGE - 1, PAGE, PAGE + 1, 13)  # empty, one token, page edges, a prime
FORMS = ("eager", "portable")


@dataclass
class Node:
    length: int
    num_new: int
    children: list["Node"]


def trees(depth: int) -> st.SearchStrategy[Node]:
    children = st.lists(trees(depth - 1), max_size=2) if depth > 1 else st.just([])
    return st.sampled_from(LENGTHS).flatmap(
        lambda length: st.builds(Node, st.just(length), st.integers(0, min(length, 5)), children)
    )


def lay_out(roots: list[Node]) -> tuple[list[PlanNode], int, int]:
    """Depth-first nodes with shuffled pages; the number of rows; the number of pages."""
    sizes: list[int] = []
    flat: list[list] = []
    rows = 0

    def visit(node: Node) -> None:
        nonlocal rows
        sizes.append(-(-node.length // PAGE))
        entry = [node.length, rows, None, node.num_new]
        flat.append(entry)
        rows += node.num_new
        for child in node.children:
            visit(child)
        entry[2] = rows

    for root in roots:
        visit(root)
    num_pages = sum(sizes) + 2  # two that nobody owns
    pages = iter(torch.randperm(num_pages, generator=torch.Generator().manual_seed(rows)).tolist())
    nodes = [
        PlanNode([next(pages) for _ in range(size)], length, start, end, new)
        for size, (length, start, end, new) in zip(sizes, flat, strict=True)
    ]
    return nodes, rows, num_pages


def pools(nodes: list[PlanNode], num_pages: int, kv_heads: int, dim: int) -> tuple[Tensor, Tensor]:
    """K and V pages: random where a node holds a token, NaN everywhere else."""
    generator = torch.Generator().manual_seed(num_pages)
    pair = []
    for _ in range(2):
        pool = torch.full((num_pages, kv_heads, PAGE, dim), math.nan)
        for node in nodes:
            for token in range(node.kv_len):
                value = torch.randn(kv_heads, dim, generator=generator)
                pool[node.pages[token // PAGE], :, token % PAGE] = value
        pair.append(pool)
    return pair[0], pair[1]


def brute_force(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, nodes: list[PlanNode], scale: float
) -> tuple[Tensor, Tensor]:
    """Row by row, in fp64, from the visibility formula alone."""
    out = torch.zeros_like(q, dtype=torch.float64)
    lse = torch.full(q.shape[:2], -math.inf, dtype=torch.float64)
    for row in range(q.shape[0]):
        seen = []
        for node in nodes:
            if node.row_start <= row < node.row_end:
                offset = node.kv_len - node.num_new
                visible = min(node.kv_len, offset + row - node.row_start + 1)
                seen += [(node.pages[t // PAGE], t % PAGE) for t in range(visible)]
        if not seen:
            continue
        page, at = torch.tensor(seen).T
        group = q.shape[1] // k_pages.shape[1]
        k = k_pages[page, :, at].double().repeat_interleave(group, dim=1)  # [tokens, Hq, D]
        v = v_pages[page, :, at].double().repeat_interleave(group, dim=1)
        scores = (k * q[row].double()).sum(-1) * scale
        out[row] = (scores.softmax(0)[..., None] * v).sum(0)
        lse[row] = scores.logsumexp(0)
    return out, lse


@settings(max_examples=60, deadline=None, derandomize=True)
@given(roots=st.lists(trees(4), min_size=1, max_size=2), heads=st.sampled_from([(1, 1), (8, 2)]))
def test_random_trees(roots: list[Node], heads: tuple[int, int]):
    """Trees of depth 1 to 4: empty nodes, one-token nodes, parents written beside children.

    Pages nobody owns and the tails of last pages hold NaN: a read beyond a node's length shows.
    """
    nodes, rows, num_pages = lay_out(roots)
    q = torch.randn(rows, heads[0], 8, generator=torch.Generator().manual_seed(1))
    k_pages, v_pages = pools(nodes, num_pages, heads[1], 8)
    plan = PrefixPlan.build(nodes, num_rows=rows, num_pages=num_pages, page_size=PAGE)
    expected, expected_lse = brute_force(q, k_pages, v_pages, nodes, 0.3)
    for impl in FORMS:
        out, lse = prefix_attention(
            q, k_pages, v_pages, plan, scale=0.3, return_lse=True, impl=impl
        )
        assert max_error(out, expected) < 2e-6, impl
        assert max_error(lse, expected_lse) < 2e-6, impl


@pytest.mark.parametrize("impl", FORMS)
def test_chunks_of_a_long_node(impl: str, monkeypatch: pytest.MonkeyPatch):
    """A node longer than a part of the plan; rows whose causal edge lies inside one."""
    monkeypatch.setattr("kernels.prefix_plan.PART_TOKENS", 2 * PAGE)
    nodes, rows, num_pages = lay_out([Node(41, 37, [Node(3, 2, [])])])
    q = torch.randn(rows, 2, 8, generator=torch.Generator().manual_seed(1))
    k_pages, v_pages = pools(nodes, num_pages, 1, 8)
    plan = PrefixPlan.build(nodes, num_rows=rows, num_pages=num_pages, page_size=PAGE)
    expected, _ = brute_force(q, k_pages, v_pages, nodes, 0.3)
    out = prefix_attention(q, k_pages, v_pages, plan, scale=0.3, impl=impl)
    assert max_error(out, expected) < 2e-6


@pytest.mark.parametrize("impl", FORMS)
def test_large_scores_do_not_overflow(impl: str):
    """Scores in the hundreds overflow exp unless each partial subtracts its own maximum."""
    nodes, rows, num_pages = lay_out([Node(9, 0, [Node(5, 1, []), Node(6, 1, [])])])
    q = 60 * torch.randn(rows, 2, 8, generator=torch.Generator().manual_seed(1))
    k_pages, v_pages = pools(nodes, num_pages, 1, 8)
    plan = PrefixPlan.build(nodes, num_rows=rows, num_pages=num_pages, page_size=PAGE)
    expected, _ = brute_force(q, k_pages, v_pages, nodes, 1.0)
    assert expected.isfinite().all()
    assert (
        max_error(prefix_attention(q, k_pages, v_pages, plan, scale=1.0, impl=impl), expected)
        < 1e-4
    )


def test_a_wrong_page_is_noticed():
    """Guards the tests themselves: with a wrong page in the plan the result must differ."""
    nodes, rows, num_pages = lay_out([Node(9, 1, [])])
    k_pages, v_pages = pools(nodes, num_pages, 1, 8)
    q = torch.randn(rows, 2, 8, generator=torch.Generator().manual_seed(1))
    expected, _ = brute_force(q, k_pages, v_pages, nodes, 0.3)
    wrong = [PlanNode([nodes[0].pages[0]] * 3, 9, 0, 1, 1)]
    plan = PrefixPlan.build(wrong, num_rows=rows, num_pages=num_pages, page_size=PAGE)
    for impl in FORMS:
        out = prefix_attention(q, k_pages, v_pages, plan, scale=0.3, impl=impl)
        assert max_error(out, expected) > 1e-2


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (PlanNode([7], 3, 0, 1), "page id 7"),
        (PlanNode([-1], 3, 0, 1), "page id -1"),
        (PlanNode([0], 5, 0, 1), "kv_len 5"),
        (PlanNode([0], 3, 0, 3), "rows 0..3"),
        (PlanNode([0], 3, 0, 1, 2), "2 new tokens"),
    ],
)
def test_plan_names_the_bad_node(node: PlanNode, message: str):
    """A page out of range would read another sequence's KV, on a GPU without any error."""
    with pytest.raises(ValueError, match=f"node 0: .*{message}"):
        PrefixPlan.build([node], num_rows=2, num_pages=4, page_size=PAGE)


def test_plan_refuses_rows_that_cross():
    """Rows of two nodes must nest: a row would otherwise see a node that is not its ancestor."""
    crossing = [PlanNode([0], 3, 0, 2), PlanNode([1], 3, 1, 3)]
    with pytest.raises(ValueError, match="node 1: its rows reach past"):
        PrefixPlan.build(crossing, num_rows=3, num_pages=4, page_size=PAGE)
    with pytest.raises(ValueError, match="node 1: nodes must stand in depth-first order"):
        PrefixPlan.build(
            [PlanNode([0], 3, 1, 2), PlanNode([1], 3, 0, 1)],
            num_rows=3,
            num_pages=4,
            page_size=PAGE,
        )


def test_shapes_are_checked():
    """A launcher that trusts its caller reads out of bounds on a GPU."""
    pages = torch.zeros(4, 2, PAGE, 8)
    plan = PrefixPlan.build([PlanNode([0], 3, 0, 1)], num_rows=1, num_pages=4, page_size=PAGE)
    good = torch.zeros(1, 4, 8)
    for q, k, message in [
        (torch.zeros(2, 4, 8), pages, "the plan is for 1 rows, not 2"),
        (torch.zeros(1, 3, 8), pages, "multiple of KV heads"),
        (torch.zeros(1, 4, 16), pages, "same head_dim"),
        (good, pages[:3], "the plan is for 4 pages"),
        (good, torch.zeros(4, 2, 8, 8), "pages of 4 tokens"),
        (good, torch.zeros(4, PAGE, 2, 8).transpose(1, 2), "pages must be contiguous"),
    ]:
        with pytest.raises(ValueError, match=message):
            prefix_attention(q, k, k, plan, scale=1.0)
    with pytest.raises(ImplError):
        prefix_attention(good, pages, pages, plan, scale=1.0, impl="fastest")
