"""The attention kernel of vision attention: online softmax of each row tile over its view.

There are two launches: `rotate_kernel` writes rotated queries and keys; `vision_attention_kernel`
reads those and V. If keys were rotated where they are used, every row tile of a view (22 for 52 x
52 tokens) would rotate them again, and keys would reach the tensor cores through registers instead
of from shared memory. The separate launch costs 8 bytes of traffic per pair of a Q and a K element
in 16 bits, most of it in L2. With TURN_Q it rotates keys only: a query belongs to one row tile,
which rotates it after the load.

A head is divided into two parts, because Triton's tiles are powers of two: 96 is 64 + 32, not a
padded 128. Scores are the sum of two products, and each part of V has its own accumulator.

Rounding points, for 16-bit inputs: rotated queries and keys; probabilities, before their product
with V; the result. Scores are in units of log2 (`qk_scale` = scale * log2 e).
"""

from typing import NamedTuple

import triton
import triton.language as tl

from kernels.vision_attention.rotation import load_turn, load_turned


class Parts(NamedTuple):
    """The widths of the two tiles that hold a head's elements."""

    first: int  # 16 or more, a power of two
    rest: int  # likewise, or 0; elements past D are 0

    @staticmethod
    def of(dim: int) -> "Parts":
        """The least padding with two powers of two: 96 is 64 + 32, 72 is 64 + 16, 128 is 128."""
        first = 16
        while 2 * first <= dim:
            first *= 2
        remaining = max(0, dim - first)
        return Parts(first, max(16, triton.next_power_of_2(remaining)) if remaining else 0)

    @property
    def padded(self) -> int:
        return self.first + self.rest


@triton.jit
def vision_attention_kernel(
    turned,  # rotated: [T, HEADS of Q unless TURN_Q, then of K, FIRST + REST]
    qkv,  # [T, row_stride], for V, and with TURN_Q for Q
    coords,  # as for rotate_kernel; this, cos and sin are used only with TURN_Q
    cos,
    sin,
    q_first,  # with TMA but not SPECIALIZE or TURN_Q: descriptors of Q's two parts, by row tiles
    q_rest,
    k_first,  # with TMA: descriptors of the two parts of K and V, by KV blocks
    k_rest,
    v_first,
    v_rest,
    out,  # [T, HEADS * D]
    tiles,  # int32 [tiles, 3]: first token, first and last + 1 of the view
    row_stride,
    qk_scale,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    FIRST: tl.constexpr,
    REST: tl.constexpr,
    ROWS: tl.constexpr,
    SHORT: tl.constexpr,  # rows of a tile for at most this many queries at a view's end; 0: none
    BLOCK: tl.constexpr,  # tokens of a KV block
    TAIL: tl.constexpr,  # tokens of a view's last, partial KV block; enough for every view
    TMA: tl.constexpr,
    SPECIALIZE: tl.constexpr,
    TURN_Q: tl.constexpr,  # load queries from qkv and rotate them here; not with SPECIALIZE
):
    """Up to ROWS queries of one head and view.

    With SPECIALIZE a single masked loop runs to the view's end, as Triton's warp specialisation
    requires; a NaN among the first BLOCK tokens of the next view would then reach this one.
    """
    head = tl.program_id(0) % HEADS
    tile = tiles + tl.program_id(0) // HEADS * 3
    first, start, end = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    blocks = (k_first, k_rest, v_first, v_rest)
    rotation = (coords, cos, sin)
    for short in tl.static_range(2 if SHORT else 1):
        if (end - first <= SHORT) == (short == 1):
            _attend_tile(
                turned,
                qkv,
                rotation,
                (q_first, q_rest),
                blocks,
                out,
                first,
                start,
                end,
                head,
                row_stride,
                qk_scale,
                HEADS,
                D,
                FIRST,
                REST,
                SHORT if short else ROWS,
                BLOCK,
                TAIL,
                TMA and not short,
                TMA,
                SPECIALIZE,
                TURN_Q,
            )


