"""Prefix attention in Triton: every KV page once for all rows that see it, in two launches.

`prefix_attention_kernel` is persistent: each program does its stretch of the line that
schedule.py lays, tile by tile (row_tile.py), and leaves normalised partial
results with their log-sum-exp. With PIECES the schedule has written down what that is, else the
program finds it out as it walks the line.
`merge_kernel` merges each row's partials in fp32, in a fixed order. Rows that see a single node,
which one program has done alone (those of a first prefill, say), are finished by the first kernel.
check.py can check the walk.
"""

import triton
import triton.language as tl

from kernels.prefix_attention.check import checked_piece, checked_stop
from kernels.prefix_attention.records import (
    EDGE,
    END,
    FLAGS,
    GRAIN_START,
    HEAD,
    HIGH,
    LOW,
    NEXT,
    NODE_START,
    PAGE_START,
    PIECE,
    RECORD,
    ROW,
    ROWS,
    VECTOR,
    WRITES,
)
from kernels.prefix_attention.row_tile import attend_tile
from kernels.runtime.pdl import release_next, wait_for_previous


# Counts change from step to step: one compiled kernel serves them all.
@triton.jit(
    do_not_specialize=["large_programs", "grain", "overhead", "large", "small", "large_partials"]
)
def prefix_attention_kernel(
    q,  # [T, Hq, D]
    kv,  # KVPages
    k_blocks,  # with TMA, descriptors: pages as [num_pages * KV_HEADS * PAGE, D], by blocks
    v_blocks,
    out,  # [T, Hq, D]
    lse,  # fp32 [T, Hq]
    part_out,  # fp32 [vectors, D], vectors of the larger size first
    part_lse,  # fp32 [vectors]
    page_table,
    pieces,  # int32 [pieces, PIECE], with PIECES; what follows tells the same without
    large_programs,
    tiles,  # int32 [tiles, RECORD]
    starts,  # int32 [tiles + 1]
    range_length,
    first_tile,  # int32 [2, programs]
    row_position,  # int32 [T], with WINDOW
    rotary,  # None, or a Rotary: q is then the QKV projection
    qk_scale,
    grain,  # tokens
    overhead,  # of a tile, in grains
    large,  # tiles of the larger size, which come first
    small,
    large_partials,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,  # tokens at a time, of one page
    SIZES: tl.constexpr,  # M of the larger and the smaller tiles, 0 for one not in use
    WINDOW: tl.constexpr,
    INVARIANT: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
    TMA: tl.constexpr,
    PIECES: tl.constexpr,
    AHEAD: tl.constexpr,  # carry the next block's page in a register
    STEADY: tl.constexpr,  # blocks that all rows see whole in a loop without masks
    HALF: tl.constexpr,  # e4m3 is multiplied as fp16, whatever q's dtype
    PDL: tl.constexpr,
    faults=(),  # of check.py: empty, or int32 [programs, NUMBERS] and the number of pieces
):
    wait_for_previous(PDL)
    release_next(PDL)
    inputs = (q, kv, (k_blocks, v_blocks), page_table, row_position, rotary)
    for size in tl.static_range(2):
        if SIZES[size] > 0:
            if PIECES:
                _walk_pieces(
                    inputs,
                    (out, lse, part_out, part_lse),
                    pieces,
                    large_programs if size else 0,
                    qk_scale,
                    KV_HEADS,
                    GROUP,
                    D,
                    PAGE,
                    BLOCK,
                    SIZES[size],
                    WINDOW,
                    NATIVE_FP8,
                    TMA,
                    AHEAD,
                    STEADY,
                    HALF,
                    faults,
                )
            else:
                _walk_line(
                    inputs,
                    (out, lse, part_out, part_lse),
                    (tiles, starts, range_length, first_tile),
                    (grain, overhead, large, small, large_partials),
                    size,
                    qk_scale,
                    KV_HEADS,
                    GROUP,
                    D,
                    PAGE,
                    BLOCK,
                    SIZES,
                    WINDOW,
                    INVARIANT,
                    NATIVE_FP8,
                    TMA,
                    AHEAD,
                    STEADY,
                    HALF,
                    faults,
                )


