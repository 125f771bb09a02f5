"""How the work of prefix attention is cut up so that every SM gets the same share of it.

A node's rows times the query heads of one KV head are cut into row tiles of at most M query
vectors, M of two sizes: nodes of few rows do not pay for the larger one. A tile that has to attend
to n grains (of `grain` tokens) of its node takes overhead + n places on a line, which holds the
tiles of the larger M for every KV head, then those of the smaller one. Each of P persistent
programs takes an equal stretch of the line (stream-K), wherever that begins and ends: the work is
balanced to within one grain by construction, for one long prefix, for ragged suffixes and for a
thousand small nodes alike, and a tile is split only where a stretch ends.

The program that works on a tile leaves its partial result in the slot

    slot = head * tiles + tile + program

of the tile's size, which no other pair of tile and program has: along the line at least one of the
two grows from each partial to the next. A row's output merges the slots of its tiles, one for each
node on its path; which programs those are follows from the prefix sums of the places.

In the batch-invariant mode a grain is a chunk cut at multiples of `grain` tokens of the node, and
leaves a partial of its own, in the slot that is its place on the line: a row's numbers are then
those of its own path alone.

All that depends on lengths is computed on the device, by one small launch per step for all layers:
when lengths advance there, a captured CUDA graph needs nothing from the host.
"""

from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.prefix_plan import PrefixPlan

# Columns of a tile's record. A row r of the tile sees the first min(end, edge + r) tokens.
ROW = tl.constexpr(0)  # the tile's first row
ROWS = tl.constexpr(1)
PAGE_START = tl.constexpr(2)  # the node's first entry in the page table
NODE_START = tl.constexpr(3)  # tokens before the node in its sequences
FLAGS = tl.constexpr(4)  # the sum of those below
GRAIN_START = tl.constexpr(5)  # first grain in sight; from here on set by `schedule_kernel`
END = tl.constexpr(6)
EDGE = tl.constexpr(7)
RECORD = tl.constexpr(8)
# Flags.
ALONE = tl.constexpr(1)  # the tile's rows see no other node
WRITES = tl.constexpr(2)  # the tile's rows are tokens of the node, written in this step


@dataclass(frozen=True)
class Cut:
    """What a schedule depends on besides the plan."""

    kv_heads: int
    group: int  # query heads per KV head
    sizes: tuple[int, int]  # M of the larger and the smaller row tiles; 0 for a size not in use
    grain: int  # tokens
    overhead: int  # of a tile, in grains
    programs: int
    window: int = 0  # tokens that a row sees at most, itself included; 0 is all
    invariant: bool = False

    def size_of(self, rows: int) -> int:
        """Which of the two sizes a node of so many rows is cut by."""
        small = self.sizes[1]
        return int(bool(small) and (rows * self.group <= small or not self.sizes[0]))


class Schedule:
    """A plan's tiles and, as of the last `update`, every program's share of them."""

    def __init__(self, plan: PrefixPlan, cut: Cut) -> None:
        self.plan, self.cut = plan, cut
        tiles = [_tiles_of_size(plan, cut, size) for size in (0, 1)]
        self.counts = [len(of_size) for of_size in tiles]
        tiles = tiles[0] + tiles[1]
        records, row_tiles, capacities = _records(plan, cut, tiles)
        places = [sum(capacities[: self.counts[0]]), sum(capacities[self.counts[0] :])]
        # Slots of partial results, for each size.
        self.slots = [
            cut.kv_heads * (places[size] if cut.invariant else self.counts[size])
            + (0 if cut.invariant else cut.programs)
            for size in (0, 1)
        ]

        def tensor(values: np.ndarray | list) -> Tensor:
            return torch.as_tensor(values, dtype=torch.int32).to(plan.kv_len.device)

        self.tiles = tensor(records)  # [tiles, RECORD]
        self.node_of_tile = tensor([node for node, _, _ in tiles])
        self.row_tiles = tensor(row_tiles)  # [T, depth], -1 where a path is shorter
        self.starts = self.tiles.new_empty(len(tiles) + 1)  # prefix sums of places
        self.stretch = self.tiles.new_empty(1)  # places of one program
        self.first_tile = self.tiles.new_empty(2, cut.programs)
        self.update()

    @property
    def line(self) -> dict[str, Tensor | int]:
        """What both launches of prefix attention take of it."""
        return {
            "tiles": self.tiles,
            "starts": self.starts,
            "stretch": self.stretch,
            "large": self.counts[0],
            "small": self.counts[1],
            "large_slots": self.slots[0],
            "overhead": self.cut.overhead,
        }

    def update(self) -> None:
        """Lay the line anew from the plan's lengths on the device: one launch, no host work."""
        plan, cut = self.plan, self.cut
        schedule_kernel[(1,)](
            self.tiles,
            self.node_of_tile,
            self.starts,
            self.stretch,
            self.first_tile,
            plan.kv_len,
            plan.row_start,
            plan.causal_offset,
            plan.row_position if cut.window else plan.kv_len,
            self.counts[0],
            sum(self.counts),
            cut.programs,
            cut.grain,
            cut.overhead,
            KV_HEADS=cut.kv_heads,
            WINDOW=cut.window,
            BLOCK=256,
            num_warps=8,
        )


