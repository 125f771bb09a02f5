"""Bytes, balance and floors of prefix attention, computed without a GPU: `python -m bench cost`.

A NumPy model of what kernels/prefix_attention/schedule.py does on the device: row tiles on a work
line, an equal work range for every program, a partial for every pair of a tile and a program. No KV
is allocated and nothing is launched. Program p is assumed to run on SM p mod SMs.

Floors relate the bytes that must cross the bus (every token once, q, the result) to the copy
bandwidth and the useful operations to the matrix rate. Both rates are the data sheet's unless a
measured bandwidth is given; no kernel reaches a data sheet's bandwidth.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from bench.inputs.forests import Forest, grid, long_contexts, main_forests
from bench.inputs.plans import VisibleRange, prefix_plan, tokens, visible_ranges
from bench.measure.peaks import PEAKS, Peak
from bench.measure.roofline import Roofline
from kernels.kv_pages import KVPages
from kernels.prefix_attention.launch import plan_launch
from kernels.prefix_attention.schedule import ScheduleSpec, partial_counts
from kernels.prefix_plan import PrefixPlan
from kernels.runtime.configs import A100, H200, Gpu, assume_gpu
from model.config import PRESETS
from model.errors import InputError

GPUS: dict[str, tuple[Gpu, Peak]] = {
    "h200": (H200, PEAKS["NVIDIA H200"]),
    "a100": (A100, PEAKS["NVIDIA A100-SXM4-80GB"]),
}
# Assumptions of `rotary`: instructions to normalise and rotate a pair, counted in the source, and
# the time of a small launch in a CUDA graph.
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
    fp8: bool = False  # pages of one byte per element, and two fp32 scales per token and head
    window: int = 0
    invariant: bool = False
    fused: bool = False  # rotary_attention in one launch instead of two

    @property
    def token_bytes(self) -> int:
        """Bytes of K and V of one token and one KV head."""
        if self.fp8:
            return 2 * (self.head_dim + FP32)
        return 2 * self.head_dim * self.dtype.itemsize

    @property
    def mode(self) -> str:
        return "batch-invariant" if self.invariant else "fp8" if self.fp8 else "fast"


@dataclass(frozen=True)
class WorkLine:
    """A modelled schedule. An item is the work of one program on one tile and KV head (a piece)."""

    counts: tuple[int, int]  # tiles of the larger size, which come first, and of the smaller
    starts: np.ndarray  # [tiles + 1] prefix sums of the tiles' places
    range_length: int  # places in one program's work range
    first_tile: np.ndarray  # [2, programs] index within its size; -1 if the program has none
    work: np.ndarray  # [programs] places
    tile: np.ndarray  # [items], like all below
    program: np.ndarray
    partial: np.ndarray  # index among the partials of the tile's size
    tokens: np.ndarray
    vectors: np.ndarray  # query vectors left for the merge; 0 if the item finishes them


def spec_of(plan: PrefixPlan, shape: Shape, gpu: Gpu) -> ScheduleSpec:
    """The schedule spec that the launcher would use for `plan` on `gpu`."""
    q = torch.empty(0, shape.heads, shape.head_dim, dtype=shape.dtype, device="meta")
    k = torch.empty(0, shape.kv_heads, plan.page_size, shape.head_dim, device="meta")
    k = k.to(torch.float8_e4m3fn if shape.fp8 else shape.dtype)
    with assume_gpu(gpu):
        spec, _ = plan_launch(
            plan,
            q,
            shape.heads,
            KVPages(k, k),
            window=shape.window,
            batch_invariant=shape.invariant,
            fused=shape.fused,
        )
    return replace(spec, small_programs=0)  # the model has one line for both sizes


def model_work_line(plan: PrefixPlan, spec: ScheduleSpec) -> WorkLine:
    """The work line of `plan`, computed on the host."""
    tiles, counts = _tiles(plan, spec)
    visible = [(begin.min(), end.max()) for begin, end in _visible_by_tile(plan, spec, tiles)]
    first, end = np.array(visible, dtype=np.int64).reshape(-1, 2).T
    first = first // spec.grain
    grains = np.maximum(-(-end // spec.grain) - first, 0)
    places = np.where(grains > 0, grains + spec.overhead, 0)
    starts = np.concatenate([[0], np.cumsum(places)])
    range_length = max(-(-spec.kv_heads * int(starts[-1]) // spec.programs), 1)

    offsets = _tile_offsets(spec, counts, starts)  # [kv_heads, tiles]
    index, program, low, high = _items(
        spec, np.tile(places, spec.kv_heads), offsets.ravel(), range_length
    )
    head, tile = np.divmod(index, max(len(tiles), 1))
    small = tile >= counts[0]
    if spec.invariant:  # one partial per place of the size
        partial = offsets.ravel()[index] + low - small * spec.kv_heads * starts[counts[0]]
    else:
        partial = head * np.array(counts)[small * 1] + tile - small * counts[0] + program
    tokens = np.minimum((first[tile] + high) * spec.grain, end[tile])
    finished = _in_one_node(plan, tiles)[tile] & (high - low == grains[tile])
    return WorkLine(
        counts=counts,
        starts=starts,
        range_length=range_length,
        first_tile=_first_tiles(spec, counts, starts, range_length),
        work=np.clip(
            spec.kv_heads * starts[-1] - range_length * np.arange(spec.programs), 0, range_length
        ),
        tile=tile,
        program=program,
        partial=partial,
        tokens=tokens - (first[tile] + low) * spec.grain,
        vectors=np.where(finished, 0, tiles[tile, 2] * spec.group),
    )


def cost(name: str, forest: Forest, shape: Shape, gpu: Gpu, best: Roofline) -> dict:
    """The row of one tree: bytes, operations, items, balance, floors.

    `partial_bytes` are written and read back; `workspace_bytes` are allocated for all partials that
    the schedule may write.
    """
    plan = prefix_plan(0, "cpu", forest=forest, page_size=shape.page_size)
    spec = spec_of(plan, shape, gpu)
    line = model_work_line(plan, spec)
    shared, unshared, pairs = tokens(plan, shape.window)
    token_bytes = shape.kv_heads * shape.token_bytes
    io_bytes = 2 * plan.num_rows * shape.heads * shape.head_dim * shape.dtype.itemsize
    vector_bytes = (shape.head_dim + 1) * FP32  # of a partial: out and log-sum-exp
    partial_bytes = 2 * int(line.vectors.sum()) * vector_bytes
    partials = partial_counts(plan, spec, list(line.counts))
    vectors = sum(count * size for count, size in zip(partials, spec.sizes, strict=True))
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
        "workspace_bytes": vectors * vector_bytes,
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
    """A decode step's tree as a row: the time that each form of rotary_attention adds to attention.

    Separate ops move Q two more times and need one more launch; the fused form rotates a tile's
    queries once for every program that works on it.
    """
    plan, shape = prefix_plan(0, "cpu", forest=forest), Shape(fused=True)
    spec = spec_of(plan, shape, gpu)
    line = model_work_line(plan, spec)
    # Items that leave no vectors for the merge finish one row: `group` vectors.
    fused_vectors = line.vectors.sum() + (line.vectors == 0).sum() * spec.group
    vectors = {"separate": plan.num_rows * shape.heads, "fused": int(fused_vectors)}
    vector_bytes = shape.head_dim * shape.dtype.itemsize
    # Separate: Q is read, written, and read again once per item. Fused: read once per item.
    moved = {"separate": (2 * vectors["separate"] + int(fused_vectors)) * vector_bytes}
    moved["fused"] = int(fused_vectors) * vector_bytes
    result: dict = {"op": "rotary_attention", "case": name, "gpu": gpu.name, "table": "rotary"}
    for form in ("separate", "fused"):
        instructions = vectors[form] * shape.head_dim // 2 * PAIR_INSTRUCTIONS
        seconds = moved[form] / (best.copy_gb_s * 1e9) + instructions / (fp32_tflop_s / 2 * 1e12)
        result[f"{form}_vectors"], result[f"{form}_bytes"] = vectors[form], moved[form]
        result[f"{form}_us"] = 1e6 * seconds + (LAUNCH_US if form == "separate" else 0)
    assumed = f"{PAIR_INSTRUCTIONS} instructions per pair, {LAUNCH_US} us per launch"
    result["assumed"] = assumed
    return result | {"copy_gb_s": best.copy_gb_s, "gemm_tflop_s": best.gemm_tflop_s}


def table(gpu_name: str, copy_gb_s: float | None = None, name: str = "") -> Iterator[dict]:
    """Rows of all trees with `name` in their names: all in the fastest mode, then the main trees
    and long contexts in every mode. Raises InputError if there is no such tree."""
    gpu, peak = GPUS[gpu_name]
    best = Roofline(gpu.name, "bfloat16", copy_gb_s or peak.memory_gb_s, peak.tflop_s)
    source = {"copy_source": "given" if copy_gb_s else "datasheet", "failure": None}
    main_trees = [tree for tree in (*main_forests(), *long_contexts()) if name in tree[0]]
    trees = [*main_trees, *(tree for tree in grid() if name in tree[0])]
    if not trees:
        raise InputError(f"no tree has {name!r} in its name; choose one like 'B16 P2048 S128'")
    for tree in trees:
        yield cost(*tree, Shape(), gpu, best) | source | {"table": "fastest"}
    for tree in main_trees:
        for shape in (Shape(), Shape(invariant=True), Shape(fp8=True)):
            yield cost(*tree, shape, gpu, best) | source | {"table": "modes"}
    for tree in main_trees:
        if all(
            not node.new or node.new == node.rows == 1 for root in tree[1] for node in root.walk()
        ):
            yield rotary(*tree, gpu, best, peak.fp32_tflop_s) | source


def _balance(work: np.ndarray, gpu: Gpu) -> float:
    """The largest SM's work over the mean."""
    of_sm = work.reshape(-1, gpu.sms).sum(0)
    return float(of_sm.max() / of_sm.mean()) if of_sm.any() else 1.0