@triton.jit
def _attend_tile(
    turned,
    qkv,
    rotation,
    q_tiles,
    blocks,
    out,
    first,
    start,
    end,
    head,
    row_stride,
    qk_scale,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    FIRST: tl.constexpr,
    REST: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
    TMA_Q: tl.constexpr,
    TMA: tl.constexpr,
    SPECIALIZE: tl.constexpr,
    TURN_Q: tl.constexpr,
):
    """Attend ROWS queries of one head, from token `first` on, to the view [start, end)."""
    PADDED: tl.constexpr = FIRST + REST
    Q_HEADS: tl.constexpr = 0 if TURN_Q else HEADS  # heads of Q before those of K in `turned`
    STRIDE: tl.constexpr = (Q_HEADS + HEADS) * PADDED
    live = first + tl.arange(0, ROWS) < end
    column = head * PADDED
    q = turned + first.to(tl.int64) * STRIDE + column
    # Triton gives each of two warp groups half of Q. It can halve descriptors made here, but not
    # those made on the host.
    if SPECIALIZE:
        q_tiles = (
            tl.make_tensor_descriptor(turned, [end, STRIDE], [STRIDE, 1], [ROWS, FIRST]),
            tl.make_tensor_descriptor(turned, [end, STRIDE], [STRIDE, 1], [ROWS, REST])
            if REST
            else None,
        )
    if TURN_Q:
        q0 = _turned_queries(qkv, rotation, first, live, head, row_stride, 0, FIRST, ROWS, D)
    else:
        q0 = _load(q, q_tiles[0], first, column, live, STRIDE, FIRST, ROWS, TMA_Q)
    acc0 = tl.zeros([ROWS, FIRST], tl.float32)
    q1, acc1 = q0, acc0
    if REST:
        acc1 = tl.zeros([ROWS, REST], tl.float32)
        if TURN_Q:
            q1 = _turned_queries(qkv, rotation, first, live, head, row_stride, FIRST, REST, ROWS, D)
        else:
            later = column + FIRST
            q1 = _load(q + FIRST, q_tiles[1], first, later, live, STRIDE, REST, ROWS, TMA_Q)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    whole = (end - start) // BLOCK
    num_blocks = tl.cdiv(end - start, BLOCK)
    for tail in tl.static_range(1 if SPECIALIZE else 2):
        low = whole if tail else 0
        high = num_blocks if tail or SPECIALIZE else whole
        for block in tl.range(low, high, warp_specialize=SPECIALIZE):
            acc0, acc1, peak, total = _attend_block(
                acc0,
                acc1,
                peak,
                total,
                q0,
                q1,
                turned,
                qkv,
                blocks,
                start + block * BLOCK,
                end,
                head,
                row_stride,
                qk_scale,
                HEADS,
                Q_HEADS,
                D,
                FIRST,
                REST,
                TAIL if tail else BLOCK,
                TMA and not tail,  # descriptors read whole blocks, even past the view's end
                SPECIALIZE or tail == 1,
            )
    target = out + first.to(tl.int64) * (HEADS * D) + head * D
    _store(target, acc0 / total[:, None], live, HEADS * D, D, FIRST)
    if REST:
        _store(target + FIRST, acc1 / total[:, None], live, HEADS * D, D - FIRST, REST)


@triton.jit
def _turned_queries(
    qkv,
    rotation,
    first,
    live,
    head,
    row_stride,
    START: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
):
    """Load and rotate elements [START, START + WIDTH) of ROWS queries from token `first` on."""
    coords, cos, sin = rotation
    row = tl.arange(0, ROWS)
    coord = tl.load(coords + first + row, mask=live, other=0)
    q = qkv + first.to(tl.int64) * row_stride + head * D + row * row_stride
    turn = load_turn(live, coord, cos, sin, START, WIDTH, D)
    return load_turned(q, live, turn, START, WIDTH, D)


