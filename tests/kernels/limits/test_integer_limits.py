"""The limits of int32 (docs/integer_limits.md): plans and schedules of contexts of 2^20 tokens, of
caches of 1 TiB, and of the largest steps that fit; beyond each limit a ValueError."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from bench.cost.attention import Shape, spec_of
from kernels.kv_pages import KVPages
from kernels.patchify import patchify
from kernels.plan_node import PlanNode
from kernels.prefix_attention.records import HEAD, HIGH, LOW, NEXT, ROW, VECTOR
from kernels.prefix_attention.schedule import Schedule, ScheduleSpec
from kernels.prefix_plan import MAX_TOKENS, PrefixPlan
from kernels.qk_norm_rope import qk_norm_rope
from kernels.runtime.arithmetic import INT32_END
from kernels.runtime.configs import H200, use_config
from kernels.sampling import sample
from model.config import STEP3_VL_10B
from model.kv_cache import page_bytes
from tests.kernels.limits.reserved import reserved

PAGE, CONTEXT, ROLLOUTS = 64, 2**20, 65_536
BIG = STEP3_VL_10B.decoder
PAGES_OF_TIB = 2**40 // page_bytes(BIG, torch.float8_e4m3fn)


def one_node(rows: int, tokens: int, device: str = "cpu") -> PrefixPlan:
    """`rows` rows that all read one node."""
    pages = range(tokens // PAGE)
    sizes = {"num_rows": rows, "num_pages": max(PAGES_OF_TIB, len(pages)), "page_size": PAGE}
    return PrefixPlan.build([PlanNode(pages, tokens, 0, rows)], **sizes, device=device)


def test_a_cache_of_1_tib():
    """Guards the largest values in a plan: the last pages of the cache, positions near 2^20, and a
    page table of all pages."""
    leaves, own = 8, (PAGES_OF_TIB - CONTEXT // PAGE) // 8
    nodes, row = [PlanNode(range(CONTEXT // PAGE), CONTEXT - 5, 0, leaves)], 0
    for leaf in range(leaves):
        end = PAGES_OF_TIB - leaf * own
        nodes.append(PlanNode(range(end - own, end), own * PAGE - leaf, row, row + 1, 1))
        row += 1
    plan = PrefixPlan.build(nodes, num_rows=row, num_pages=PAGES_OF_TIB, page_size=PAGE)
    assert plan.kv_len.tolist() == [node.kv_len for node in nodes]
    assert plan.pages.tolist() == [page for node in nodes for page in node.pages]
    assert plan.row_position.tolist() == [CONTEXT - 5 + node.kv_len - 1 for node in nodes[1:]]
    assert plan.page_start.tolist() == [0, *np.cumsum([len(n.pages) for n in nodes]).tolist()]


def test_real_sizes_have_room():
    """Guards the documented headroom of the 10B in 1 TiB: tokens of a plan, and rows for TMA."""
    assert 64 * PAGES_OF_TIB * PAGE < MAX_TOKENS
    assert 16 * PAGES_OF_TIB * PAGE * BIG.kv_heads < INT32_END


def test_many_rollouts_of_one_context(triton_device):
    """Guards the real schedule where the line is half of int32: 65,536 rollouts of the 10B over
    2^20 tokens. Sums, each CTA's equal share, and the tile where it begins."""
    plan = one_node(ROLLOUTS, CONTEXT, triton_device)
    spec = replace(spec_of(plan, Shape(), H200), pieces=False)
    schedule = Schedule(plan, spec)
    tiles, places = ROLLOUTS * spec.group // 128, CONTEXT // spec.grain + spec.overhead
    line = spec.kv_heads * tiles * places
    assert INT32_END // 2 < line < INT32_END
    assert schedule.starts.tolist() == [tile * places for tile in range(tiles + 1)]
    share = -(-line // spec.programs)
    assert schedule.range_length[0] == share
    first_tiles = [program * share // places % tiles for program in range(spec.programs)]
    assert schedule.first_tile[0].tolist() == first_tiles


def test_the_longest_line(triton_device):
    """Guards products on a work line that just fits int32: all pieces together are all tokens of
    every row tile and KV head, once, and each CTA has an equal share."""
    tokens, tiles, rows = 2**24, 15, 15 * 32
    plan = one_node(rows, tokens, triton_device)
    spec = replace(spec_of(plan, Shape(), H200), pieces=True, grain=1)
    schedule = Schedule(plan, spec)
    line = spec.kv_heads * tiles * (tokens + spec.overhead)
    assert 0.9 * INT32_END < line < INT32_END
    share = -(-line // spec.programs)
    pieces = schedule.pieces.cpu().numpy().astype(np.int64)
    work = []
    for program in range(spec.programs):
        at, own = program, []
        while at >= 0:
            own.append(at)
            at = int(pieces[at, NEXT.value])
        work += own
        attended = (pieces[own, HIGH.value] - pieces[own, LOW.value]).sum()
        short = max(0, (program + 1) * share - line)  # the last CTA's range may be shorter
        assert share - (len(own) + 1) * spec.overhead <= attended + short <= share
    pieces = pieces[work]
    vectors = pieces[:, VECTOR.value]
    assert len({*vectors}) == len(work) and vectors.min() >= 0
    assert vectors.max() < 128 * schedule.partials[0]
    pieces = pieces[np.lexsort([pieces[:, column.value] for column in (LOW, ROW, HEAD)])]
    low, high = pieces[:, LOW.value], pieces[:, HIGH.value]
    tile = pieces[:, HEAD.value] * rows + pieces[:, ROW.value]
    starts = np.r_[True, tile[1:] != tile[:-1]]
    assert starts.sum() == tiles * spec.kv_heads
    assert (low[starts] == 0).all() and (high[np.r_[starts[1:], True]] == tokens).all()
    assert (low[1:] == high[:-1])[~starts[1:]].all()


def test_steps_beyond_the_line():
    """Guards against a schedule that wraps around: one tile more than fits is refused."""
    plan = one_node(32 * 16, 2**24)
    spec = replace(spec_of(plan, Shape(), H200), grain=1)
    with pytest.raises(ValueError, match="2147484036 places on the work line"):
        Schedule(plan, spec)


def test_partials_of_the_batch_invariant_mode():
    """Guards its workspace, a partial for each chunk: refused, not addressed by wrapped indices."""
    spec = ScheduleSpec(8, 4, (64, 0), grain=256, overhead=0, programs=132, invariant=True)
    with pytest.raises(ValueError, match="[0-9]{10} query vectors of partials"):
        Schedule(one_node(16 * 1024, CONTEXT), spec)


def test_plans_beyond_int32():
    """Guards page ids and token counts, which are stored as int32."""
    build = {"num_rows": 1, "page_size": PAGE}
    node = PlanNode(range(MAX_TOKENS // PAGE // 2), 5, 0, 1)
    with pytest.raises(ValueError, match="pages hold at most 1073741824 tokens"):
        PrefixPlan.build([node, node, PlanNode([0], 1, 0, 1)], num_pages=2**31, **build)
    with pytest.raises(ValueError, match="num_pages must be at most 2\\^31"):
        PrefixPlan.build([], num_pages=2**31 + 1, **build)
    assert PrefixPlan.build([], num_pages=2**31, **build).num_pages == 2**31


def test_int32_slots():
    """Guards the portable store: products of int32 slots exceed int32 before slots do."""
    page, heads = 4, 32
    last = 2**31 // heads  # the slot is 2^28, but page * heads is 2^31
    k = reserved((last + 1, heads, page, 16), torch.float16)
    pages = KVPages(k, k)
    qkv = torch.randn(1, 3 * heads * 16, dtype=torch.float16)
    slots = torch.tensor([last * page], dtype=torch.int32)
    qk_norm_rope(
        qkv,
        None,
        None,
        torch.zeros(8, dtype=int),
        torch.zeros(1, dtype=int),
        slots,
        pages,
        impl="portable",
    )
    assert torch.equal(k[last, :, 0].flatten(), qkv[0, 2 * heads * 16 :])


@pytest.mark.parametrize("top_p", [1.0, 0.5])
def test_strided_seeds(interpreter, top_p):
    """Guards seeds and positions that are columns of large tables."""
    logits = torch.randint(2, (3, 200)).float()  # few depths: the search for the cut is short
    table = reserved((3, 2**30), torch.int64)
    table[:, 0], table[:, 1] = torch.tensor([3, 5, 7]), torch.tensor([8, 6, 4])
    seeds, positions = table[:, 0], table[:, 1]
    options = {"temperature": 1.0, "top_p": top_p, "impl": "triton"}
    with use_config("sample_scan", block=256, num_warps=1), use_config("sample_cut", tile=4):
        tokens, _ = sample(logits, seeds, positions, **options)
        expected, _ = sample(logits, seeds.contiguous(), positions.contiguous(), **options)
    assert torch.equal(tokens, expected)


@pytest.mark.parametrize(
    ("view", "size"),
    [
        (torch.empty(21_846, 21_846, 3, dtype=torch.uint8, device="meta"), 1),  # padded: 8 for 3
        (torch.empty(28_000, 28_000, 3, dtype=torch.uint8, device="meta")[:, :28], 14),  # a part
    ],
    ids=["patches", "memory"],
)
def test_large_views(view, size):
    """Guards patchify's offsets into a view and into its patches."""
    with pytest.raises(ValueError, match="both must be under 2\\^31"):
        patchify([view], torch.empty(3, 256, device="meta"), size=size)
