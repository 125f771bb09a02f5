"""prefix_attention's PyTorch forms against brute force in fp64, over random prefix trees."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.inputs.plans import quantised
from kernels.errors import ImplError
from kernels.kv_pages import KVPages
from kernels.plan_node import PlanNode
from kernels.prefix_attention import portable, prefix_attention
from kernels.prefix_plan import PrefixPlan
from tests.support.errors import max_error
from tests.support.prefix_trees import Node, brute_force, lay_out, pools, trees

PAGE = 4
FORMS = ("eager", "portable")


@settings(max_examples=90, deadline=None, derandomize=True)
@given(
    roots=st.lists(trees(4, PAGE), min_size=1, max_size=2),
    heads=st.sampled_from([(1, 1), (8, 2)]),
    window=st.sampled_from([0, 1, 7]),
    way=st.sampled_from(["flash", "products", "other device"]),
)
def test_random_trees(roots: list[Node], heads: tuple[int, int], window: int, way: str):
    """Guards trees of depth 1 to 4, empty and one-token nodes, parents written in the same step as
    children, windows, and the ways in which the portable form computes nodes of several rows.

    Unused pages and the ends of last pages hold NaN, so that a read beyond a node's length shows.
    """
    nodes, rows, num_pages = lay_out(roots, PAGE)
    q = torch.randn(rows, heads[0], 8, generator=torch.Generator().manual_seed(1))
    pages = pools(nodes, num_pages, heads[1], 8, PAGE)
    plan = PrefixPlan.build(nodes, num_rows=rows, num_pages=num_pages, page_size=PAGE)
    expected, expected_lse = brute_force(q, pages, nodes, 0.3, window)
    options = {"scale": 0.3, "window": window, "return_lse": True}
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(portable, "PRODUCT_WORK", 0 if way == "products" else 1 << 62)
        if way == "other device":
            monkeypatch.setattr(portable, "_flash", portable._without_flash)
        monkeypatch.setattr(portable, "PRODUCT_QUERIES", 9)  # two rows of 4 queries
        for impl in FORMS:
            out, lse = prefix_attention(q, pages, plan, impl=impl, **options)
            assert max_error(out, expected) < 2e-6, impl
            assert max_error(lse, expected_lse) < 2e-6, impl


@pytest.mark.parametrize("impl", FORMS)
def test_chunks_of_a_long_node(impl: str, monkeypatch: pytest.MonkeyPatch):
    """Guards a node longer than a part of the plan, and rows whose causal edge is inside a part; in
    the eager form, rows whose scores do not fit at once."""
    monkeypatch.setattr("kernels.prefix_attention.portable.SECTION_TOKENS", 2 * PAGE)
    monkeypatch.setattr("kernels.prefix_attention.op.EAGER_SCORES", 2 * 5 * (41 + 3))  # five rows
    nodes, rows, num_pages = lay_out([Node(41, 37, [Node(3, 2, [])])], PAGE)
    q = torch.randn(rows, 2, 8, generator=torch.Generator().manual_seed(1))
    pages = pools(nodes, num_pages, 1, 8, PAGE)
    plan = PrefixPlan.build(nodes, num_rows=rows, num_pages=num_pages, page_size=PAGE)
    expected, _ = brute_force(q, pages, nodes, 0.3)
    out = prefix_attention(q, pages, plan, scale=0.3, impl=impl)
    assert max_error(out, expected) < 2e-6


@pytest.mark.parametrize("impl", FORMS)
def test_large_scores_do_not_overflow(impl: str):
    """Guards scores in the hundreds: exp overflows unless a partial subtracts its maximum."""
    nodes, rows, num_pages = lay_out([Node(9, 0, [Node(5, 1, []), Node(6, 1, [])])], PAGE)
    q = 60 * torch.randn(rows, 2, 8, generator=torch.Generator().manual_seed(1))
    pages = pools(nodes, num_pages, 1, 8, PAGE)
    plan = PrefixPlan.build(nodes, num_rows=rows, num_pages=num_pages, page_size=PAGE)
    expected, _ = brute_force(q, pages, nodes, 1.0)
    assert expected.isfinite().all()
    assert max_error(prefix_attention(q, pages, plan, scale=1.0, impl=impl), expected) < 1e-4


@pytest.mark.parametrize("impl", FORMS)
def test_fp8_pages(impl: str):
    """Guards e4m3 pages, whose values are page * scale; unused pages and scales are NaN."""
    nodes, rows, num_pages = lay_out([Node(9, 0, [Node(5, 1, []), Node(6, 2, [])])], PAGE)
    q = torch.randn(rows, 4, 8, generator=torch.Generator().manual_seed(1))
    pages = quantised(pools(nodes, num_pages, 2, 8, PAGE))
    plan = PrefixPlan.build(nodes, num_rows=rows, num_pages=num_pages, page_size=PAGE)
    k = pages.k.float() * pages.k_scale[..., None]
    v = pages.v.float() * pages.v_scale[..., None]
    expected, _ = brute_force(q, KVPages(k, v), nodes, 0.3)
    out = prefix_attention(q, pages, plan, scale=0.3, impl=impl)
    assert max_error(out, expected) < 2e-6


def test_a_wrong_page_is_noticed():
    """Guards the tests themselves: with a wrong page in the plan the result must differ."""
    nodes, rows, num_pages = lay_out([Node(9, 1, [])], PAGE)
    pages = pools(nodes, num_pages, 1, 8, PAGE)
    q = torch.randn(rows, 2, 8, generator=torch.Generator().manual_seed(1))
    expected, _ = brute_force(q, pages, nodes, 0.3)
    wrong = [PlanNode([nodes[0].pages[0]] * 3, 9, 0, 1, 1)]
    plan = PrefixPlan.build(wrong, num_rows=rows, num_pages=num_pages, page_size=PAGE)
    for impl in FORMS:
        out = prefix_attention(q, pages, plan, scale=0.3, impl=impl)
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
    """Guards the plan's checks: a GPU would silently read another sequence's KV."""
    with pytest.raises(ValueError, match=f"node 0: .*{message}"):
        PrefixPlan.build([node], num_rows=2, num_pages=4, page_size=PAGE)


def test_plan_refuses_rows_that_cross():
    """Guards nesting: a row would otherwise attend to a node that is not its ancestor."""
    crossing = [PlanNode([0], 3, 0, 2), PlanNode([1], 3, 1, 3)]
    with pytest.raises(ValueError, match="node 1: its rows reach past"):
        PrefixPlan.build(crossing, num_rows=3, num_pages=4, page_size=PAGE)
    with pytest.raises(ValueError, match="node 1: nodes must be in depth-first order"):
        PrefixPlan.build(
            [PlanNode([0], 3, 1, 2), PlanNode([1], 3, 0, 1)],
            num_rows=3,
            num_pages=4,
            page_size=PAGE,
        )


def test_plan_refuses_rows_among_new_tokens():
    """Guards the order of rows: a child's rows follow its parent's, or they would be two tokens."""
    among = [PlanNode([0], 3, 0, 3, num_new=2), PlanNode([1], 3, 1, 3)]
    with pytest.raises(ValueError, match="node 1: its rows begin among another node's new tokens"):
        PrefixPlan.build(among, num_rows=3, num_pages=4, page_size=PAGE)


def test_shapes_are_checked():
    """Guards the launcher's checks: without them a GPU would read out of bounds."""
    pages = torch.zeros(4, 2, PAGE, 8)
    plan = PrefixPlan.build([PlanNode([0], 3, 0, 1)], num_rows=1, num_pages=4, page_size=PAGE)
    good = torch.zeros(1, 4, 8)
    for q, k, message in [
        (torch.zeros(2, 4, 8), pages, "the plan is for 1 rows, not 2"),
        (torch.zeros(1, 3, 8), pages, "multiple of KV heads"),
        (torch.zeros(1, 4, 16), pages, "same head_dim"),
        (good, pages[:3], "the plan is for 4 pages"),
        (good, torch.zeros(4, 2, 8, 8), "pages of 4 tokens"),
        (good, torch.zeros(4, PAGE, 2, 8).transpose(1, 2), "pages.k must be contiguous"),
        (good, pages.half(), "pages must be torch.float32 like q"),
        (good, pages.to(torch.float8_e4m3fn), "k_scale goes with pages of float8_e4m3fn"),
    ]:
        with pytest.raises(ValueError, match=message):
            prefix_attention(q, KVPages(k, k), plan, scale=1.0)
    with pytest.raises(ValueError, match="scale must be positive, not -1.0"):
        prefix_attention(good, KVPages(pages, pages), plan, scale=-1.0)
    with pytest.raises(ImplError):
        prefix_attention(good, KVPages(pages, pages), plan, scale=1.0, impl="fastest")
