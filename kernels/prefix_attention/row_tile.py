"""One piece of prefix attention: online softmax of a row tile over a range of a node's tokens.

Rounding points, for 16-bit inputs: scores, softmax, sums and merges are fp32; probabilities are
rounded to q's dtype before their product with V, and the result once, at the end. Scores and the
log-sum-exp of partials are in units of log2 (`qk_scale` = scale * log2 e); the op's lse is natural.
"""

import triton
import triton.language as tl

from kernels.prefix_attention.fused_decode import new_token, rotated
from kernels.prefix_attention.records import ALONE, WRITES
from kernels.runtime.fp8 import E4M3_MAX, SMALLEST_AMAX, from_e4m3, power_below

LN2 = tl.constexpr(0.6931471805599453)
TINY = tl.constexpr(SMALLEST_AMAX)
E4M3 = tl.constexpr(E4M3_MAX)


@triton.jit
def attend_tile(
    inputs,
    outputs,
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
    HALF: tl.constexpr,
):
    """Attend a tile's rows, for one KV head, to tokens [low, high) of the tile's node.

    inputs, outputs: tuples of the kernel's arguments, unpacked in the first lines
    first_vector: the partial's first query vector; unused with the flag ALONE, where the result is
        final
    row_start, rows: the tile's first row and its number of rows
    page_start, node_start: the node's first entry in the page table; tokens before the node
    edge: row r of the step sees the tokens before edge + r
    """
    q, kv, blocks, page_table, row_position, rotary = inputs
    out, lse, part_out, part_lse = outputs
    # Opaque +0 (rows is never negative): keeps address math from being hoisted out of the tile loop
    # (register pressure). The stores recompute `vector` likewise, so that it is not kept for them.
    vector = tl.arange(0, M) + tl.minimum(rows, 0)
    count = rows * GROUP
    live = vector < count
    row = row_start + vector // GROUP
    first_head = row_start.to(tl.int64) * (KV_HEADS * GROUP) + head * GROUP
    dim = tl.arange(0, D)
    if rotary is None:
        q_head = vector // GROUP * (KV_HEADS * GROUP) + vector % GROUP  # relative to first_head
        source = q + first_head * D + (q_head[:, None] * D + dim[None, :])
        x = tl.load(source, mask=live[:, None], other=0.0)  # [M, D]
    else:
        qkv_head = vector // GROUP * (KV_HEADS * (GROUP + 2)) + vector % GROUP
        first = row_start.to(tl.int64) * (KV_HEADS * (GROUP + 2)) + head * GROUP
        x = rotated(
            q + first * D + qkv_head * D, rotary.q_weight, rotary.positions + row, live, rotary, D
        )

    if HALF:  # scale into fp16's range, by a power of two so that nothing rounds
        size = power_below(tl.max(tl.abs(x.to(tl.float32)), 1))  # [M]
        x = (x.to(tl.float32) / size[:, None]).to(tl.float16)
        qk_scale = size * qk_scale

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
        # The node's last token is new and not yet in its page: the CTA whose piece includes the
        # node's end takes it from the projection and writes it.
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
            weight = 1.0
            if HALF:  # weights of up to 1 / scale, as in _attend_block
                shift = tl.log2(tl.maximum(tl.max(tl.abs(v)), TINY) / E4M3)
                peak += shift
                weight = tl.exp2(-shift)
            total += weight
            acc += v * weight

    # The first loop runs over blocks [whole, stop), the second over the blocks before and after it.
    # With STEADY every row sees all tokens of the first loop, which then needs no masks. With TMA
    # the first loop uses tensor copies, which always read whole blocks, even past the node's end;
    # the second loads by pointers.
    first = low // BLOCK
    block_end = tl.cdiv(high, BLOCK)
    whole, stop = first, high // BLOCK if TMA else block_end
    if STEADY:
        common_start = low
        if WINDOW:
            common_start = tl.maximum(low, tl.max(tl.where(live, oldest, 0), 0))
        whole = tl.minimum(tl.cdiv(common_start, BLOCK), block_end)
        stop = tl.maximum(tl.minimum(high, edge + row_start) // BLOCK, whole)
    before = whole - first
    last = tl.maximum(block_end - 1, 0)
    for outside in tl.static_range(2 if STEADY or TMA else 1):
        begin = 0 if outside else whole
        end = before + block_end - stop if outside else stop
        if AHEAD:
            page = _page(page_table, _block(begin, outside, first, before, stop), last, PAGE, BLOCK)
        for i in range(begin, end):
            block = _block(i, outside, first, before, stop)
            if AHEAD:
                # Loading a block's page in its own iteration would take one more pipeline stage,
                # and the loop would wait for all copies of K and V at once.
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
                HALF,
            )
            if AHEAD:
                page = next_page

    divisor = tl.where(total > 0.0, total, 1.0)
    acc = acc / divisor[:, None]
    log = peak + tl.log2(divisor)  # -inf if the row saw no token
    vector = tl.arange(0, M) + tl.minimum(flags, 0)
    live = vector < count
    if (flags & ALONE) != 0:
        q_head = vector // GROUP * (KV_HEADS * GROUP) + vector % GROUP
        target = out + first_head * D + (q_head[:, None] * D + dim[None, :])
        tl.store(target, acc.to(out.dtype.element_ty), mask=live[:, None])
        tl.store(lse + first_head + q_head, log * LN2, mask=live)
    else:
        partial = first_vector.to(tl.int64)
        part = part_out + partial * D
        tl.store(part + (vector[:, None] * D + dim[None, :]), acc, mask=live[:, None])
        tl.store(part_lse + partial + vector, log, mask=live)