@triton.jit
def _walk_pieces(
    inputs,
    outputs,
    pieces,
    first,  # piece of program 0
    qk_scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    M: tl.constexpr,
    WINDOW: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
    TMA: tl.constexpr,
    AHEAD: tl.constexpr,
    STEADY: tl.constexpr,
    HALF: tl.constexpr,
    faults,
):
    """The program's pieces of one size, as `pieces_kernel` has written them down."""
    at = first + tl.program_id(0)
    if len(faults):
        at = checked_piece(faults, pieces, at, M // GROUP)
    while at >= 0:
        piece = pieces + at.to(tl.int64) * PIECE
        at = tl.load(piece + NEXT)
        rows = tl.load(piece + ROWS)
        if rows > 0:
            attend_tile(
                inputs,
                outputs,
                tl.load(piece + VECTOR),
                tl.load(piece + ROW),
                rows,
                tl.load(piece + PAGE_START),
                tl.load(piece + NODE_START) if WINDOW else 0,
                tl.load(piece + FLAGS),
                tl.load(piece + LOW),
                tl.load(piece + HIGH),
                tl.load(piece + EDGE),
                tl.load(piece + HEAD),
                qk_scale,
                KV_HEADS,
                GROUP,
                D,
                PAGE,
                BLOCK,
                M,
                WINDOW,
                NATIVE_FP8,
                TMA,
                AHEAD,
                STEADY,
                HALF,
            )
        if len(faults):
            at = checked_piece(faults, pieces, at, M // GROUP)


@triton.jit
def _walk_line(
    inputs,
    outputs,
    schedule,
    counts,
    size: tl.constexpr,
    qk_scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    SIZES: tl.constexpr,
    WINDOW: tl.constexpr,
    INVARIANT: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
    TMA: tl.constexpr,
    AHEAD: tl.constexpr,
    STEADY: tl.constexpr,
    HALF: tl.constexpr,
    faults,
):
    """The program's stretch of one size's tiles, tile by tile."""
    tiles, starts, range_length, first_tile = schedule
    grain, overhead, large, small, large_partials = counts
    program = tl.program_id(0)
    share = tl.load(range_length)
    low = large if size else 0
    count = small if size else large
    begin = tl.load(starts + large) if size else 0
    length = tl.load(starts + low + count) - begin
    place = tl.maximum(program * share - KV_HEADS * begin, 0)
    stop = tl.minimum((program + 1) * share - KV_HEADS * begin, KV_HEADS * length)
    tile = tl.load(first_tile + size * tl.num_programs(0) + program)
    if len(faults):
        line = (starts + low, tiles + low * RECORD, size, count, begin, length)
        stop = checked_stop(faults[0], program, line, place, stop, tile, grain, overhead)
    while place < stop:
        head = place // length
        start = tl.load(starts + low + tile)
        places = tl.load(starts + low + tile + 1) - start
        # Places of the tile that are behind us, and those that will be.
        done = tl.maximum(place - head * length - (start - begin), 0)
        goal = tl.minimum(places, done + stop - place)
        if INVARIANT:
            goal = tl.minimum(goal, done + 1)
            partial = place
        else:
            partial = head * count + tile + program
        if goal > tl.maximum(done, overhead):
            vectors = partial.to(tl.int64) * SIZES[size]
            if size:
                vectors += large_partials * SIZES[0]
            record = tiles + (low + tile) * RECORD
            grain_start = tl.load(record + GRAIN_START)
            first_grain = tl.maximum(done - overhead, 0)
            # What holds for the tile's end, and for all of it.
            flags = tl.where(goal == places, tl.load(record + FLAGS), 0)
            flags = tl.where(first_grain == 0, flags, flags & WRITES)
            attend_tile(
                inputs,
                outputs,
                vectors,
                tl.load(record + ROW),
                tl.load(record + ROWS),
                tl.load(record + PAGE_START),
                tl.load(record + NODE_START) if WINDOW else 0,
                flags,
                (grain_start + first_grain) * grain,
                tl.minimum((grain_start + goal - overhead) * grain, tl.load(record + END)),
                tl.load(record + EDGE),
                head,
                qk_scale,
                KV_HEADS,
                GROUP,
                D,
                PAGE,
                BLOCK,
                SIZES[size],
                WINDOW,
                NATIVE_FP8,
                TMA,
                AHEAD,
                STEADY,
                HALF,
            )
        place += goal - done
        tile = tl.where(goal == places, tile + 1, tile)
        # A padded plan has empty tiles behind the head's last: they are not walked.
        tile = tl.where(place == (head + 1) * length, 0, tile)
        if len(faults):
            stop = checked_stop(faults[0], program, line, place, stop, tile, grain, overhead)
