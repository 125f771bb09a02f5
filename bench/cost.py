"""What prefix attention moves and how evenly, by arithmetic on any machine: `python -m bench cost`.

The model repeats in NumPy what kernels/prefix_attention/schedule.py does on the device: tiles on a
line, an equal stretch of it for every program, a partial result for every pair of a tile and a
program. No KV is allocated and nothing is launched. Program p is taken to run on SM p mod SMs.

Floors hold the copy bandwidth and the matrix rate against the bytes that must cross the bus (every
token once, q, the result) and the useful operations; both are the datasheet's unless a measured
bandwidth is given, and no kernel reaches a datasheet's bandwidth.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from bench import show
from bench.forests import Forest, grid, telling
from bench.inputs import prefix_plan
from bench.roofline import Roofline
from kernels.kv_pages import KVPages
from kernels.prefix_attention.launch import plan_launch
from kernels.prefix_attention.schedule import ScheduleSpec
from kernels.prefix_plan import PrefixPlan
from kernels.runtime.arithmetic import cdiv
from kernels.runtime.configs import A100, H200, Gpu, assume_gpu
from model.config import PRESETS
from model.errors import InputError

# Copy GB/s, and TFLOP/s of dense bf16 products and of fp32, of the datasheets: H200 SXM; A100 SXM
# with 80 GB.
GPUS: dict[str, tuple[Gpu, float, float, float]] = {
    "h200": (H200, 4800.0, 989.0, 67.0),
    "a100": (A100, 2039.0, 312.0, 19.5),
}
# What `rotary` supposes: instructions to normalise and rotate a pair, counted in the source, and
# what a small launch costs in a CUDA graph.
PAIR_INSTRUCTIONS = 40
LAUNCH_US = 2.0
FP32 = 4


@dataclass(frozen=True)
class Shape:
    """What the work depends on besides the tree."""

    heads: int = PRESETS["step3-vl-10b"].decoder.heads
    kv_heads: int = PRESETS["step3-vl-10b"].decoder.kv_heads
    head_dim: int = PRESETS["step3-vl-10b"].decoder.head_dim
    page_size: int = 64
    dtype: torch.dtype = torch.bfloat16  # of q and the result
    fp8: bool = False  # pages of one byte an element, and two fp32 scales per token and head
    window: int = 0
    invariant: bool = False
    fused: bool = False  # of rotary_attention: one launch less

    @property
    def token_bytes(self) -> int:
        """K and V of one token and one KV head."""
        if self.fp8:
            return 2 * (self.head_dim + FP32)
        return 2 * self.head_dim * self.dtype.itemsize

    @property
    def mode(self) -> str:
        return "batch-invariant" if self.invariant else "fp8" if self.fp8 else "fast"


@dataclass(frozen=True)
class Line:
    """A schedule. An item is what one program does of one tile for one KV head."""

    counts: tuple[int, int]  # tiles of the larger size, which come first, and of the smaller
    starts: np.ndarray  # [tiles + 1] prefix sums of their places
    share: int  # places of one program
    first_tile: np.ndarray  # [2, programs] within its size; -1 for a program with none of a size
    work: np.ndarray  # [programs] places
    tile: np.ndarray  # [items], as all below
    program: np.ndarray
    partial: np.ndarray  # of the partial result, within the tile's size
    tokens: np.ndarray
    vectors: np.ndarray  # that it leaves for the merge; 0 if it finishes them itself


def spec_of(plan: PrefixPlan, shape: Shape, gpu: Gpu) -> ScheduleSpec:
    """How the launcher cuts `plan` up on `gpu`."""
    q = torch.empty(0, shape.heads, shape.head_dim, dtype=shape.dtype, device="meta")
    k = torch.empty(0, shape.kv_heads, plan.page_size, shape.head_dim, device="meta")
    k = k.to(torch.float8_e4m3fn if shape.fp8 else shape.dtype)
    options = {"window": shape.window, "batch_invariant": shape.invariant, "fused": shape.fused}
    with assume_gpu(gpu):
        spec, _ = plan_launch(plan, q, shape.heads, KVPages(k, k), **options)
    return replace(spec, small_programs=0)  # one line for both sizes is what is modelled


def lay(plan: PrefixPlan, spec: ScheduleSpec) -> Line:
    """The schedule of `plan`, by arithmetic alone."""
    tiles, counts = _tiles(plan, spec)
    sight = [(begin.min(), end.max()) for begin, end in _of_tiles(plan, spec, tiles)]
    first, end = np.array(sight, dtype=np.int64).reshape(-1, 2).T
    first = first // spec.grain
    grains = np.maximum(cdiv(end, spec.grain) - first, 0)
    places = np.where(grains > 0, grains + spec.overhead, 0)
    starts = np.concatenate([[0], np.cumsum(places)])
    share = max(-(-spec.kv_heads * int(starts[-1]) // spec.programs), 1)

    begins = _begins(spec, counts, starts)  # [kv_heads, tiles]
    index, program, low, high = _items(spec, np.tile(places, spec.kv_heads), begins.ravel(), share)
    head, tile = np.divmod(index, max(len(tiles), 1))
    small = tile >= counts[0]
    if spec.invariant:  # a partial for every place of the size
        partial = begins.ravel()[index] + low - small * spec.kv_heads * starts[counts[0]]
    else:
        partial = head * np.array(counts)[small * 1] + tile - small * counts[0] + program
    tokens = np.minimum((first[tile] + high) * spec.grain, end[tile])
    finished = _alone(plan, tiles)[tile] & (high - low == grains[tile])
    return Line(
        counts=counts,
        starts=starts,
        share=share,
        first_tile=_first_tiles(spec, counts, starts, share),
        work=np.clip(spec.kv_heads * starts[-1] - share * np.arange(spec.programs), 0, share),
        tile=tile,
        program=program,
        partial=partial,
        tokens=tokens - (first[tile] + low) * spec.grain,
        vectors=np.where(finished, 0, tiles[tile, 2] * spec.group),
    )


def cost(name: str, forest: Forest, shape: Shape, gpu: Gpu, best: Roofline) -> dict:
    """The row of one tree: bytes, operations, items, balance, floors."""
    plan = prefix_plan(0, "cpu", forest=forest, page_size=shape.page_size)
    spec = spec_of(plan, shape, gpu)
    line = lay(plan, spec)
    shared, unshared, pairs = tokens(plan, shape.window)
    token_bytes = shape.kv_heads * shape.token_bytes
    io_bytes = 2 * plan.num_rows * shape.heads * shape.head_dim * shape.dtype.itemsize
    partial_bytes = 2 * int(line.vectors.sum()) * (shape.head_dim + 1) * FP32
    flops = 4 * pairs * shape.heads * shape.head_dim

    def floor(tokens: int, more_bytes: int = 0) -> float:
        return best.floor_us(tokens * token_bytes + io_bytes + more_bytes, flops)

    return {
        "op": "prefix_attention",
        "case": name,
        "gpu": gpu.name,
        "mode": shape.mode,
        "kv_bytes": shared * token_bytes,
        "kv_unshared_bytes": unshared * token_bytes,
        "kv_loaded_bytes": int(line.tokens.sum()) * shape.token_bytes,
        "partial_bytes": partial_bytes,
        "io_bytes": io_bytes,
        "flops": flops,
        "items": len(line.tile),
        "programs": spec.programs,
        "balance_places": _balance(line.work, gpu),
        "balance_bytes": _balance(np.bincount(line.program, line.tokens, spec.programs), gpu),
        "floor_us": floor(shared),
        "floor_with_partials_us": floor(shared, partial_bytes),
        "floor_unshared_us": floor(unshared),
        "saves": floor(unshared) / floor(shared),
        "copy_gb_s": best.copy_gb_s,
        "gemm_tflop_s": best.gemm_tflop_s,
    }


def rotary(name: str, forest: Forest, gpu: Gpu, best: Roofline, fp32_tflop_s: float) -> dict:
    """The row of a decode step's tree: what each form of rotary_attention adds to attention.

    Two ops move Q twice more and take a launch more; the fused form rotates the queries of a tile
    once for every program that works on it.
    """
    plan, shape = prefix_plan(0, "cpu", forest=forest), Shape(fused=True)
    spec = spec_of(plan, shape, gpu)
    line = lay(plan, spec)
    row = line.vectors.sum() + (line.vectors == 0).sum() * spec.group  # finished by the item itself
    vectors = {"separate": plan.num_rows * shape.heads, "fused": int(row)}
    vector_bytes = shape.head_dim * shape.dtype.itemsize
    # Of Q: read, written, and read again once per item; or read once per item.
    moved = {"separate": (2 * vectors["separate"] + int(row)) * vector_bytes}
    moved["fused"] = int(row) * vector_bytes
    made: dict = {"op": "rotary_attention", "case": name, "gpu": gpu.name, "table": "rotary"}
    for form in ("separate", "fused"):
        instructions = vectors[form] * shape.head_dim // 2 * PAIR_INSTRUCTIONS
        seconds = moved[form] / (best.copy_gb_s * 1e9) + instructions / (fp32_tflop_s / 2 * 1e12)
        made[f"{form}_vectors"], made[f"{form}_bytes"] = vectors[form], moved[form]
        made[f"{form}_us"] = 1e6 * seconds + (LAUNCH_US if form == "separate" else 0)
    return made | {"copy_gb_s": best.copy_gb_s, "gemm_tflop_s": best.gemm_tflop_s}


def table(gpu_name: str, copy_gb_s: float | None = None, name: str = "") -> Iterator[dict]:
    """Rows of all trees with `name` in their names: the fastest mode, then, of the telling ones,
    the other modes beside it. Raises InputError if there is no such tree."""
    gpu, datasheet, tflop_s, fp32_tflop_s = GPUS[gpu_name]
    best = Roofline(gpu.name, "bfloat16", copy_gb_s or datasheet, tflop_s)
    source = {"copy_source": "given" if copy_gb_s else "datasheet", "failure": None}
    first = [tree for tree in telling() if name in tree[0]]
    trees = [*first, *(tree for tree in grid() if name in tree[0])]
    if not trees:
        raise InputError(f"no tree has {name!r} in its name; choose one like 'B16 P2048 S128'")
    for tree in trees:
        yield cost(*tree, Shape(), gpu, best) | source | {"table": "fastest"}
    for tree in first:
        for shape in (Shape(), Shape(invariant=True), Shape(fp8=True)):
            yield cost(*tree, shape, gpu, best) | source | {"table": "modes"}
    for tree in first:
        if all(
            not node.new or node.new == node.rows == 1 for root in tree[1] for node in root.walk()
        ):
            yield rotary(*tree, gpu, best, fp32_tflop_s) | source


def display(rows: Sequence[dict]) -> None:
    """The rows of `table` as two tables."""
    header = ("case", "mode", " KV MB", " unshared MB", " loaded MB", " partials MB", " q, out MB")
    header += (" GFLOP", " items", " programs", " balance", " in bytes", " floor us")
    header += (" unshared us", " saves")
    for which in ("fastest", "modes"):
        lines = [_cells(row) for row in rows if row["table"] == which]
        if lines:
            title = f"cost of prefix attention by arithmetic: {which} ({rows[0]['gpu']})"
            show.table(title, header, lines)
    lines = [_rotary_cells(row) for row in rows if row["table"] == "rotary"]
    if lines:
        header = ("case", " rotations, two ops", " fused", " Q MB, two ops", " fused")
        header += (" us, two ops", " fused")
        title = "what rotary adds to attention, by arithmetic: two ops, or fused"
        show.table(f"{title} ({rows[0]['gpu']})", header, lines)
        print(f"rotary: {PAIR_INSTRUCTIONS} instructions a pair, {LAUNCH_US} us a launch (assumed)")
    rate = f"{rows[0]['copy_gb_s']:,.0f} GB/s ({rows[0]['copy_source']})"
    print(f"floors: copy {rate}, matrix product {rows[0]['gemm_tflop_s']:,.0f} TFLOP/s (datasheet)")


def _rotary_cells(row: dict) -> list[str]:
    forms = ("separate", "fused")
    return [
        row["case"],
        *(f"{row[f'{form}_vectors']:,}" for form in forms),
        *(f"{row[f'{form}_bytes'] / 1e6:,.2f}" for form in forms),
        *(f"{row[f'{form}_us']:,.2f}" for form in forms),
    ]


def _cells(row: dict) -> list[str]:
    sizes = ("kv", "kv_unshared", "kv_loaded", "partial", "io")
    return [
        row["case"],
        row["mode"],
        *(f"{row[f'{name}_bytes'] / 1e6:,.2f}" for name in sizes),
        f"{row['flops'] / 1e9:,.2f}",
        str(row["items"]),
        str(row["programs"]),
        f"{row['balance_places']:.3f}",
        f"{row['balance_bytes']:.3f}",
        f"{row['floor_us']:,.1f}",
        f"{row['floor_unshared_us']:,.1f}",
        f"{row['saves']:.2f}",
    ]


def _balance(work: np.ndarray, gpu: Gpu) -> float:
    """Largest over mean work of the SMs."""
    of_sm = work.reshape(-1, gpu.sms).sum(0)
    return float(of_sm.max() / of_sm.mean()) if of_sm.any() else 1.0


def _tiles(plan: PrefixPlan, spec: ScheduleSpec) -> tuple[np.ndarray, tuple[int, int]]:
    """Tiles (node, first row, rows) of the larger size, then of the smaller; how many of each."""
    tiles: tuple[list, list] = ([], [])
    for index, node in enumerate(plan.nodes):
        rows = node.row_end - node.row_start
        size = spec.size_of(rows)
        for first in range(0, rows, max(spec.sizes[size] // spec.group, 1)):
            many = min(spec.sizes[size] // spec.group, rows - first)
            tiles[size].append((index, node.row_start + first, many))
    counts = (len(tiles[0]), len(tiles[1]))
    return np.array(tiles[0] + tiles[1], dtype=np.int64).reshape(-1, 3), counts


Sight = tuple[np.ndarray, np.ndarray]  # of some rows: the first token that each sees, the end


def _sights(plan: PrefixPlan, window: int) -> list[Sight]:
    """Which tokens [begin, end) of each node its rows see; none where begin is not below end."""
    ends, position, start, path = [], np.full(plan.num_rows, -1), [], []
    for node, depth in zip(plan.nodes, plan.depths, strict=True):
        row = np.arange(node.row_end - node.row_start)
        ends.append(np.minimum(node.kv_len - node.num_new + row + 1, node.kv_len))
        position[node.row_start : node.row_end] += ends[-1]
        del path[depth:]
        start.append(sum(path))
        path.append(node.kv_len)
    oldest = position - window + 1 if window else np.zeros_like(position)
    return [
        (np.maximum(oldest[node.row_start : node.row_end] - at * bool(window), 0), end)
        for node, at, end in zip(plan.nodes, start, ends, strict=True)
    ]


def _of_tiles(plan: PrefixPlan, spec: ScheduleSpec, tiles: np.ndarray) -> Iterator[Sight]:
    sights = _sights(plan, spec.window)
    for index, row, rows in tiles:
        first = row - plan.nodes[index].row_start
        begin, end = sights[index]
        yield begin[first : first + rows], end[first : first + rows]


def _begins(spec: ScheduleSpec, counts: tuple[int, int], starts: np.ndarray) -> np.ndarray:
    """Where each tile begins on the line, for every KV head [kv_heads, tiles]."""
    middle, total = starts[counts[0]], starts[-1]
    head = np.arange(spec.kv_heads)[:, None]
    large = head * middle + starts[: counts[0]]
    small = spec.kv_heads * middle + head * (total - middle) + starts[counts[0] : -1] - middle
    return np.concatenate([large, small], axis=1)


def _items(
    spec: ScheduleSpec, places: np.ndarray, begins: np.ndarray, share: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of every item: its tile, its program, the grains [low, high) of the tile."""
    if spec.invariant:
        index = np.repeat(np.arange(len(places)), places)
        low = np.arange(len(index)) - np.repeat(np.cumsum(places) - places, places)
        return index, (begins[index] + low) // share, low, low + 1
    first, last = (begins + spec.overhead) // share, (begins + places - 1) // share
    many = np.where(places > 0, last - first + 1, 0)
    index = np.repeat(np.arange(len(places)), many)
    program = first[index] + np.arange(len(index)) - np.repeat(np.cumsum(many) - many, many)
    done = program * share - begins[index]  # places of the tile that lie behind the program
    low = np.maximum(done - spec.overhead, 0)
    return index, program, low, np.minimum(done + share, places[index]) - spec.overhead


