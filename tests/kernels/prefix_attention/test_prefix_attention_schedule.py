"""Prefix attention's schedule against the same sums computed on the host, tile by tile.

A wrong schedule often costs only time: results are right as long as every offset of the work line
belongs to a program. Nothing here runs attention, so trees may be as large as real ones.
"""

from dataclasses import fields, replace
from itertools import accumulate

import pytest
import torch

from bench.inputs.plans import prefix_plan
from bench.inputs.trees import Node, fork
from kernels.plan_node import PlanNode
from kernels.prefix_attention.configs import InputClass
from kernels.prefix_attention.records import (
    ALONE,
    EDGE,
    END,
    FLAGS,
    GRAIN_START,
    HIGH,
    LOW,
    NEXT,
    ROW,
    ROWS,
    VECTOR,
    WRITES,
)
from kernels.prefix_attention.schedule import Schedule, ScheduleSpec
from kernels.prefix_plan import PrefixPlan

PAGE = 16
SPEC = ScheduleSpec(kv_heads=2, group=4, sizes=(64, 16), grain=4, overhead=2, programs=5)
FORESTS = {
    "nothing": [],
    "empty nodes alone": [Node(0, children=(Node(0),))],
    "less work than programs": [Node(1, new=1)],
    "both sizes": [fork(33, [1, 15, 16, 17]), Node(50, new=21), Node(0), fork(7, [5] * 17)],
    # The line is computed in blocks of 256 tiles and divided among blocks of 256 programs.
    "300 nodes": [fork(20 + at % 7, [1 + at % 5] * 3) for at in range(75)],
}
# With 40 programs one range crosses from block to block; with fewer they are only longer.
CASES = [
    pytest.param(forest, programs, id=f"{name}, {programs}")
    for name, forest in FORESTS.items()
    for programs in ((40, 300) if name == "300 nodes" else (1, 5, 300))
]


