"""The attention kernel of prefix attention: a persistent loop over each CTA's work range.

Prefix attention in Triton is two launches. In the first, `prefix_attention_kernel`, each CTA walks
its work range (schedule.py) piece by piece (row_tile.py) and writes normalised partials with their
log-sum-exp. With PIECES it reads the pieces that the schedule has written down; without, it derives
them from the work line. In the second, `merge_kernel` merges the partials of each row in fp32, in a
fixed order. Rows that see one node only, and whose tile was one whole piece (such as those of a
first prefill), are finished by the first kernel. check.py can check the walk.
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


# Not specialised on counts, which change from step to step: one compiled kernel serves them all.
@triton.jit(
    do_not_specialize=["large_programs", "grain", "overhead", "large", "small", "large_partials"]
)
def prefix_attention_kernel(
    q,  # [T, Hq, D]
    kv,  # KVPages
    k_blocks,  # with TMA: descriptors of [BLOCK, D] in [num_pages * KV_HEADS * PAGE, D]
    v_blocks,
    out,  # [T, Hq, D]
    lse,  # fp32 [T, Hq]
    part_out,  # fp32 [vectors, D], partials of the larger tile size first
    part_lse,  # fp32 [vectors], in units of log2
    page_table,
    pieces,  # int32 [pieces, PIECE], with PIECES; without, tiles to first_tile are used instead
    large_programs,  # CTAs that share the larger tiles
    tiles,  # int32 [tiles, RECORD]
    starts,  # int32 [tiles + 1]
    range_length,
    first_tile,  # int32 [2, programs]
    row_position,  # int32 [T], with WINDOW
    rotary,  # None, or a Rotary: q is then the QKV projection
    qk_scale,
    grain,  # tokens
    overhead,  # cost of starting a tile, in grains
    large,  # number of tiles of the larger size, which come first
    small,  # number of tiles of the smaller size
    large_partials,  # number of partials of the larger size
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,  # tokens of a KV block, all in one page
    SIZES: tl.constexpr,  # M of the larger and the smaller tiles; 0: not in this launch
    WINDOW: tl.constexpr,
    INVARIANT: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
    TMA: tl.constexpr,
    PIECES: tl.constexpr,
    AHEAD: tl.constexpr,  # carry the next block's page in a register
    STEADY: tl.constexpr,  # loop without masks over the blocks that all rows see whole
    HALF: tl.constexpr,  # multiply e4m3 as fp16, even if q is bf16 or fp32
    PDL: tl.constexpr,
    faults=(),  # for check.py: empty, or int32 [programs, NUMBERS] and the number of pieces
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
    first,  # the first piece of CTA 0
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
    """Process this CTA's pieces of one tile size, as `pieces_kernel` wrote them down."""
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
    """Process this CTA's work range within one tile size, deriving its pieces from the line."""
    tiles, starts, range_length, first_tile = schedule
    grain, overhead, large, small, large_partials = counts
    program = tl.program_id(0)
    share = tl.load(range_length)
    low = large if size else 0  # this size's first tile
    count = small if size else large
    begin = tl.load(starts + large) if size else 0
    length = tl.load(starts + low + count) - begin  # this size's part of the line, per KV head
    # `place` and `stop` are positions within this size's part of the line, for all KV heads.
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
        # The piece is [piece_start, piece_end) of the tile's `places` positions on the line.
        piece_start = tl.maximum(place - head * length - (start - begin), 0)
        piece_end = tl.minimum(places, piece_start + stop - place)
        if INVARIANT:
            piece_end = tl.minimum(piece_end, piece_start + 1)
            partial = place
        else:
            partial = head * count + tile + program
        if piece_end > tl.maximum(piece_start, overhead):
            vectors = partial.to(tl.int64) * SIZES[size]
            if size:
                vectors += large_partials * SIZES[0]
            record = tiles + (low + tile) * RECORD
            grain_start = tl.load(record + GRAIN_START)
            first_grain = tl.maximum(piece_start - overhead, 0)
            # Flags need the tile's end; ALONE needs the whole tile.
            flags = tl.where(piece_end == places, tl.load(record + FLAGS), 0)
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
                tl.minimum((grain_start + piece_end - overhead) * grain, tl.load(record + END)),
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
        place += piece_end - piece_start
        tile = tl.where(piece_end == places, tile + 1, tile)
        # Skip the empty tiles that a padded plan has after each size's last one.
        tile = tl.where(place == (head + 1) * length, 0, tile)
        if len(faults):
            stop = checked_stop(faults[0], program, line, place, stop, tile, grain, overhead)