def _first_tiles(
    spec: ScheduleSpec, counts: tuple[int, int], starts: np.ndarray, share: int
) -> np.ndarray:
    """The tile of each size in which each program starts."""
    middle, total = int(starts[counts[0]]), int(starts[-1])
    begin = np.arange(spec.programs) * share
    found = []
    for low, high, count in ((0, middle, 0), (middle, total, counts[0])):
        place = np.maximum(begin, spec.kv_heads * low) - spec.kv_heads * low
        has_any = (place < spec.kv_heads * (high - low)) & (begin + share > spec.kv_heads * low)
        place = low + place % max(high - low, 1)
        tile = np.searchsorted(starts[1:], place, side="right") - count
        found.append(np.where(has_any, tile, -1))
    return np.stack(found)


def _alone(plan: PrefixPlan, tiles: np.ndarray) -> np.ndarray:
    """Which tiles have rows that no other node serves."""
    nodes = np.zeros(plan.num_rows, dtype=int)
    for node in plan.nodes:
        nodes[node.row_start : node.row_end] += 1
    return np.array([nodes[row : row + rows].max() == 1 for _, row, rows in tiles], dtype=bool)


def tokens(plan: PrefixPlan, window: int) -> tuple[int, int, int]:
    """Tokens in sight: each node once, each sequence by itself, and each row by itself."""
    edges = np.unique([edge for node in plan.nodes for edge in (node.row_start, node.row_end)])
    shared = unshared = pairs = 0
    for node, (begin, end) in zip(plan.nodes, _sights(plan, window), strict=True):
        seen = np.maximum(end - begin, 0)
        if not seen.any():
            continue
        runs = edges[(edges >= node.row_start) & (edges < node.row_end)] - node.row_start
        shared += int(end.max() - begin.min())
        by_run = np.maximum.reduceat(end, runs) - np.minimum.reduceat(begin, runs)
        unshared += int(np.maximum(by_run, 0).sum())
        pairs += int(seen.sum())
    return shared, unshared, pairs