def _tiles(plan: PrefixPlan, spec: ScheduleSpec) -> tuple[np.ndarray, tuple[int, int]]:
    """Tiles (node, first row, rows) of the larger size, then of the smaller; the count of each."""
    tiles: tuple[list, list] = ([], [])
    for index, node in enumerate(plan.nodes):
        rows = node.row_end - node.row_start
        size = spec.size_of(rows)
        for first in range(0, rows, max(spec.sizes[size] // spec.group, 1)):
            tile_rows = min(spec.sizes[size] // spec.group, rows - first)
            tiles[size].append((index, node.row_start + first, tile_rows))
    counts = (len(tiles[0]), len(tiles[1]))
    return np.array(tiles[0] + tiles[1], dtype=np.int64).reshape(-1, 3), counts


def _visible_by_tile(
    plan: PrefixPlan, spec: ScheduleSpec, tiles: np.ndarray
) -> Iterator[VisibleRange]:
    of_nodes = visible_ranges(plan, spec.window)
    for index, row, rows in tiles:
        first = row - plan.nodes[index].row_start
        begin, end = of_nodes[index]
        yield begin[first : first + rows], end[first : first + rows]


def _tile_offsets(spec: ScheduleSpec, counts: tuple[int, int], starts: np.ndarray) -> np.ndarray:
    """Where each tile starts on the line, for every KV head: [kv_heads, tiles]."""
    middle, total = starts[counts[0]], starts[-1]
    head = np.arange(spec.kv_heads)[:, None]
    large = head * middle + starts[: counts[0]]
    small = spec.kv_heads * middle + head * (total - middle) + starts[counts[0] : -1] - middle
    return np.concatenate([large, small], axis=1)


def _items(
    spec: ScheduleSpec, places: np.ndarray, offsets: np.ndarray, range_length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """For each item: its tile, its program, and the grains [low, high) of the tile."""
    if spec.invariant:
        index = np.repeat(np.arange(len(places)), places)
        low = np.arange(len(index)) - np.repeat(np.cumsum(places) - places, places)
        return index, (offsets[index] + low) // range_length, low, low + 1
    first, last = (offsets + spec.overhead) // range_length, (offsets + places - 1) // range_length
    items_per_tile = np.where(places > 0, last - first + 1, 0)
    index = np.repeat(np.arange(len(places)), items_per_tile)
    program = (
        first[index]
        + np.arange(len(index))
        - np.repeat(np.cumsum(items_per_tile) - items_per_tile, items_per_tile)
    )
    done = program * range_length - offsets[index]  # places of the tile before this program's range
    low = np.maximum(done - spec.overhead, 0)
    return index, program, low, np.minimum(done + range_length, places[index]) - spec.overhead


def _first_tiles(
    spec: ScheduleSpec, counts: tuple[int, int], starts: np.ndarray, range_length: int
) -> np.ndarray:
    """The first tile of each size in each program's range."""
    middle, total = int(starts[counts[0]]), int(starts[-1])
    begin = np.arange(spec.programs) * range_length
    first_tiles = []
    for low, high, count in ((0, middle, 0), (middle, total, counts[0])):
        place = np.maximum(begin, spec.kv_heads * low) - spec.kv_heads * low
        has_any = (place < spec.kv_heads * (high - low)) & (
            begin + range_length > spec.kv_heads * low
        )
        place = low + place % max(high - low, 1)
        tile = np.searchsorted(starts[1:], place, side="right") - count
        first_tiles.append(np.where(has_any, tile, -1))
    return np.stack(first_tiles)


def _in_one_node(plan: PrefixPlan, tiles: np.ndarray) -> np.ndarray:
    """Which tiles have rows that belong to no other node."""
    nodes = np.zeros(plan.num_rows, dtype=int)
    for node in plan.nodes:
        nodes[node.row_start : node.row_end] += 1
    return np.array([nodes[row : row + rows].max() == 1 for _, row, rows in tiles], dtype=bool)