@triton.jit
def _block(i, outside: tl.constexpr, first, before, stop):
    """The block of iteration i: i itself, or if `outside` the i-th of those around the first loop.

    These are `before` blocks from `first` on, then those from `stop` on.
    """
    return tl.where(i < before, first + i, stop + i - before) if outside else i


@triton.jit
def _page(page_table, block, last, PAGE: tl.constexpr, BLOCK: tl.constexpr):
    """The page of a block; for blocks past `last`, the page of `last`."""
    return tl.load(page_table + tl.minimum(block, last) * BLOCK // PAGE)


@triton.jit
def _attend_block(
    acc,  # fp32 [M, D]
    peak,  # fp32 [M], the largest score so far; with HALF, log2 of V's largest scale is added
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
    HALF: tl.constexpr,
):
    """One step of the online softmax over a KV block; with MASKED, its tokens in [low, high)."""
    # fp32 is for tests: full precision, not TF32.
    PRECISION: tl.constexpr = "ieee" if q.dtype == tl.float32 else "tf32"
    offset = tl.arange(0, BLOCK)
    token = first + offset
    inside = (token >= low) & (token < high) if MASKED else None  # [BLOCK]
    tile = (page.to(tl.int64) * KV_HEADS + head) * PAGE + first % PAGE
    k = _load_tile(kv.k, blocks[0], tile, inside, q.dtype, D, BLOCK, NATIVE_FP8, TMA)  # [BLOCK, D]
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [M, BLOCK], not yet scaled
    if kv.k_scale is not None:
        scores *= _load_scales(kv.k_scale + tile + offset, inside)[None, :]
    if inside is not None:
        seen = inside[None, :] & (token[None, :] < visible[:, None])
        if WINDOW:
            seen = seen & (token[None, :] >= oldest[:, None])
        scores = tl.where(seen, scores, float("-inf"))

    # The scale is positive, so the maximum can be taken before scaling; scaling and subtraction
    # are then one instruction.
    row_scale = qk_scale[:, None] if HALF else qk_scale
    block_peak = tl.max(scores, 1) * qk_scale
    if HALF:  # weights of up to 1 / scale, so that their products with V's scales fill fp16
        v_scale = _load_scales(kv.v_scale + tile + offset, inside)
        block_peak += tl.log2(tl.max(v_scale, 0))
    new_peak = tl.maximum(peak, block_peak)
    base = new_peak
    if MASKED:  # a row may have seen no token yet: avoid exp2(-inf + inf)
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    weights = tl.exp2(scores * row_scale - base[:, None])
    rescale = tl.exp2(peak - base)
    total = total * rescale + tl.sum(weights, 1)
    v = _load_tile(kv.v, blocks[1], tile, inside, q.dtype, D, BLOCK, NATIVE_FP8, TMA)
    if HALF:
        weights *= v_scale[None, :]
    elif kv.v_scale is not None:
        v_scale = _load_scales(kv.v_scale + tile + offset, inside)
        if q.dtype == tl.float16:  # its exponents are too few for a weight times a scale
            v = (v.to(tl.float32) * v_scale[:, None]).to(q.dtype)
        else:
            weights *= v_scale[None, :]
    acc = tl.dot(weights.to(q.dtype), v, acc * rescale[:, None], input_precision=PRECISION)
    return acc, new_peak, total


@triton.jit
def _load_scales(source, inside):
    if inside is None:
        return tl.load(source)
    else:  # noqa: RET505 - Triton would compile code after the return
        return tl.load(source, mask=inside, other=0.0)


@triton.jit
def _load_tile(
    pages,
    blocks,
    tile,
    inside,  # mask of the tokens to load, or None for all
    dtype: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
    TMA: tl.constexpr,
):
    """K or V of a block of one head's tokens, [BLOCK, D] as `dtype`; 0 where masked."""
    if TMA:
        x = blocks.load([tile.to(tl.int32), 0])
    else:
        offset = tl.arange(0, BLOCK)[:, None] * D + tl.arange(0, D)[None, :]
        if inside is None:
            x = tl.load(pages + tile * D + offset)
        else:
            x = tl.load(pages + tile * D + offset, mask=inside[:, None], other=0.0)
    if x.dtype == tl.uint8:
        x = from_e4m3(x, NATIVE_FP8)
    return x.to(dtype)
