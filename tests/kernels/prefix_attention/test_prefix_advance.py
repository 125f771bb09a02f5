"""A plan that advances on the device is the plan the host would have built."""

import pytest
import torch

from bench.inputs import Node, fork, prefix_plan
from kernels.kv_pages import KVPages
from kernels.plan_node import PlanNode
from kernels.prefix_attention import prefix_attention
from kernels.prefix_attention.advance import advance
from kernels.prefix_plan import PrefixPlan
from kernels.runtime.configs import Gpu, assume_gpu, use_config
from tests.support.errors import max_error

PAGE = 16
LENGTHS = (1, 15, 16, 17)  # a first token, the last slot of a page, a page, one on a new page


def leaves_with_room(
    device: str, grown: int, reserve: int = 2, lengths: tuple[int, ...] = LENGTHS
) -> PrefixPlan:
    """Two prefixes, half of the leaves on each, `grown` tokens further; `reserve` pages more each.

    Page ids fall, so that no page is the one behind its neighbour.
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


def where(plan: PrefixPlan) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions and slots of the plan's rows, by the host."""
    leaves = [node for node in plan.nodes if node.num_new]
    slots = [n.pages[(n.kv_len - 1) // PAGE] * PAGE + (n.kv_len - 1) % PAGE for n in leaves]
    device = plan.kv_len.device
    return plan.row_position.long().to(device), torch.tensor(slots, device=device)


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_as_the_host_would(triton_device, impl):
    """Over the turns of pages, every tensor that a step reads."""
    plan = leaves_with_room(triton_device, 0)
    positions, slots = (x.clone() for x in where(plan))
    for grown in range(1, 2 * PAGE):
        advance(plan, positions, slots, impl=impl)
        fresh = leaves_with_room(triton_device, grown)
        for name in ("kv_len", "causal_offset", "row_position", "pages", "page_start"):
            assert torch.equal(getattr(plan, name), getattr(fresh, name)), (name, grown)
        assert torch.equal(positions, where(fresh)[0]) and torch.equal(slots, where(fresh)[1])


def test_more_rows_than_a_block(triton_device):
    """260 rollouts: three programs, the last with four rows; nothing behind the rows is touched."""
    lengths = LENGTHS * 65
    plan = leaves_with_room(triton_device, 0, lengths=lengths)
    padded = [torch.cat([x, x.new_full((300,), 7)]) for x in where(plan)]
    advance(plan, *(x[:260] for x in padded), impl="triton")
    fresh = leaves_with_room(triton_device, 1, lengths=lengths)
    for name in ("kv_len", "causal_offset", "row_position"):
        assert torch.equal(getattr(plan, name), getattr(fresh, name)), name
    for x, meant in zip(padded, where(fresh), strict=True):
        assert torch.equal(x[:260], meant) and (x[260:] == 7).all()


def test_schedules_advance_too(triton_device):
    """Attention over the advanced plan is that over a plan built anew: in every mode in use.

    The batch-invariant one needs slots for the chunks to come.
    """
    lengths = (14, 16)
    plan = leaves_with_room(triton_device, 0, lengths=lengths)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 16, generator=generator).to(triton_device)
    k = torch.randn(plan.num_pages, 1, PAGE, 16, generator=generator).to(triton_device)
    inputs = {"q": q, "pages": KVPages(k, k.flip(3).contiguous()), "scale": 0.3}
    positions, slots = (x.clone() for x in where(plan))
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


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_full_pages_take_nothing(triton_device, impl):
    """Beyond `room` a slot would lie in a page of somebody else."""
    plan = leaves_with_room(triton_device, 0, reserve=1)
    assert plan.room == 16  # of the leaf that fills its page
    positions, slots = (x.clone() for x in where(plan))
    for _ in range(plan.room):
        advance(plan, positions, slots, impl=impl)
    assert (slots >= 0).all()
    advance(plan, positions, slots, impl=impl)
    assert (slots == -1).tolist() == [False, False, True, False]


def test_bad_input(triton_device):
    plan = leaves_with_room(triton_device, 0)
    positions, slots = where(plan)
    beside = PrefixPlan.build([PlanNode([0], 2, 0, 1, 1)], num_rows=2, num_pages=1, page_size=PAGE)
    for forest in (
        [Node(9, new=3)],
        [Node(9, new=1), Node(9, new=2)],
        [Node(9, new=1, children=(Node(3, new=1),))],  # what the child stands behind would move
    ):
        other = prefix_plan(0, triton_device, forest=forest, page_size=PAGE)
        with pytest.raises(ValueError, match="every row of the plan"):
            advance(other, positions[: other.num_rows], slots[: other.num_rows])
    with pytest.raises(ValueError, match="every row of the plan"):  # a row that is nobody's
        advance(beside, positions[:2], slots[:2])
    one = [PlanNode([0], 3, 0, 1, 1)]  # and a row that is nobody's
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
    """A captured step replays without the host: each replay is one step further."""
    plan = prefix_plan(0, "cuda", forest=[fork(100, [1] * 8)])
    q = torch.randn(8, 32, 128, device="cuda", dtype=torch.bfloat16)
    k = torch.randn(plan.num_pages, 8, 64, 128, device="cuda", dtype=torch.bfloat16)
    positions, slots = plan.row_position.long(), torch.zeros(8, device="cuda", dtype=torch.int64)
    inputs = {"q": q, "pages": KVPages(k, k), "scale": 0.1, "plan": plan}
    prefix_attention(**inputs)  # compiles, and lays the schedule
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
