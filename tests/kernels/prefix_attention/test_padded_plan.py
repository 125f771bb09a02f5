"""Padded plans: after every refill they equal a newly built plan."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.kv_pages import KVPages
from kernels.plan_node import PlanNode
from kernels.prefix_attention import prefix_attention
from kernels.prefix_attention.advance import advance
from kernels.prefix_attention.schedule import Schedule, ScheduleSpec
from kernels.prefix_plan import Capacity, PrefixPlan
from kernels.rotary_attention import rotary_attention
from kernels.rotary_tables import rotary_frequencies
from kernels.runtime.configs import Gpu, assume_gpu, use_config
from kernels.runtime.staging import ALIGNMENT, Packed
from tests.support.errors import max_error

PAGE, PAGES, KV_HEADS, DIM = 16, 40, 1, 16
ROWS = 5
SCRATCH = PAGES - 1  # the page of padding rows
TOY = Gpu("toy", 90, sms=3, shared_bytes=227 * 1024)
# Successive batches: for each group the tokens of its prefixes and of its leaves.
HISTORY = [
    [((20, 33), (1, 15, 16, 3))],  # an image and a prompt over four leaves
    [((40,), (2, 18)), ((), (5,)), ((20,), (17,))],
    [((), (1,))],  # almost only padding
    [((3,), (9,)), ((60,), (30, 14, 15, 16))],  # no padding
    [((20, 33), (1, 15, 16, 3))],
]


def nodes_of(groups: list, grown: int = 0, seed: int = 0) -> list[PlanNode]:
    """Groups side by side on shuffled pages; every leaf has a spare page."""
    order = torch.randperm(SCRATCH, generator=torch.Generator().manual_seed(seed)).tolist()
    nodes, row = [], 0

    def pages(tokens: int) -> list[int]:
        return [order.pop() for _ in range(-(-tokens // PAGE))]

    for prefixes, leaves in groups:
        nodes += [PlanNode(pages(n), n, row, row + len(leaves)) for n in prefixes]
        for length in leaves:
            nodes.append(PlanNode(pages(length + PAGE), length + grown, row, row + 1, 1))
            row += 1
    return nodes


def rows_of(nodes: list[PlanNode]) -> int:
    return sum(node.num_new for node in nodes)


def kv(nodes: list[PlanNode], device: str) -> KVPages:
    """Pages: random where a node holds, or will hold, a token, and NaN elsewhere."""
    generator = torch.Generator().manual_seed(rows_of(nodes))
    pair = torch.full((2, PAGES, KV_HEADS, PAGE, DIM), math.nan)
    for node in nodes:
        for page in node.pages:
            pair[:, page] = torch.randn(2, KV_HEADS, PAGE, DIM, generator=generator)
    return KVPages(*pair.to(device))


def build(nodes: list[PlanNode], device: str, capacity: Capacity | None = None) -> PrefixPlan:
    rows = capacity.rows if capacity else rows_of(nodes)
    return PrefixPlan.build(
        nodes,
        num_rows=rows,
        num_pages=PAGES,
        page_size=PAGE,
        device=device,
        capacity=capacity,
    )


# Tiles of 16 vectors only, of both sizes, and of 64 only.
@pytest.mark.parametrize(("group", "changes"), [(2, 5), (4, 5), (17, 2)])
def test_attention_over_refilled_plans(triton_device: str, group: int, changes: int):
    """Guards what rollouts read after changes of the batch, and after steps between changes.

    Pages that the current plan does not use hold NaN, and so does the padding's page: data left
    from an older plan, or leaked from a padding row, would show.
    """
    capacity = Capacity(ROWS, max_node_rows=ROWS, levels=3)
    plan = build(capacity.padding(0, SCRATCH), triton_device, capacity)
    addresses = {name: x.data_ptr() for name, x in plan.packed.tensors.items()}
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(ROWS, KV_HEADS * group, DIM, generator=generator).to(triton_device)
    with assume_gpu(TOY), use_config("prefix_attention", programs=1, grain=4, overhead=1):
        for seed, groups in enumerate(HISTORY[:changes]):
            nodes, steps = nodes_of(groups, seed=seed), seed % 3
            pages = kv(nodes, triton_device)
            rows = rows_of(nodes)
            plan.refill(nodes + capacity.padding(rows, SCRATCH))
            positions, slots = plan.row_position.clone(), torch.zeros_like(plan.row_position)
            for _ in range(steps):
                advance(plan, positions, slots, impl="triton")
            options = {"pages": pages, "scale": 0.3}
            out = prefix_attention(q, plan=plan, impl="triton", **options)
            fresh = build(nodes_of(groups, steps, seed), triton_device)
            expected = prefix_attention(q[:rows], plan=fresh, impl="eager", **options)
            assert max_error(out[:rows], expected) < 4e-6, seed
    assert {name: x.data_ptr() for name, x in plan.packed.tensors.items()} == addresses
    assert len(plan.schedules) == 1


def test_fused_step_over_a_refilled_plan(triton_device: str):
    """Guards the fused form's writes: new tokens go to the refilled plan's slots only."""
    capacity = Capacity(ROWS, max_node_rows=ROWS, levels=3)
    plan = build(capacity.padding(0, SCRATCH), triton_device, capacity)
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(ROWS, (4 + 2) * KV_HEADS * DIM, generator=generator).to(triton_device)
    frequencies = rotary_frequencies(1e4 ** -(torch.arange(0, DIM, 2).double() / DIM)).to(
        triton_device
    )
    weight = torch.ones(DIM, device=triton_device)
    with assume_gpu(TOY), use_config("prefix_attention", programs=1, grain=4, overhead=1):
        for seed, groups in enumerate(HISTORY[:3]):
            nodes = nodes_of(groups, seed=seed)
            rows, pages = rows_of(nodes), kv(nodes, triton_device)
            written = pages.map(Tensor.clone)
            plan.refill(nodes + capacity.padding(rows, SCRATCH))
            leaves = [node for node in nodes if node.num_new]
            leaf_slots = [
                n.pages[(n.kv_len - 1) // PAGE] * PAGE + (n.kv_len - 1) % PAGE for n in leaves
            ]
            slots = torch.tensor(
                leaf_slots + [SCRATCH * PAGE] * (ROWS - rows), device=triton_device
            )
            args = (weight, weight, frequencies, plan.row_position.clone())
            out = rotary_attention(
                qkv, *args, slots, written, plan, scale=0.3, fused=True, impl="triton"
            )
            args = (weight, weight, frequencies, plan.row_position[:rows].clone())
            fresh = build(nodes, triton_device)
            expected = rotary_attention(
                qkv[:rows], *args, slots[:rows], pages, fresh, scale=0.3, impl="eager"
            )
            assert max_error(out[:rows], expected) < 4e-6, seed
            for result, target in zip(written[:2], pages[:2], strict=True):
                torch.testing.assert_close(
                    result[:SCRATCH], target[:SCRATCH], rtol=1e-5, atol=1e-5, equal_nan=True
                )


def test_advances_like_an_exact_plan(triton_device: str):
    """Guards every tensor that a step reads, padding included, across a page boundary."""
    capacity = Capacity(ROWS, max_node_rows=ROWS, levels=3)
    nodes = nodes_of(HISTORY[1])
    plan = build(nodes + capacity.padding(4, SCRATCH), triton_device, capacity)
    assert plan.steps_left == 15  # set by the padding rows: one token of a page
    positions, slots = plan.row_position.clone(), torch.zeros_like(plan.row_position)
    for grown in range(1, 14):
        advance(plan, positions, slots, impl="triton")
        fresh = build(nodes_of(HISTORY[1], grown), triton_device)
        for name in ("kv_len", "causal_offset", "row_start", "row_end"):
            padded = getattr(plan, name)
            assert torch.equal(padded[: len(nodes)], getattr(fresh, name)), name
        assert plan.kv_len[len(nodes) + 1 :].eq(0).all()
        assert torch.equal(plan.row_position[:4], fresh.row_position)
        assert torch.equal(positions[:4], fresh.row_position)


@st.composite
def decode_forests(draw: st.DrawFn) -> tuple[Capacity, list[PlanNode]]:
    """A decode step of up to 40 rows under up to three levels of shared nodes."""
    rows, nodes = draw(st.integers(1, 40)), []

    def add_nodes(start: int, end: int, above: int) -> None:
        if not above:
            nodes.extend(PlanNode((row,), 1, row, row + 1, 1) for row in range(start, end))
            return
        while start < end:
            stop = draw(st.integers(start + 1, end))
            if draw(st.booleans()):
                nodes.append(PlanNode((40 + len(nodes),), 1, start, stop))
            add_nodes(start, stop, above - 1)
            start = stop

    levels = draw(st.integers(1, 4))
    add_nodes(0, rows, levels - 1)
    max_rows = max(node.row_end - node.row_start for node in nodes)
    return Capacity(rows, draw(st.integers(max_rows, rows)), levels), nodes


def full_of_tiles(rows: int, most: int) -> tuple[Capacity, list[PlanNode]]:
    """The most tiles possible: nodes just too large for the small size, at each of two levels."""
    nodes = []
    for start in range(0, rows, most):
        nodes += [PlanNode((100 + start + level,), 1, start, start + most) for level in (0, 1)]
        nodes += [PlanNode((row,), 1, row, row + 1, 1) for row in range(start, start + most)]
    return Capacity(rows, most, 3), nodes


@settings(max_examples=40)
@example(full_of_tiles(40, 5), (64, 16))
@example(full_of_tiles(51, 17), (64, 0))
@given(decode_forests(), st.sampled_from([(64, 16), (0, 16), (64, 0), (128, 16)]))
def test_capacity_holds_every_forest(
    triton_device: str, step: tuple[Capacity, list[PlanNode]], sizes: tuple[int, int]
):
    """Guards a running engine: no batch within the capacity has more tiles than the schedule."""
    capacity, nodes = step
    sizes = sizes if sizes[0] or 4 * capacity.max_node_rows <= 16 else (64, 16)
    shape = {"num_rows": capacity.rows, "num_pages": 300, "page_size": PAGE}
    plan = PrefixPlan.build(nodes, **shape, capacity=capacity, device=triton_device)
    without = PrefixPlan.build(nodes, **shape, device=triton_device)
    spec = ScheduleSpec(kv_heads=1, group=4, sizes=sizes, grain=4, overhead=1, programs=1)
    padded, exact = Schedule(plan, spec), Schedule(without, spec)
    assert all(room >= used for room, used in zip(padded.counts, exact.counts, strict=True))
    assert padded.starts[-1] == exact.starts[-1]  # empty tiles take no part of the line


def test_what_a_padded_plan_refuses():
    """Guards refused refills: the error names what does not fit, and the plan does not change."""
    capacity = Capacity(rows=8, max_node_rows=4, levels=2)
    first = nodes_of([((20,), (3, 4, 5))])
    plan = build(first + capacity.padding(3, SCRATCH), "cpu", capacity)
    before = {name: x.clone() for name, x in plan.packed.tensors.items()}
    for groups, complaint in (
        ([((3,), (1,) * 5)], "with up to 5 rows"),
        ([((3, 4), (1, 2))], "3 on a path"),
    ):
        nodes = nodes_of(groups)
        with pytest.raises(ValueError, match=complaint):
            plan.refill(nodes + capacity.padding(rows_of(nodes), SCRATCH))
    with pytest.raises(ValueError, match="decode step of exactly 8 rows"):
        plan.refill(first)
    two = [replace(first[1], num_new=0), *first[2:]]
    with pytest.raises(ValueError, match="decode step of exactly 8 rows"):
        plan.refill([first[0], *two, *capacity.padding(3, SCRATCH)])
    assert all(torch.equal(x, before[name]) for name, x in plan.packed.tensors.items())
    assert len(plan.nodes) == 4 + 5
    with pytest.raises(ValueError, match="no schedule for padded plans"):
        Schedule(plan, ScheduleSpec(1, 4, (64, 0), PAGE, 0, 1, invariant=True))


def test_packed_tensors_are_aligned(device: str):
    """Guards alignment: Triton compiles another kernel for pointers not aligned to 16 bytes."""
    packed = Packed({"a": (3,), "b": (2, 3), "c": (1,)}, device=device)
    assert all(x.data_ptr() % ALIGNMENT == 0 for x in packed.tensors.values())
    arrays = {name: torch.arange(x.numel()).numpy() + 1 for name, x in packed.tensors.items()}
    packed.fill(arrays)
    packed.fill(arrays | {"a": arrays["a"][:1]})
    assert packed.tensors["a"].tolist() == [1, 0, 0]
    assert packed.tensors["b"].tolist() == [[1, 2, 3], [4, 5, 6]]
    with pytest.raises(ValueError, match="a takes at most 3 values, got 4"):
        packed.fill(arrays | {"b": arrays["b"] * 2, "a": torch.arange(4).numpy()})
    assert packed.tensors["b"].tolist() == [[1, 2, 3], [4, 5, 6]]
