"""Advancing a plan on the device, against plans built on the host."""

import pytest
import torch

from bench.inputs.plans import prefix_plan
from bench.inputs.trees import Node, fork
from kernels.kv_pages import KVPages
from kernels.plan_node import PlanNode
from kernels.prefix_attention import prefix_attention
from kernels.prefix_attention.advance import advance
from kernels.prefix_plan import PrefixPlan
from kernels.runtime.configs import Gpu, assume_gpu, use_config
from tests.support.errors import max_error

PAGE = 16
LENGTHS = (1, 15, 16, 17)  # one token; a page minus one, a page, a page plus one


def leaves_with_room(
    device: str, grown: int, reserve: int = 2, lengths: tuple[int, ...] = LENGTHS
) -> PrefixPlan:
    """Two prefixes with half of the leaves each, `grown` tokens advanced, `reserve` spare pages per
    leaf.

    Page ids descend, so that no page's successor has the next id.
    """
    half, last = len(lengths) // 2, sum(-(-n // PAGE) + reserve for n in lengths) + 1
    pages = iter(range(last, -1, -1))
    nodes, row = [], 0
    for prefix in (20, 0):
        own = [next(pages) for _ in range(-(-prefix // PAGE))]
        nodes.append(PlanNode(own, prefix, row, row + half))
        for length in lengths[row : row + half]:
            own = [next(pages) for _ in range(-(-length // PAGE) + reserve)]
            nodes.append(PlanNode(own, length + grown, row, row + 1, 1))
            row += 1
    return PrefixPlan.build(nodes, num_rows=row, num_pages=last + 1, page_size=PAGE, device=device)


def on_host(plan: PrefixPlan) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions and slots of the plan's rows, computed on the host."""
    leaves = [node for node in plan.nodes if node.num_new]
    slots = [n.pages[(n.kv_len - 1) // PAGE] * PAGE + (n.kv_len - 1) % PAGE for n in leaves]
    device = plan.kv_len.device
    return plan.row_position.long().to(device), torch.tensor(slots, device=device)


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_matches_the_host(triton_device, impl):
    """Guards every tensor that a step reads, across page boundaries."""
    plan = leaves_with_room(triton_device, 0)
    positions, slots = (x.clone() for x in on_host(plan))
    for grown in range(1, 2 * PAGE):
        advance(plan, positions, slots, impl=impl)
        fresh = leaves_with_room(triton_device, grown)
        for name in ("kv_len", "causal_offset", "row_position", "pages", "page_start"):
            assert torch.equal(getattr(plan, name), getattr(fresh, name)), (name, grown)
        assert torch.equal(positions, on_host(fresh)[0]) and torch.equal(slots, on_host(fresh)[1])


def test_more_rows_than_a_block(triton_device):
    """Guards 260 rollouts: three programs, the last with four rows; nothing beyond is written."""
    lengths = LENGTHS * 65
    plan = leaves_with_room(triton_device, 0, lengths=lengths)
    padded = [torch.cat([x, x.new_full((300,), 7)]) for x in on_host(plan)]
    advance(plan, *(x[:260] for x in padded), impl="triton")
    fresh = leaves_with_room(triton_device, 1, lengths=lengths)
    for name in ("kv_len", "causal_offset", "row_position"):
        assert torch.equal(getattr(plan, name), getattr(fresh, name)), name
    for x, expected in zip(padded, on_host(fresh), strict=True):
        assert torch.equal(x[:260], expected) and (x[260:] == 7).all()


def test_schedules_advance_too(triton_device):
    """Guards schedules in every mode: attention over an advanced plan equals that over a new one.

    The batch-invariant mode needs partials for chunks to come.
    """
    lengths = (14, 16)
    plan = leaves_with_room(triton_device, 0, lengths=lengths)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 16, generator=generator).to(triton_device)
    k = torch.randn(plan.num_pages, 1, PAGE, 16, generator=generator).to(triton_device)
    inputs = {"q": q, "pages": KVPages(k, k.flip(3).contiguous()), "scale": 0.3}
    positions, slots = (x.clone() for x in on_host(plan))
    toy = Gpu("toy", 90, sms=3, shared_bytes=227 * 1024)
    modes = [{"window": 0}, {"window": 21}, {"batch_invariant": True}]
    with assume_gpu(toy), use_config("prefix_attention", programs=1, grain=4, overhead=0):
        before = [prefix_attention(**inputs, **mode, plan=plan, impl="triton") for mode in modes]
        for _ in range(3):
            advance(plan, positions, slots, impl="triton")
        after = [prefix_attention(**inputs, **mode, plan=plan, impl="triton") for mode in modes]
    fresh = leaves_with_room(triton_device, 3, lengths=lengths)
    for mode, old, new in zip(modes, before, after, strict=True):
        options = {"window": mode.get("window", 0), "impl": "eager"}
        expected = prefix_attention(**inputs, **options, plan=fresh)
        assert max_error(new, expected) < 4e-6 < max_error(old, expected), mode


@pytest.mark.parametrize("window", [0, 21])
def test_layouts_advance_too(window):
    """Guards the portable form over an advanced plan, across page boundaries, with prefixes and
    leaves of several pages; it equals the definition over a new plan."""
    plan = leaves_with_room("cpu", 0, reserve=3)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(len(LENGTHS), 4, 16, generator=generator)
    k = torch.randn(plan.num_pages, 2, PAGE, 16, generator=generator)
    inputs = {"q": q, "pages": KVPages(k, k.flip(3).contiguous()), "scale": 0.3, "window": window}
    positions, slots = (x.clone() for x in on_host(plan))
    before = prefix_attention(**inputs, plan=plan, impl="portable")
    for grown in range(1, 3 * PAGE):
        advance(plan, positions, slots)
        fresh = leaves_with_room("cpu", grown, reserve=3)
        expected = prefix_attention(**inputs, plan=fresh, impl="eager")
        out = prefix_attention(**inputs, plan=plan, impl="portable")
        assert max_error(out, expected) < 4e-6 < max_error(before, expected), grown


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_no_slot_beyond_room(triton_device, impl):
    """Guards other leaves' pages: beyond `steps_left` the slot is -1."""
    plan = leaves_with_room(triton_device, 0, reserve=1)
    assert plan.steps_left == 16  # set by the leaf that fills its page
    positions, slots = (x.clone() for x in on_host(plan))
    for _ in range(plan.steps_left):
        advance(plan, positions, slots, impl=impl)
    assert (slots >= 0).all()
    advance(plan, positions, slots, impl=impl)
    assert (slots == -1).tolist() == [False, False, True, False]


def test_bad_input(triton_device):
    """Guards the checks: only decode plans of all rows advance, and messages name the argument."""
    plan = leaves_with_room(triton_device, 0)
    positions, slots = on_host(plan)
    gap = PrefixPlan.build([PlanNode([0], 2, 0, 1, 1)], num_rows=2, num_pages=1, page_size=PAGE)
    for forest in (
        [Node(9, new=3)],
        [Node(9, new=1), Node(9, new=2)],
        [Node(9, new=1, children=(Node(3, new=1),))],  # the child's start would move
    ):
        other = prefix_plan(0, triton_device, forest=forest, page_size=PAGE)
        with pytest.raises(ValueError, match="every row of the plan"):
            advance(other, positions[: other.num_rows], slots[: other.num_rows])
    with pytest.raises(ValueError, match="every row of the plan"):  # a row of no node
        advance(gap, positions[:2], slots[:2])
    one = [PlanNode([0], 3, 0, 1, 1)]  # and a row of no node
    plan_of_one = PrefixPlan.build(
        one, num_rows=2, num_pages=2, page_size=PAGE, device=triton_device
    )
    with pytest.raises(ValueError, match="every row of the plan"):
        advance(plan_of_one, positions[:2], slots[:2])
    with pytest.raises(ValueError, match="positions must be int32"):
        advance(plan, positions.float(), slots)
    with pytest.raises(ValueError, match="positions must be"):
        advance(plan, positions[:3], slots)
    with pytest.raises(ValueError, match="slots must be contiguous"):
        advance(plan, positions, slots.repeat(2)[::2])


@pytest.mark.gpu
def test_cuda_graph():
    """Guards replays: each replay of a captured step is one step further, without the host."""
    plan = prefix_plan(0, "cuda", forest=[fork(100, [1] * 8)])
    q = torch.randn(8, 32, 128, device="cuda", dtype=torch.bfloat16)
    k = torch.randn(plan.num_pages, 8, 64, 128, device="cuda", dtype=torch.bfloat16)
    positions, slots = plan.row_position.long(), torch.zeros(8, device="cuda", dtype=torch.int64)
    inputs = {"q": q, "pages": KVPages(k, k), "scale": 0.1, "plan": plan}
    prefix_attention(**inputs)  # compiles, and computes the schedule
    advance(plan, positions, slots)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = prefix_attention(**inputs)
        advance(plan, positions, slots)
    for _ in range(10):
        graph.replay()
    grown = [
        PlanNode(node.pages, node.kv_len + 10 * node.num_new, node.row_start, node.row_end, 0)
        for node in plan.nodes
    ]
    fresh = PrefixPlan.build(
        grown, num_rows=8, num_pages=plan.num_pages, page_size=64, device="cuda"
    )
    expected = prefix_attention(**(inputs | {"plan": fresh}), impl="eager")
    assert max_error(out, expected) < 2**-6