def schedule_of(plan: PrefixPlan, cut: Cut) -> Schedule:
    """The plan cut up, made when first asked for."""
    if cut not in plan.schedules:
        plan.schedules[cut] = Schedule(plan, cut)
    return plan.schedules[cut]


Tile = tuple[int, int, int]  # node, first row, rows


def _tiles_of_size(plan: PrefixPlan, cut: Cut, size: int) -> list[Tile]:
    tiles = []
    for index, node in enumerate(plan.nodes):
        rows = node.row_end - node.row_start
        if rows and cut.size_of(rows) == size:
            step = cut.sizes[size] // cut.group
            tiles += [
                (index, row, min(step, node.row_end - row))
                for row in range(node.row_start, node.row_end, step)
            ]
    return tiles


def _records(
    plan: PrefixPlan, cut: Cut, tiles: list[Tile]
) -> tuple[list[list[int]], np.ndarray, list[int]]:
    """Records, each row's tiles from the root down, and how many grains each tile can grow to."""
    depths = plan.depths
    row_tiles = np.full((plan.num_rows, max(depths, default=0) + 1), -1, dtype=np.int32)
    for tile, (node, row, rows) in enumerate(tiles):
        row_tiles[row : row + rows, depths[node]] = tile
    path_length = (row_tiles >= 0).sum(1)
    page_start = plan.page_start.tolist()
    starts = plan.node_start.tolist()
    records, capacities = [], []
    for node, row, rows in tiles:
        flags = ALONE.value * int(path_length[row : row + rows].max() == 1)
        flags += WRITES.value * (row < plan.nodes[node].row_start + plan.nodes[node].num_new)
        records.append([row, rows, page_start[node], starts[node], flags, 0, 0, 0])
        capacities.append(-(-len(plan.nodes[node].pages) * plan.page_size // cut.grain))
    return records, row_tiles, capacities


@triton.jit(do_not_specialize=["large", "count", "programs", "grain", "overhead"])
def schedule_kernel(
    tiles,  # int32 [tiles, RECORD]
    node_of_tile,
    starts,  # int32 [tiles + 1]
    stretch,
    first_tile,  # int32 [2, programs]
    kv_len,
    row_start,
    causal_offset,
    row_position,  # int32 [T], read if there is a window
    large,  # tiles of the larger size, which come first
    count,  # all tiles
    programs,
    grain,
    overhead,
    KV_HEADS: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: what each tile sees, prefix sums of the places, where each stretch begins."""
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
    tl.debug_barrier()  # what follows reads `starts` back

    middle = tl.load(starts + large)
    line = KV_HEADS * total
    share = tl.maximum((line + programs - 1) // programs, 1)
    tl.store(stretch, share)
    for at in range(0, programs, BLOCK):
        program = at + tl.arange(0, BLOCK)
        for size in tl.static_range(2):
            low = large if size else 0
            begin = middle if size else 0
            length = (total - middle) if size else middle  # of one KV head's part of the line
            place = tl.maximum(program * share - KV_HEADS * begin, 0)
            place = begin + tl.minimum(place, KV_HEADS * length) % tl.maximum(length, 1)
            # The tile that holds `place` is the first one to end behind it: bisection.
            tile = tl.zeros_like(program) + low
            last = tl.zeros_like(program) + (count if size else large)
            while tl.max(last - tile, 0) > 0:
                between = (tile + last) // 2
                behind = tl.load(starts + between + 1, mask=between < count, other=0) > place
                last = tl.where((tile < last) & behind, between, last)
                tile = tl.where((tile < last) & ~behind, between + 1, tile)
            tl.store(first_tile + size * programs + program, tile - low, mask=program < programs)
