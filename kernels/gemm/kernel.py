"""The two kernels of `op.py`: an implicit GEMM, plain or convolution, and the sum of its partials.

    out[row(m), n] = f(sum over taps t and channels c of a[token(m, t), c] * w[n, t, c] + bias[n])

A plain product has one tap, the row itself. A 3x3 convolution has nine: token(m, t) is at tap
(t // 3, t % 3) of the window, whose rows are `columns` tokens apart; taps outside the view count as
zeros. Nothing is unfolded in memory: each K block is a block of channels of one tap.
"""

import triton
import triton.language as tl


# Not specialised on counts, which change with the views: one compiled kernel serves them all.
@triton.jit(do_not_specialize=["rows", "band", "whole", "rest", "lanes", "share"])
def gemm_kernel(
    a,  # [tokens, C]
    w,  # [N, TAPS * C]
    w_blocks,  # with TMA, its descriptor
    a_blocks,  # with TMA and one tap, a's descriptor
    bias,  # [N] or None
    out,  # [.., N]
    out_rows,  # int64 [rows], or None for 0, 1, ...
    part,  # fp32 [partials, BLOCK_M, BLOCK_N]
    windows,  # with nine taps, int32 [3, rows]: first token, columns, a bit for each tap inside
    rows,  # M
    width,  # N
    a_stride,
    out_stride,
    band,  # from here on: fields of a StreamK
    whole,
    rest,
    lanes,
    share,
    C: tl.constexpr,
    TAPS: tl.constexpr,
    QUICK_GELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
):
    STEPS: tl.constexpr = TAPS * ((C + BLOCK_K - 1) // BLOCK_K)
    program, programs = tl.program_id(0), tl.num_programs(0)
    lane, rank = program % lanes, program // lanes
    start = rank * share
    stop = tl.minimum(start + share, tl.cdiv(rest - lane, lanes) * STEPS)
    whole_tiles = tl.cdiv(whole - program, programs)
    pieces = tl.where(start < stop, tl.cdiv(stop, STEPS) - start // STEPS, 0)
    for piece in range(whole_tiles + pieces):
        is_whole = piece < whole_tiles
        at = start // STEPS + piece - whole_tiles  # index among the lane's tiles
        tile = tl.where(is_whole, program + piece * programs, whole + at * lanes + lane)
        first = tl.where(is_whole, 0, tl.maximum(start - at * STEPS, 0))
        last = tl.where(is_whole, STEPS, tl.minimum(stop - at * STEPS, STEPS))
        m, n = _origin(tile, rows, width, band, BLOCK_M, BLOCK_N)
        acc = _sum(
            a,
            w,
            w_blocks,
            a_blocks,
            windows,
            rows,
            width,
            a_stride,
            m,
            n,
            first,
            last,
            C,
            TAPS,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            TMA,
        )
        row, column = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)[None, :]
        if is_whole:
            _finish(
                acc, bias, out, out_rows, m + row, n + column, rows, width, out_stride, QUICK_GELU
            )
        else:
            partial = ((rank + at) * lanes + lane).to(tl.int64)
            offset = row[:, None] * BLOCK_N + column
            tl.store(part + partial * (BLOCK_M * BLOCK_N) + offset, acc)


@triton.jit
def _origin(tile, rows, width, band, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The first row and column of a tile of the result."""
    panels = tl.cdiv(width, BLOCK_N)
    top = tile // (band * panels) * band
    height = tl.minimum(tl.cdiv(rows, BLOCK_M) - top, band)
    place = tile - top * panels
    return (top + place % height) * BLOCK_M, place // height * BLOCK_N


@triton.jit
def _sum(
    a,
    w,
    w_blocks,
    a_blocks,
    windows,
    rows,
    width,
    a_stride,
    m,
    n,
    first,
    last,
    C: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
):
    """The fp32 sum over steps [first, last) for the tile at row m and column n.

    Rows and columns past the end repeat the last one and are not stored.
    """
    PER_TAP: tl.constexpr = (C + BLOCK_K - 1) // BLOCK_K
    row = tl.minimum(m + tl.arange(0, BLOCK_M), rows - 1)
    k = tl.arange(0, BLOCK_K)[None, :]
    if TAPS == 1:
        a_rows = a + row.to(tl.int64)[:, None] * a_stride + k  # [BLOCK_M, BLOCK_K]
    else:
        token = tl.load(windows + row)
        columns = tl.load(windows + rows + row)
        inside = tl.load(windows + 2 * rows + row)
    w_rows = tl.minimum(n + tl.arange(0, BLOCK_N), width - 1).to(tl.int64)[:, None]
    w_rows = w + w_rows * (TAPS * C) + k  # [BLOCK_N, BLOCK_K]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(first, last):
        tap, c = step // PER_TAP, step % PER_TAP * BLOCK_K
        if TMA and TAPS == 1:
            a_tile = a_blocks.load([m, c])
        elif TAPS == 1:
            if C % BLOCK_K == 0:
                a_tile = tl.load(a_rows + c)
            else:
                a_tile = tl.load(a_rows + c, mask=k < C - c, other=0)
        else:
            tap_token = (token + tap // 3 * columns + tap % 3).to(tl.int64)
            mask = ((inside >> tap) & 1)[:, None] > 0
            if C % BLOCK_K != 0:
                mask &= k < C - c
            a_tile = tl.load(a + tap_token[:, None] * a_stride + (c + k), mask=mask, other=0)
        if TMA:
            w_tile = w_blocks.load([n, tap * C + c])
        elif C % BLOCK_K == 0:
            w_tile = tl.load(w_rows + (tap * C + c))
        else:
            w_tile = tl.load(w_rows + (tap * C + c), mask=k < C - c, other=0)
        acc = tl.dot(a_tile, w_tile.T, acc, input_precision="ieee")
    return acc


@triton.jit
def _finish(acc, bias, out, out_rows, row, column, rows, width, stride, QUICK_GELU: tl.constexpr):
    """Add the bias, round to out's dtype, apply the activation, and store the valid elements."""
    valid = column < width
    if bias is not None:
        acc += tl.load(bias + column, mask=valid, other=0).to(tl.float32)
    y = acc.to(out.dtype.element_ty)
    if QUICK_GELU:
        wide = y.to(tl.float32)
        y = (wide / (1 + tl.exp(-1.702 * wide))).to(y.dtype)  # fewer registers than tl.sigmoid
    if out_rows is not None:
        target_row = tl.load(out_rows + row, mask=row < rows, other=0)
    else:
        target_row = row.to(tl.int64)
    tl.store(out + target_row[:, None] * stride + column, y, mask=(row < rows)[:, None] & valid)


@triton.jit(do_not_specialize=["rows", "band", "whole", "lanes", "share"])
def merge_partials_kernel(
    part,  # fp32 [partials, BLOCK_M, BLOCK_N]
    bias,
    out,
    out_rows,
    rows,
    width,
    out_stride,
    band,
    whole,
    lanes,
    share,
    STEPS: tl.constexpr,
    QUICK_GELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Sum ROWS rows of one split tile's partials in the order of K, and finish them."""
    index = tl.program_id(0)
    m, n = _origin(whole + index, rows, width, band, BLOCK_M, BLOCK_N)
    m += tl.program_id(1) * ROWS
    row, column = tl.arange(0, ROWS), tl.arange(0, BLOCK_N)[None, :]
    lane, at = index % lanes, index // lanes
    offset = (tl.program_id(1) * ROWS + row)[:, None] * BLOCK_N + column
    acc = tl.zeros([ROWS, BLOCK_N], tl.float32)
    for rank in range(at * STEPS // share, tl.cdiv((at + 1) * STEPS, share)):
        partial = ((rank + at) * lanes + lane).to(tl.int64)
        acc += tl.load(part + partial * (BLOCK_M * BLOCK_N) + offset)
    _finish(acc, bias, out, out_rows, m + row, n + column, rows, width, out_stride, QUICK_GELU)
