"""Each program's pieces of prefix attention, written down once a step for all layers.

A program that walks its stretch of the line itself (schedule.py) asks for its stretch, its
tile, where that begins and ends, the tile's record, then for a page and, at last, for keys: each
load waits for the one before, on the way to every tile and in every layer. A piece's record has all
of that; its place follows from the program's number, or from the piece before.
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
    pieces,  # int32 [pieces, PIECE]: first pieces (larger size first), then one per partial
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
    """A thread for each program that attends; axis 1 is the size of tiles."""
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
    first = tl.where(size == 1, large_programs, 0) + program
    others = large_programs + small_programs + tl.where(size == 1, large_partials, 0)

    before = 0 if SPLIT else KV_HEADS * begin  # places on the same line
    place = tl.maximum(program * share - before, 0)
    stop = tl.minimum((program + 1) * share - before, KV_HEADS * length)
    stop = tl.where(exists, stop, 0)
    most = tl.maximum(large_programs, small_programs)
    tile = tl.load(first_tile + size * most + program, mask=exists, other=0)
    last = tl.zeros_like(program) - 1  # the piece written last
    if len(faults):
        line = (starts + low, tiles + low * RECORD, size, count, begin, length)
        reporter = size * most + program
        stop = checked_stop(faults[0], reporter, line, place, stop, tile, grain, overhead)
    while tl.max((place < stop).to(tl.int32), 0) > 0:
        live = place < stop
        head = place // length
        start = tl.load(starts + low + tile, mask=live, other=0)
        places = tl.load(starts + low + tile + 1, mask=live, other=0) - start
        done = tl.maximum(place - head * length - (start - begin), 0)
        goal = tl.minimum(places, done + stop - place)
        if INVARIANT:
            goal = tl.minimum(goal, done + 1)
            partial = place
        else:
            partial = head * count + tile + program
        attends = live & (goal > tl.maximum(done, overhead))
        at = tl.where(last < 0, first, others + partial)
        _write(
            pieces + at.to(tl.int64) * PIECE,
            tiles + (low + tile).to(tl.int64) * RECORD,
            attends,
            head,
            first_vector + partial * vectors,
            tl.maximum(done - overhead, 0),
            goal - overhead,
            places - overhead,
            grain,
        )
        tl.store(pieces + last.to(tl.int64) * PIECE + NEXT, at, mask=attends & (last >= 0))
        last = tl.where(attends, at, last)
        place = tl.where(live, place + goal - done, place)
        tile = tl.where(live & (goal == places), tile + 1, tile)
        # A padded plan has empty tiles behind the head's last: they are not walked.
        tile = tl.where(live & (place == (head + 1) * length), 0, tile)
        if len(faults):
            stop = checked_stop(faults[0], reporter, line, place, stop, tile, grain, overhead)
    tl.store(pieces + last.to(tl.int64) * PIECE + NEXT, -1, mask=exists & (last >= 0))
    nothing = pieces + first.to(tl.int64) * PIECE
    tl.store(nothing + ROWS, 0, mask=exists & (last < 0))
    tl.store(nothing + NEXT, -1, mask=exists & (last < 0))


@triton.jit
def _write(piece, record, live, head, vector, first_grain, last_grain, grains, grain):
    """The records of pieces, but for NEXT: grains first_grain..last_grain of tiles of `grains`."""
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
