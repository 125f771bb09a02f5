"""The schedule of prefix attention: every CTA gets an equal share of the work (stream-K).

Row tiles. The query vectors of a node (its rows times the query heads of one KV head) are divided
into row tiles of at most M vectors. M has two sizes, so that nodes with few rows do not pay for
large tiles.

Work line. All row tiles are laid end to end on a line: those of the larger size for every KV head,
then those of the smaller one. A tile that attends to n grains of its node (`grain` tokens each) is
overhead + n long. Each of P persistent CTAs takes one work range; all ranges are equally long. The
work is therefore balanced to within one grain by construction, for one long prefix, for ragged
suffixes and for a thousand small nodes alike, and a tile is split only where a range ends. If the
tiles of the smaller size have their own launch, each size has its own line and CTAs.

Partials. The CTA `program` writes its partial of row tile `tile` at index

    partial = head * tiles + tile + program

among the partials of the tile's size. The index is unique: from each partial to the next along the
line, the tile (head * tiles + tile) or the program grows, or both do. The output of a row merges
the partials of its tiles, one tile for each node on its path; the prefix sums of tile lengths give
the CTAs that wrote them.

Batch-invariant mode. A grain is a chunk cut at multiples of `grain` tokens of the node, and has its
own partial, whose index is its position on the line. A row then depends on its own path alone.

Everything that depends on lengths is computed on the device, by one small launch per step for all
layers, or two if the pieces are written down (pieces.py). When lengths advance on the device, a
captured CUDA graph thus needs nothing from the host. The schedule of a padded plan has room for all
that the plan's capacity allows: after the tiles of each size come empty ones of length 0. `refill`
of a plan refills its schedules.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.prefix_attention.check import faults_of, raise_fault
from kernels.prefix_attention.pieces import pieces_kernel
from kernels.prefix_attention.records import (
    ALONE,
    EDGE,
    END,
    FLAGS,
    GRAIN_START,
    NODE_START,
    PAGE_START,
    PIECE,
    RECORD,
    ROW,
    ROWS,
    WRITES,
)
from kernels.prefix_plan import PrefixPlan
from kernels.runtime.arithmetic import INT32_END, cdiv
from kernels.runtime.dispatch import check
from kernels.runtime.staging import Packed


@dataclass(frozen=True)
class ScheduleSpec:
    """The parameters of a schedule: with a plan, they determine it."""

    kv_heads: int
    group: int  # query heads per KV head
    sizes: tuple[int, int]  # M of the larger and the smaller row tiles; 0 for a size not in use
    grain: int  # tokens
    overhead: int  # cost of starting a tile, in grains
    programs: int  # CTAs of the launch
    window: int = 0  # the most tokens that a row sees, itself included; 0: no limit
    invariant: bool = False  # batch-invariant mode
    pieces: bool = False  # whether each CTA's pieces are written down
    small_programs: int = 0  # CTAs of the smaller tiles' own launch; 0: one launch for both sizes

    def programs_of(self, size: int) -> int:
        """The number of CTAs that share the tiles of a size (0: larger, 1: smaller)."""
        return self.small_programs if size and self.small_programs else self.programs

    def size_of(self, rows: int) -> int:
        """The tile size (0: larger, 1: smaller) for a node with this many rows."""
        small = self.sizes[1]
        return int(bool(small) and (rows * self.group <= small or not self.sizes[0]))


class Schedule:
    """A plan's row tiles and, as of the last `update`, every CTA's work range."""

    def __init__(self, plan: PrefixPlan, spec: ScheduleSpec) -> None:
        self.plan, self.spec = plan, spec
        self.counts = _tile_counts(plan, spec)  # tiles of each size
        self.partials = partial_counts(plan, spec, self.counts)  # partials of each size
        count, device = sum(self.counts), plan.kv_len.device
        vectors = sum(n * size for n, size in zip(self.partials, spec.sizes, strict=True))
        _check_int32("query vectors of partials", vectors)
        shapes = {"tiles": (count, RECORD.value), "node_of_tile": (count,)}
        shapes["row_tiles"] = (plan.num_rows, plan.levels)
        self._packed = Packed(shapes, device=device)
        self.tiles = self._packed.tensors["tiles"]
        self.node_of_tile = self._packed.tensors["node_of_tile"]
        self.row_tiles = self._packed.tensors["row_tiles"]  # -1 where a path is shorter
        empty = partial(torch.empty, dtype=torch.int32, device=device)
        self.starts = empty(count + 1)  # where each tile starts: prefix sums of tile lengths
        self.range_length = empty(2)  # length of a work range, for each size
        self.first_tile = empty(2, max(spec.programs, spec.small_programs))
        # First each CTA's first piece, then one entry per partial for all other pieces.
        firsts = spec.programs_of(0) + spec.programs_of(1)
        self.pieces = empty(firsts + sum(self.partials) if spec.pieces else 0, PIECE.value)
        self.refill()

    def refill(self) -> None:
        """Recompute everything from the plan's current nodes, in the same tensors."""
        self._packed.fill(_tile_tables(self.plan, self.spec, self.counts))
        self.update()

    @property
    def line(self) -> dict[str, Tensor | int]:
        """The arguments that both kernels of prefix attention take from the schedule."""
        return {
            "tiles": self.tiles,
            "starts": self.starts,
            "range_length": self.range_length,
            "large": self.counts[0],
            "small": self.counts[1],
            "large_partials": self.partials[0],
            "overhead": self.spec.overhead,
        }

    def update(self) -> None:
        """Recompute the work line from the plan's lengths, on the device."""
        plan, spec = self.plan, self.spec
        schedule_kernel[(1,)](
            self.tiles,
            self.node_of_tile,
            self.starts,
            self.range_length,
            self.first_tile,
            plan.kv_len,
            plan.row_start,
            plan.causal_offset,
            plan.row_position if spec.window else plan.kv_len,
            self.counts[0],
            sum(self.counts),
            spec.programs_of(0),
            spec.programs_of(1),
            spec.grain,
            spec.overhead,
            KV_HEADS=spec.kv_heads,
            WINDOW=spec.window,
            SPLIT=bool(spec.small_programs),
            BLOCK=256,
            num_warps=8,
        )
        if spec.pieces:
            self.write_pieces()

    def write_pieces(self) -> None:
        """Write each CTA's pieces down, from the work line."""
        spec = self.spec
        max_programs = self.first_tile.shape[1]
        faults = faults_of(2 * max_programs, self.pieces.device)
        pieces_kernel[(cdiv(max_programs, 32), 2)](
            self.pieces,
            first_tile=self.first_tile,
            large_programs=spec.programs_of(0),
            small_programs=spec.programs_of(1),
            grain=spec.grain,
            KV_HEADS=spec.kv_heads,
            SIZES=spec.sizes,
            INVARIANT=spec.invariant,
            SPLIT=bool(spec.small_programs),
            BLOCK=32,
            faults=faults,
            num_warps=1,
            **self.line,
        )
        raise_fault(faults)


