"""Prefix attention in Triton: every KV page once for all rows that see it, in two launches.

`prefix_attention_kernel` is persistent: each program walks its stretch of the line that
prefix_schedule.py lays, tile by tile, and leaves normalised partial results with their log-sum-exp.
`merge_kernel` merges each row's partials in fp32, in a fixed order. Rows that see a single node,
which one program has done alone (those of a first prefill, say), are finished by the first kernel.
prefix_check.py can check the walk.

Rounding points, for inputs of 16 bits: scores, softmax, sums and merges are fp32; probabilities are
rounded to q's dtype before their product with V, and the result once, at the end. Scores inside are
in units of log2 (`qk_scale` = scale * log2 e); the lse that leaves is natural.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from kernels.fp8 import from_e4m3
from kernels.prefix_attention_decode import new_token, rotated
from kernels.prefix_check import checked_piece, checked_stop
from kernels.prefix_records import (
    ALONE,
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

LN2 = tl.constexpr(0.6931471805599453)


class KVPages(NamedTuple):
    """K and V as the kernel takes them."""

    k: Tensor  # [num_pages, KV_HEADS, PAGE, D], of q's dtype, or the bytes of e4m3
    v: Tensor
    k_scale: Tensor | None  # fp32 [num_pages, KV_HEADS, PAGE], with e4m3
    v_scale: Tensor | None


# Counts change from step to step: one compiled kernel serves them all.
@triton.jit(
    do_not_specialize=["large_programs", "grain", "overhead", "large", "small", "large_slots"]
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
    stretch,
    first_tile,  # int32 [2, programs]
    row_position,  # int32 [T], with WINDOW
    rotary,  # None, or a Rotary: q is then the QKV projection
    qk_scale,
    grain,  # tokens
    overhead,  # of a tile, in grains
    large,  # tiles of the larger size, which come first
    small,
    large_slots,
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
    faults=(),  # of prefix_check.py: empty, or int32 [programs, NUMBERS]
):
    pools = (q, kv, (k_blocks, v_blocks), page_table, row_position, rotary)
    for size in tl.static_range(2):
        if SIZES[size] > 0:
            if PIECES:
                _walk_pieces(
                    pools,
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
                    faults,
                )
            else:
                _walk_line(
                    pools,
                    (out, lse, part_out, part_lse),
                    (tiles, starts, stretch, first_tile),
                    (grain, overhead, large, small, large_slots),
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
                    faults,
                )


@triton.jit
def _walk_pieces(
    pools,
    results,
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
            _attend_tile(
                pools,
                results,
                tl.load(piece + VECTOR).to(tl.int64),
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
            )
        if len(faults):
            at = checked_piece(faults, pieces, at, M // GROUP)


@triton.jit
def _walk_line(
    pools,
    results,
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
    faults,
):
    """The program's stretch of one size's tiles, tile by tile."""
    tiles, starts, stretch, first_tile = schedule
    grain, overhead, large, small, large_slots = counts
    program = tl.program_id(0)
    share = tl.load(stretch)
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
            slot = place
        else:
            slot = head * count + tile + program
        if goal > tl.maximum(done, overhead):
            vectors = slot.to(tl.int64) * SIZES[size]
            if size:
                vectors += large_slots * SIZES[0]
            record = tiles + (low + tile) * RECORD
            grain_start = tl.load(record + GRAIN_START)
            first_grain = tl.maximum(done - overhead, 0)
            # What holds for the tile's end, and for all of it.
            flags = tl.where(goal == places, tl.load(record + FLAGS), 0)
            flags = tl.where(first_grain == 0, flags, flags & WRITES)
            _attend_tile(
                pools,
                results,
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
            )
        place += goal - done
        tile = tl.where(goal == places, tile + 1, tile)
        # A padded plan has empty tiles behind the head's last: they are not walked.
        tile = tl.where(place == (head + 1) * length, 0, tile)
        if len(faults):
            stop = checked_stop(faults[0], program, line, place, stop, tile, grain, overhead)


@triton.jit
def _attend_tile(
    pools,
    results,
    first_vector,
    row_start,
    rows,
    page_start,
    node_start,
    flags,
    low,
    high,
    edge,
    head,
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
):
    """Tokens [low, high) of a tile's node for the tile's rows and one KV head.

    first_vector: of the partial result, unless the flag ALONE says that this is the result
    edge: row r sees no token from edge + r on
    """
    q, kv, blocks, page_table, row_position, rotary = pools
    out, lse, part_out, part_lse = results
    # Adds 0, which the compiler cannot know: what follows from `vector` is then not computed before
    # all tiles and held in registers for each, nor from here to the stores, which do the same.
    vector = tl.arange(0, M) + tl.minimum(rows, 0)
    count = rows * GROUP
    live = vector < count
    row = row_start + vector // GROUP
    first_head = row_start.to(tl.int64) * (KV_HEADS * GROUP) + head * GROUP
    dim = tl.arange(0, D)
    if rotary is None:
        q_head = vector // GROUP * (KV_HEADS * GROUP) + vector % GROUP  # from the tile's first on
        source = q + first_head * D + (q_head[:, None] * D + dim[None, :])
        x = tl.load(source, mask=live[:, None], other=0.0)  # [M, D]
    else:
        qkv_head = vector // GROUP * (KV_HEADS * (GROUP + 2)) + vector % GROUP
        first = row_start.to(tl.int64) * (KV_HEADS * (GROUP + 2)) + head * GROUP
        x = rotated(
            q + first * D + qkv_head * D, rotary.q_weight, rotary.positions + row, live, rotary, D
        )

    visible = edge + row  # [M]
    oldest = visible
    if WINDOW:
        position = tl.load(row_position + row, mask=live, other=0)
        oldest = position - (WINDOW - 1) - node_start
    page_table += page_start

    peak = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, D], tl.float32)
    if rotary is not None:  # noqa: SIM102 - decided at compile time
        # The node's new token, its last, has not been written: it comes from the projection, and
        # whoever owns the node's end writes it.
        if (flags & WRITES) != 0:
            high -= 1
            k, v = new_token(
                q,
                kv,
                rotary,
                row_start,
                head,
                KV_HEADS,
                GROUP,
                D,
                PAGE,
                NATIVE_FP8,
            )
            peak = tl.sum(x.to(tl.float32) * k, 1) * qk_scale
            total += 1.0
            acc += v
    # First a loop over blocks [whole, stop), then one over those on both sides of it. If STEADY, all
    # rows see all of the first loop's tokens: no masks there. Its blocks may come by TMA, which reads
    # whole ones, whatever lies behind the node's end; those of the second come by pointers.
    first = low // BLOCK
    every = tl.cdiv(high, BLOCK)
    whole, stop = first, high // BLOCK if TMA else every
    if STEADY:
        least = low
        if WINDOW:
            least = tl.maximum(low, tl.max(tl.where(live, oldest, 0), 0))
        whole = tl.minimum(tl.cdiv(least, BLOCK), every)
        stop = tl.maximum(tl.minimum(high, edge + row_start) // BLOCK, whole)
    before = whole - first
    last = tl.maximum(every - 1, 0)
    for outside in tl.static_range(2 if STEADY or TMA else 1):
        begin = 0 if outside else whole
        end = before + every - stop if outside else stop
        if AHEAD:
            page = _page(page_table, _block(begin, outside, first, before, stop), last, PAGE, BLOCK)
        for i in range(begin, end):
            block = _block(i, outside, first, before, stop)
            if AHEAD:
                # Were a block's page loaded in its own trip, it would be one more stage of the
                # pipeline, with all copies of K and V awaited at once.
                next_block = _block(i + 1, outside, first, before, stop)
                next_page = _page(page_table, next_block, last, PAGE, BLOCK)
            else:
                page = tl.load(page_table + block * BLOCK // PAGE)
            acc, peak, total = _attend_block(
                acc,
                peak,
                total,
                x,
                page,
                block * BLOCK,
                low,
                high,
                visible,
                oldest,
                kv,
                blocks,
                head,
                qk_scale,
                KV_HEADS,
                D,
                PAGE,
                BLOCK,
                WINDOW,
                NATIVE_FP8,
                TMA and not outside,
                outside or not STEADY,
            )
            if AHEAD:
                page = next_page

    divisor = tl.where(total > 0.0, total, 1.0)
    acc = acc / divisor[:, None]
    log = peak + tl.log2(divisor)  # -inf if nothing was seen
    vector = tl.arange(0, M) + tl.minimum(flags, 0)
    live = vector < count
    if (flags & ALONE) != 0:
        q_head = vector // GROUP * (KV_HEADS * GROUP) + vector % GROUP
        target = out + first_head * D + (q_head[:, None] * D + dim[None, :])
        tl.store(target, acc.to(out.dtype.element_ty), mask=live[:, None])
        tl.store(lse + first_head + q_head, log * LN2, mask=live)
    else:
        part = part_out + first_vector * D
        tl.store(part + (vector[:, None] * D + dim[None, :]), acc, mask=live[:, None])
        tl.store(part_lse + first_vector + vector, log, mask=live)


@triton.jit
def _block(i, outside: tl.constexpr, first, before, stop):
    """The i-th block to work on: itself, or if `outside`, of those from `first`, then from `stop`."""
    return tl.where(i < before, first + i, stop + i - before) if outside else i


@triton.jit
def _page(page_table, block, last, PAGE: tl.constexpr, BLOCK: tl.constexpr):
    """The page of a block, or of the last one behind that."""
    return tl.load(page_table + tl.minimum(block, last) * BLOCK // PAGE)


@triton.jit
def _attend_block(
    acc,  # fp32 [M, D]
    peak,  # fp32 [M], the largest score so far
    total,  # fp32 [M]
    q,  # [M, D]
    page,
    first,  # token
    low,
    high,
    visible,  # [M]
    oldest,  # [M]
    kv,
    blocks,
    head,
    qk_scale,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
    TMA: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Online softmax over a block within a page; if MASKED, over its tokens in [low, high)."""
    # fp32 is for tests: in full precision, not TF32.
    PRECISION: tl.constexpr = "ieee" if q.dtype == tl.float32 else "tf32"
    offset = tl.arange(0, BLOCK)
    token = first + offset
    mine = (token >= low) & (token < high) if MASKED else None  # [BLOCK]
    tile = (page.to(tl.int64) * KV_HEADS + head) * PAGE + first % PAGE
    k = _load_tile(kv.k, blocks[0], tile, mine, q.dtype, D, BLOCK, NATIVE_FP8, TMA)  # [BLOCK, D]
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [M, BLOCK], not yet scaled
    if kv.k_scale is not None:
        scores *= _load_scales(kv.k_scale + tile + offset, mine)[None, :]
    if MASKED:
        seen = mine[None, :] & (token[None, :] < visible[:, None])
        if WINDOW:
            seen = seen & (token[None, :] >= oldest[:, None])
        scores = tl.where(seen, scores, float("-inf"))

    # The scale is positive: the largest score stays the largest, and scaling shares the
    # subtraction's instruction.
    new_peak = tl.maximum(peak, tl.max(scores, 1) * qk_scale)
    base = new_peak
    if MASKED:  # a row may have seen nothing yet: no exp2(NaN)
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    weights = tl.exp2(scores * qk_scale - base[:, None])
    fade = tl.exp2(peak - base)
    total = total * fade + tl.sum(weights, 1)
    v = _load_tile(kv.v, blocks[1], tile, mine, q.dtype, D, BLOCK, NATIVE_FP8, TMA)
    if kv.v_scale is not None:
        v_scale = _load_scales(kv.v_scale + tile + offset, mine)
        if q.dtype == tl.float16:  # has not the exponents for a weight times a scale
            v = (v.to(tl.float32) * v_scale[:, None]).to(q.dtype)
        else:
            weights *= v_scale[None, :]
    acc = tl.dot(weights.to(q.dtype), v, acc * fade[:, None], input_precision=PRECISION)
    return acc, new_peak, total


@triton.jit
def _load_scales(source, mine):
    if mine is None:
        return tl.load(source)
    else:  # noqa: RET505 - Triton compiles what stands behind a return
        return tl.load(source, mask=mine, other=0.0)


@triton.jit
def _load_tile(
    pages,
    blocks,
    tile,
    mine,  # tokens that are loaded, or None for all
    dtype: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
    TMA: tl.constexpr,
):
    """A head's tokens [BLOCK, D] as `dtype`; 0 for those that are not ours, whatever they hold."""
    if TMA:
        x = blocks.load([tile.to(tl.int32), 0])
    else:
        offset = tl.arange(0, BLOCK)[:, None] * D + tl.arange(0, D)[None, :]
        if mine is None:
            x = tl.load(pages + tile * D + offset)
        else:
            x = tl.load(pages + tile * D + offset, mask=mine[:, None], other=0.0)
    if x.dtype == tl.uint8:
        x = from_e4m3(x, NATIVE_FP8)
    return x.to(dtype)