@triton.jit
def _attend_block(
    acc0,  # fp32 [ROWS, FIRST]
    acc1,  # fp32 [ROWS, REST]
    peak,  # fp32 [ROWS], the largest score so far
    total,  # fp32 [ROWS]
    q0,  # [ROWS, FIRST]
    q1,  # [ROWS, REST]
    turned,
    qkv,
    blocks,
    at,
    end,
    head,
    row_stride,
    qk_scale,
    HEADS: tl.constexpr,
    Q_HEADS: tl.constexpr,
    D: tl.constexpr,
    FIRST: tl.constexpr,
    REST: tl.constexpr,
    BLOCK: tl.constexpr,
    TMA: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One step of the online softmax, over tokens [at, at + BLOCK); with MASKED, before `end`."""
    # fp32 is for tests: full precision, not TF32.
    PRECISION: tl.constexpr = "ieee" if q0.dtype == tl.float32 else "tf32"
    PADDED: tl.constexpr = FIRST + REST
    STRIDE: tl.constexpr = (Q_HEADS + HEADS) * PADDED
    inside = at + tl.arange(0, BLOCK) < end if MASKED else None
    k_column = (Q_HEADS + head) * PADDED
    v_column = (2 * HEADS + head) * D
    k = turned + at.to(tl.int64) * STRIDE + k_column
    v = qkv + at.to(tl.int64) * row_stride + v_column

    k0 = _load(k, blocks[0], at, k_column, inside, STRIDE, FIRST, BLOCK, TMA)
    scores = tl.dot(q0, tl.trans(k0), input_precision=PRECISION)  # [ROWS, BLOCK]
    if REST:
        k1 = _load(k + FIRST, blocks[1], at, k_column + FIRST, inside, STRIDE, REST, BLOCK, TMA)
        scores = tl.dot(q1, tl.trans(k1), scores, input_precision=PRECISION)
    if inside is not None:
        scores = tl.where(inside[None, :], scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1) * qk_scale)
    weights = tl.exp2(scores * qk_scale - new_peak[:, None])
    rescale = tl.exp2(peak - new_peak)
    total = total * rescale + tl.sum(weights, 1)
    weights = weights.to(q0.dtype)
    v0 = _load(v, blocks[2], at, v_column, inside, row_stride, FIRST, BLOCK, TMA, D)
    acc0 = tl.dot(weights, v0, acc0 * rescale[:, None], input_precision=PRECISION)
    if REST:
        v1 = _load(
            v + FIRST,
            blocks[3],
            at,
            v_column + FIRST,
            inside,
            row_stride,
            REST,
            BLOCK,
            TMA,
            D - FIRST,
        )
        acc1 = tl.dot(weights, v1, acc1 * rescale[:, None], input_precision=PRECISION)
    return acc0, acc1, new_peak, total


@triton.jit
def _load(
    source,  # pointer to the first row
    descriptor,
    row,
    column,
    mask_rows,  # mask of the rows to load, or None for all
    stride,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    TMA: tl.constexpr,
    VALID: tl.constexpr = 2**31,  # valid columns: memory may end after the last head's
):
    """[ROWS, WIDTH], 0 where masked; descriptors ignore both masks."""
    if TMA:
        return descriptor.load([row, column])
    offset = tl.arange(0, ROWS)[:, None] * stride + tl.arange(0, WIDTH)[None, :]
    if VALID < WIDTH:
        mask = (tl.arange(0, WIDTH) < VALID)[None, :]
        if mask_rows is not None:
            mask = mask & mask_rows[:, None]
        return tl.load(source + offset, mask=mask, other=0.0)
    if mask_rows is not None:
        return tl.load(source + offset, mask=mask_rows[:, None], other=0.0)
    return tl.load(source + offset)


@triton.jit
def _store(target, values, live, stride: tl.constexpr, VALID: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.arange(0, values.shape[0])
    column = tl.arange(0, WIDTH)
    mask = live[:, None] & (column < VALID)[None, :]
    source = target + (row[:, None] * stride + column[None, :])
    tl.store(source, values.to(target.dtype.element_ty), mask=mask)