def visible_grains(
    plan: PrefixPlan, spec: ScheduleSpec, node: int, row: int, rows: int
) -> tuple[int, int]:
    """First grain and end (in tokens) of what the rows see of a node, by the plan's formula."""
    n = plan.nodes[node]
    before = plan.node_starts[node]
    offset = n.kv_len - n.num_new - n.row_start + 1
    ends = [min(n.kv_len, offset + r) for r in range(row, row + rows)]
    oldest = [int(plan.row_position[r]) - spec.window + 1 - before for r in range(row, row + rows)]
    return (max(min(oldest), 0) // spec.grain if spec.window else 0), max(ends)


@pytest.mark.parametrize("window", [0, 1, 18])
@pytest.mark.parametrize(("forest", "programs"), CASES)
def test_the_line(triton_device, forest, programs, window):
    """Guards the work line: each tile's length on it, prefix sums, and where each range begins."""
    plan = prefix_plan(0, triton_device, forest=forest, page_size=PAGE)
    spec = replace(SPEC, programs=programs, window=window)
    schedule = Schedule(plan, spec)
    lengths = []
    for tile, (record, node) in enumerate(
        zip(schedule.tiles.tolist(), schedule.node_of_tile.tolist(), strict=True)
    ):
        row, rows = record[ROW.value], record[ROWS.value]
        first, end = visible_grains(plan, spec, node, row, rows)
        offset = plan.nodes[node].kv_len - plan.nodes[node].num_new
        edge = offset - plan.nodes[node].row_start + 1
        assert record[GRAIN_START.value : EDGE.value + 1] == [first, end, edge], tile
        grains = max(-(-end // spec.grain) - first, 0)
        lengths.append(grains + spec.overhead if grains else 0)
        small = spec.group * (plan.nodes[node].row_end - plan.nodes[node].row_start) <= 16
        assert small == (tile >= schedule.counts[0]), "the smaller tiles, and only they, come last"
    starts = [0, *accumulate(lengths)]
    assert schedule.starts.tolist() == starts

    share = int(schedule.range_length[0])
    assert schedule.range_length.tolist() == [share] * 2
    assert share == max(1, -(-spec.kv_heads * starts[-1] // programs))
    large = schedule.counts[0]
    line = [at for at in walk(spec, large, len(lengths)) for _ in range(lengths[at[2]])]
    for program in range(programs):
        work_range = line[program * share : (program + 1) * share]
        for size in (0, 1):
            own = [tile for at, _, tile in work_range if at == size]
            first = int(schedule.first_tile[size, program])
            assert not own or first == own[0] - size * large, (size, program)


def walk(spec: ScheduleSpec, large: int, tiles: int) -> list[tuple[int, int, int]]:
    """(size, KV head, tile) in the order of the line."""
    return [
        (size, head, tile)
        for size, of_size in ((0, range(large)), (1, range(large, tiles)))
        for head in range(spec.kv_heads)
        for tile in of_size
    ]


MODES = {
    "one line": {},
    "two lines": {"small_programs": 7},
    "two lines, few programs for one": {"small_programs": 2},
    "batch-invariant": {"invariant": True, "overhead": 0},
}


# With 300 nodes, few programs would only have longer ranges.
PIECES = [
    pytest.param(*case.values, mode, id=f"{case.id}, {name}")
    for case in CASES
    for name, mode in MODES.items()
    if not (case.id.startswith("300 nodes") and "few programs" in name)
]


@pytest.mark.parametrize("window", [0, 18])
@pytest.mark.parametrize(("forest", "programs", "mode"), PIECES)
def test_the_pieces(triton_device, forest, mode, programs, window):
    """Guards every program's pieces, against its range of the work line, offset by offset."""
    plan = prefix_plan(0, triton_device, forest=forest, page_size=PAGE)
    spec = replace(SPEC, programs=programs, window=window, pieces=True, **mode)
    schedule = Schedule(plan, spec)
    tiles, starts = schedule.tiles.tolist(), schedule.starts.tolist()
    large, pieces, actual = schedule.counts[0], schedule.pieces.tolist(), []
    for size in (0, 1):
        first = spec.programs if size else 0
        for program in range(spec.programs_of(size)):
            at = first + program if pieces[first + program][ROWS.value] else -1
            while at >= 0:
                actual.append((size, program, *pieces[at][: NEXT.value]))
                at = pieces[at][NEXT.value]

    if spec.small_programs:  # each line is divided into equal ranges
        lengths = (starts[large], starts[-1] - starts[large])
        for size in (0, 1):
            share = -(-spec.kv_heads * lengths[size] // spec.programs_of(size))
            assert schedule.range_length[size] == max(1, share)

    expected, place = [], 0
    for size, head, tile in walk(spec, large, len(tiles)):
        if spec.small_programs and (size, head, tile) == (1, 0, large):
            place = 0  # the second line begins
        record, share = tiles[tile], int(schedule.range_length[size])
        length = starts[tile + 1] - starts[tile]
        of_program: dict[int, list[int]] = {}
        for grain in range(-spec.overhead, length - spec.overhead):
            of_program.setdefault(place // share, []).append(grain)
            place += 1
        for program, own in of_program.items():
            grains = [grain for grain in own if grain >= 0]
            chunks = [[grain] for grain in grains] if spec.invariant else [grains] * bool(grains)
            for chunk in chunks:
                partial = head * schedule.counts[size] + tile - size * large + program
                if spec.invariant:
                    partial = place - length + chunk[0] - size * spec.kv_heads * starts[large]
                piece = [
                    *record,
                    head,
                    schedule.partials[0] * 64 * size + partial * spec.sizes[size],
                ]
                piece[LOW.value] = (record[GRAIN_START.value] + chunk[0]) * spec.grain
                high = (record[GRAIN_START.value] + chunk[-1] + 1) * spec.grain
                piece[HIGH.value] = min(high, record[END.value])
                ends = chunk[-1] == length - spec.overhead - 1
                whole = ends and chunk[0] == 0
                piece[FLAGS.value] &= ALONE.value * whole + WRITES.value * ends
                expected.append((size, program, *piece))
    assert actual == sorted(expected, key=lambda piece: piece[:2])
    assert len({piece[2 + VECTOR.value] for piece in actual}) == len(actual), "a partial for each"


def test_tiles_cover_their_rows(triton_device):
    """Guards row tiles with 3 heads per KV head: a tile of 16 takes 5 rows, one of 64 takes 21."""
    forest = [fork(20, [3] * 50), Node(30, new=7), Node(9, new=5)]
    plan = prefix_plan(0, triton_device, forest=forest, page_size=PAGE)
    schedule = Schedule(plan, replace(SPEC, group=3))
    rows_of_node: dict[int, list[int]] = {}
    for record, node in zip(schedule.tiles.tolist(), schedule.node_of_tile.tolist(), strict=True):
        row, rows = record[ROW.value], record[ROWS.value]
        of_node = plan.nodes[node].row_end - plan.nodes[node].row_start
        assert 3 * rows <= (16 if 3 * of_node <= 16 else 64)
        rows_of_node.setdefault(node, []).extend(range(row, row + rows))
    for index, node in enumerate(plan.nodes):
        assert rows_of_node[index] == list(range(node.row_start, node.row_end))
    assert schedule.counts == [3 + 1, 50 + 1]


def test_each_spec_has_its_own_schedule():
    """Guards the plan's cache of schedules: specs that differ in any field are different keys."""
    changes = {f.name: 1 for f in fields(ScheduleSpec)} | {"sizes": (64, 0), "invariant": True}
    specs = [replace(SPEC, **{name: value}) for name, value in changes.items()]
    assert len({SPEC, replace(SPEC), *specs}) == 1 + len(specs)


def of(rows: list[int], group: int = 4, dim: int = 128, **options) -> InputClass:
    """The input class of a plan whose nodes have these numbers of rows, side by side."""
    ends = list(accumulate(rows))
    nodes = [PlanNode([], 0, end - n, end) for n, end in zip(rows, ends, strict=True)]
    plan = PrefixPlan.build(nodes, num_rows=sum(rows), num_pages=1, page_size=PAGE)
    return InputClass.of(
        plan, group, dim, **({"fp8": False, "invariant": False, "fused": False} | options)
    )


@pytest.mark.parametrize(
    ("rows", "group", "dim", "sizes"),
    [
        ([4, 1], 4, 128, (0, 16)),  # the small size suffices
        ([5, 1], 4, 128, (64, 16)),
        ([5, 5], 4, 128, (64, 0)),
        ([5, 0], 4, 128, (64, 0)),  # nodes without rows have no tiles
        ([16, 5], 4, 128, (64, 0)),
        ([17, 1], 4, 128, (128, 16)),
        ([17, 1], 4, 256, (64, 0)),  # head_dim 256: neither tiles of 128 nor two sizes
        ([4, 1], 4, 256, (0, 16)),
        ([1], 17, 128, (64, 0)),  # 17 heads: one row is beyond 16 vectors
        ([1], 65, 128, (128, 0)),
        ([], 65, 128, (128, 0)),  # no rows at all
    ],
)
def test_row_tiles(rows, group, dim, sizes):
    """Guards the sizes of row tiles: exactly those that the plan needs."""
    kind = of(rows, group, dim)
    assert (kind.large, kind.small) == sizes
    assert InputClass.from_key(kind.key) == kind


def test_invariant_row_tiles():
    """Guards the batch-invariant mode: its row tiles do not depend on the batch."""
    kinds = {of(rows, invariant=True) for rows in ([1], [4, 1], [16], [17, 1], [200], [])}
    assert len(kinds) == 1
    assert all(InputClass.from_key(kind.key) == kind for kind in kinds)


@pytest.mark.parametrize("option", ["fp8", "invariant", "fused"])
def test_options_have_their_own_configs(option):
    """Guards tuned tables: each option changes the registers needed, so it needs a separate key."""
    assert of([4, 1], **{option: True}).key != of([4, 1]).key


def test_partials_of_an_advancing_plan(triton_device):
    """Guards the batch-invariant workspace: a partial for each chunk that the pages can hold."""
    plan = PrefixPlan.build(
        [PlanNode([0, 1, 2], 5, 0, 1, 1)], num_rows=1, num_pages=3, page_size=PAGE
    )
    spec = replace(SPEC, sizes=(64, 0), grain=PAGE, overhead=0, invariant=True)
    assert Schedule(plan, spec).partials == [spec.kv_heads * 3, 0]


def test_positions_on_the_host():
    """Guards positions: they count whole ancestors, with their new tokens, and no siblings."""
    nodes = [
        PlanNode([0], 9, 0, 5, 2),
        PlanNode([1], 4, 2, 4, 0),
        PlanNode([2], 3, 2, 3, 1),
        PlanNode([3], 6, 3, 4, 1),
        PlanNode([4], 2, 4, 5, 1),
    ]
    plan = PrefixPlan.build(nodes, num_rows=5, num_pages=5, page_size=PAGE)
    assert plan.depths == [0, 1, 2, 2, 1]
    assert plan.node_starts == [0, 9, 13, 13, 9]
    assert plan.row_position.tolist() == [7, 8, 15, 18, 10]
    assert torch.equal(plan.kv_len - plan.causal_offset, torch.tensor([2, 0, 1, 1, 1]))
