"""Each CTA's pieces of prefix attention, written down once per step for all layers.

A CTA that walks the work line itself (schedule.py) loads its work range, its tile, where the tile
starts and ends, the tile's record, a page and, at last, keys. Each of these loads waits for the
one before it, for every tile and in every layer. A piece's record replaces all but the last two. A
CTA finds its first piece by its program id, and each following one in the record of the piece
before.
"""

import triton
import triton.language as tl

from kernels.prefix_attention.check import checked_stop
from kernels.prefix_attention.records import (
    ALONE,
    EDGE,
    END,
    FLAGS,
    GRAIN_START,
    HEAD,
    HIGH,
    LOW,
    NEXT,
    PIECE,
    RECORD,
    ROWS,
    VECTOR,
    WRITES,
)


@triton.jit(
    do_not_specialize=[
        "large_programs",
        "small_programs",
        "grain",
        "overhead",
        "large",
        "small",
        "large_partials",
    ]
)
def pieces_kernel(
    pieces,  # int32 [pieces, PIECE]: each CTA's first (larger size first), then one per partial
    tiles,
    starts,
    range_length,
    first_tile,
    large_programs,
    small_programs,
    grain,
    overhead,
    large,
    small,
    large_partials,
    KV_HEADS: tl.constexpr,
    SIZES: tl.constexpr,
    INVARIANT: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
    faults=(),
):
    """One thread for each CTA of the attention kernel; program axis 1 is the tile size."""
    size = tl.program_id(1)
    programs = tl.where(size == 1, small_programs, large_programs)
    program = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = program < programs
    share = tl.load(range_length + size)
    low = tl.where(size == 1, large, 0)
    count = tl.where(size == 1, small, large)
    begin = tl.load(starts + low)
    length = tl.load(starts + low + count) - begin
    vectors = tl.where(size == 1, SIZES[1], SIZES[0])
    first_vector = tl.where(size == 1, large_partials * SIZES[0], 0)
    first = tl.where(size == 1, large_programs, 0) + program  # the CTA's first piece
    # The later piece that writes partial i is piece others + i.
    others = large_programs + small_programs + tl.where(size == 1, large_partials, 0)

    before = 0 if SPLIT else KV_HEADS * begin  # length of the larger size on the same line
    place = tl.maximum(program * share - before, 0)
    stop = tl.minimum((program + 1) * share - before, KV_HEADS * length)
    stop = tl.where(exists, stop, 0)
    max_programs = tl.maximum(large_programs, small_programs)
    tile = tl.load(first_tile + size * max_programs + program, mask=exists, other=0)
    last = tl.zeros_like(program) - 1  # the piece written last
    if len(faults):
        line = (starts + low, tiles + low * RECORD, size, count, begin, length)
        reporter = size * max_programs + program
        stop = checked_stop(faults[0], reporter, line, place, stop, tile, grain, overhead)
    while tl.max((place < stop).to(tl.int32), 0) > 0:
        live = place < stop
        head = place // length
        start = tl.load(starts + low + tile, mask=live, other=0)
        places = tl.load(starts + low + tile + 1, mask=live, other=0) - start
        piece_start = tl.maximum(place - head * length - (start - begin), 0)
        piece_end = tl.minimum(places, piece_start + stop - place)
        if INVARIANT:
            piece_end = tl.minimum(piece_end, piece_start + 1)
            partial = place
        else:
            partial = head * count + tile + program
        attends = live & (piece_end > tl.maximum(piece_start, overhead))
        at = tl.where(last < 0, first, others + partial)
        _write(
            pieces + at.to(tl.int64) * PIECE,
            tiles + (low + tile).to(tl.int64) * RECORD,
            attends,
            head,
            first_vector + partial * vectors,
            tl.maximum(piece_start - overhead, 0),
            piece_end - overhead,
            places - overhead,
            grain,
        )
        tl.store(pieces + last.to(tl.int64) * PIECE + NEXT, at, mask=attends & (last >= 0))
        last = tl.where(attends, at, last)
        place = tl.where(live, place + piece_end - piece_start, place)
        tile = tl.where(live & (piece_end == places), tile + 1, tile)
        # Skip the empty tiles that a padded plan has after each size's last one.
        tile = tl.where(live & (place == (head + 1) * length), 0, tile)
        if len(faults):
            stop = checked_stop(faults[0], reporter, line, place, stop, tile, grain, overhead)
    tl.store(pieces + last.to(tl.int64) * PIECE + NEXT, -1, mask=exists & (last >= 0))
    empty = pieces + first.to(tl.int64) * PIECE
    tl.store(empty + ROWS, 0, mask=exists & (last < 0))
    tl.store(empty + NEXT, -1, mask=exists & (last < 0))


@triton.jit
def _write(piece, record, live, head, vector, first_grain, last_grain, grains, grain):
    """Write records, except NEXT, of pieces that are grains [first_grain, last_grain) of tiles.

    grains: the number of grains of each tile
    """
    for column in tl.static_range(FLAGS):  # ROW, ROWS, PAGE_START, NODE_START
        tl.store(piece + column, tl.load(record + column, mask=live), mask=live)
    flags = tl.load(record + FLAGS, mask=live, other=0)
    whole = last_grain - first_grain == grains
    flags = (flags & tl.where(whole, ALONE, 0)) | (
        flags & tl.where(last_grain == grains, WRITES, 0)
    )
    tl.store(piece + FLAGS, flags, mask=live)
    grain_start = tl.load(record + GRAIN_START, mask=live, other=0)
    end = tl.load(record + END, mask=live, other=0)
    tl.store(piece + LOW, (grain_start + first_grain) * grain, mask=live)
    tl.store(piece + HIGH, tl.minimum((grain_start + last_grain) * grain, end), mask=live)
    tl.store(piece + EDGE, tl.load(record + EDGE, mask=live), mask=live)
    tl.store(piece + HEAD, head, mask=live)
    tl.store(piece + VECTOR, vector, mask=live)