def schedule_of(plan: PrefixPlan, spec: ScheduleSpec) -> Schedule:
    """The plan's schedule for `spec`, created at first use and kept with the plan."""
    if spec not in plan.schedules:
        plan.schedules[spec] = Schedule(plan, spec)
    return plan.schedules[spec]


Tile = tuple[int, int, int]  # node, first row, rows


def _tiles_of_size(plan: PrefixPlan, spec: ScheduleSpec, size: int) -> list[Tile]:
    tiles = []
    for index, node in enumerate(plan.nodes):
        rows = node.row_end - node.row_start
        if rows and spec.size_of(rows) == size:
            step = spec.sizes[size] // spec.group
            tiles += [
                (index, row, min(step, node.row_end - row))
                for row in range(node.row_start, node.row_end, step)
            ]
    return tiles


def _tile_counts(plan: PrefixPlan, spec: ScheduleSpec) -> list[int]:
    """Tiles of each size: the plan's own, or the most that a padded plan's capacity allows."""
    if plan.capacity is None:
        return [len(_tiles_of_size(plan, spec, size)) for size in (0, 1)]
    rows, levels = plan.capacity.rows, plan.capacity.levels
    large, small = (size // spec.group for size in spec.sizes)  # rows of a tile
    if not large:
        return [0, rows * levels]
    # The nodes of a level share its rows. A node with larger tiles has more than `small` rows, so
    # such nodes are few, and at most one tile of each is not full. Leaves have the smaller, if any.
    nodes = rows // (small + 1)
    return [(levels - bool(small)) * (nodes + rows // large), rows * levels if small else 0]


def partial_counts(plan: PrefixPlan, spec: ScheduleSpec, counts: list[int]) -> list[int]:
    """Partials of each size. Raises ValueError for a padded plan in the batch-invariant mode."""
    if not spec.invariant:
        return [spec.kv_heads * counts[size] + spec.programs_of(size) for size in (0, 1)]
    if plan.capacity:
        raise ValueError("the batch-invariant mode has no schedule for padded plans")
    # One partial per grain, for as many grains as the nodes' pages can hold.
    grains = [cdiv(len(node.pages) * plan.page_size, spec.grain) for node in plan.nodes]
    tiles = [_tiles_of_size(plan, spec, size) for size in (0, 1)]
    return [spec.kv_heads * sum(grains[node] for node, _, _ in of_size) for of_size in tiles]


def _check_int32(what: str, count: int) -> None:
    check(
        count < INT32_END,
        f"prefix_attention: the step has {count} {what}, and impl 'triton' takes fewer than 2^31;"
        " divide its rows among several steps",
    )


def _tile_tables(plan: PrefixPlan, spec: ScheduleSpec, counts: list[int]) -> dict[str, np.ndarray]:
    """The record and node of each tile, and the tiles of each row from the root down."""
    padded = []
    empty = (len(plan.kv_len) - 1, 0, 0)  # a padded plan's last node is empty
    for size, count in enumerate(counts):
        tiles = _tiles_of_size(plan, spec, size)
        padded += tiles + [empty] * (count - len(tiles))
    node, row, rows = np.array(padded, int).reshape(-1, 3).T
    # Parallel arrays with one entry for each row of each tile.
    tile = np.repeat(np.arange(len(node)), rows)
    entry_row = np.arange(len(tile)) + (row - np.cumsum(rows) + rows)[tile]
    pages = np.array([len(n.pages) for n in plan.nodes], int)
    of_nodes = np.zeros((5, len(plan.kv_len)), int)
    of_nodes[:, : len(plan.nodes)] = (
        plan.depths,
        plan.node_starts,
        np.cumsum(pages) - pages,
        [n.row_start + n.num_new for n in plan.nodes],
        (pages * plan.page_size + spec.grain - 1) // spec.grain + spec.overhead,
    )
    depth, node_start, page_start, end_of_new, places = of_nodes[:, node]
    # The line when all pages are full. The ranges of all CTAs together are up to one place per CTA
    # longer.
    line = spec.kv_heads * int(places.sum()) + spec.programs + spec.small_programs
    _check_int32("places on the work line", line)
    row_tiles = np.full((plan.num_rows, plan.levels), -1)
    row_tiles[entry_row, depth[tile]] = tile
    shared = (row_tiles >= 0).sum(1) > 1
    alone = np.bincount(tile, shared[entry_row], minlength=len(node)) == 0
    records = np.zeros((len(node), RECORD.value), int)
    records[:, ROW.value], records[:, ROWS.value] = row, rows
    records[:, PAGE_START.value], records[:, NODE_START.value] = page_start, node_start
    records[:, FLAGS.value] = ALONE.value * alone + WRITES.value * (row < end_of_new)
    return {"tiles": records, "node_of_tile": node, "row_tiles": row_tiles}


@triton.jit(
    do_not_specialize=["large", "count", "large_programs", "small_programs", "grain", "overhead"]
)
def schedule_kernel(
    tiles,  # int32 [tiles, RECORD]
    node_of_tile,
    starts,  # int32 [tiles + 1]
    range_length,  # int32 [2]
    first_tile,  # int32 [2, programs of the launch that has more]
    kv_len,
    row_start,
    causal_offset,
    row_position,  # int32 [T], read only with WINDOW
    large,  # number of tiles of the larger size, which come first
    count,  # number of all tiles
    large_programs,
    small_programs,
    grain,
    overhead,
    KV_HEADS: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLIT: tl.constexpr,  # each size has its own line and CTAs
    BLOCK: tl.constexpr,
):
    """What each tile sees, where it starts on the line, and each CTA's first tile. One CTA."""
    total = 0
    tl.store(starts, 0)
    for at in range(0, count, BLOCK):
        tile = at + tl.arange(0, BLOCK)
        live = tile < count
        record = tiles + tile * RECORD
        node = tl.load(node_of_tile + tile, mask=live, other=0)
        row = tl.load(record + ROW, mask=live, other=0)
        rows = tl.load(record + ROWS, mask=live, other=0)
        edge = tl.load(causal_offset + node) - tl.load(row_start + node) + 1
        end = tl.maximum(tl.minimum(tl.load(kv_len + node), edge + row + rows - 1), 0)
        first = tl.zeros_like(end)
        if WINDOW:
            oldest = tl.full([BLOCK], 2147483647, tl.int32)
            for i in range(0, tl.max(rows, 0)):
                inside = live & (i < rows)
                at_row = tl.load(row_position + row + i, mask=inside, other=2147483647)
                oldest = tl.minimum(oldest, at_row)
            node_start = tl.load(record + NODE_START, mask=live, other=0)
            first = tl.maximum(oldest - (WINDOW - 1) - node_start, 0) // grain
        tl.store(record + GRAIN_START, first, mask=live)
        tl.store(record + END, end, mask=live)
        tl.store(record + EDGE, edge, mask=live)
        grains = tl.maximum((end + grain - 1) // grain - first, 0)
        places = tl.where(live & (grains > 0), grains + overhead, 0)
        tl.store(starts + tile + 1, total + tl.cumsum(places, 0), mask=live)
        total += tl.sum(places, 0)
    tl.debug_barrier()  # the loop below reads `starts` back

    middle = tl.load(starts + large)
    max_programs = tl.maximum(large_programs, small_programs)
    for size in tl.static_range(2):
        programs = small_programs if size else large_programs
        low = large if size else 0
        begin = middle if size else 0
        length = (total - middle) if size else middle  # this size's part of the line, per KV head
        line = KV_HEADS * (length if SPLIT else total)
        share = tl.maximum((line + programs - 1) // programs, 1)
        tl.store(range_length + size, share)
        for at in range(0, programs, BLOCK):
            program = at + tl.arange(0, BLOCK)
            place = program * share
            if not SPLIT:
                place = tl.maximum(place - KV_HEADS * begin, 0)
            place = begin + tl.minimum(place, KV_HEADS * length) % tl.maximum(length, 1)
            # Bisection for the tile that contains `place`: the first that ends after it.
            tile = tl.zeros_like(program) + low
            last = tl.zeros_like(program) + (count if size else large)
            while tl.max(last - tile, 0) > 0:
                between = (tile + last) // 2
                after = tl.load(starts + between + 1, mask=between < count, other=0) > place
                last = tl.where((tile < last) & after, between, last)
                tile = tl.where((tile < last) & ~after, between + 1, tile)
            tl.store(
                first_tile + size * max_programs + program, tile - low, mask=program < programs
            )
