"""Rotary embeddings in Triton: pairs of elements, and cos and sin of their angles."""

import triton
import triton.language as tl


@triton.jit
def cos_sin(angle: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """cos and sin of fp32 angles up to 2^17 in magnitude, with an error of 1e-7.

    `tl.cos` and `tl.sin` cost seven times the instructions, a branch for large angles and a table
    in local memory. Here k * pi/2, the nearest multiple, is subtracted in four parts. The first
    three parts of pi/2 have 7 bits, so that their products with k are exact, fused or not.
    """
    shifted = angle * 0.6366197723675814 + 12582912.0  # adding 1.5 * 2^23 rounds to an integer k,
    quarter = shifted.to(tl.uint32, bitcast=True)  # and leaves k's low bits in those of the sum
    k = shifted - 12582912.0
    x = angle - k * 1.5625 - k * 0.0081787109375 - k * 0.00011730194091796875
    x -= k * 3.1391647326017846e-07
    # The polynomials of Cephes' sinf and cosf, on [-pi/4, pi/4].
    xx = x * x
    s = x + x * xx * (-1.6666654611e-1 + xx * (8.3321608736e-3 + xx * -1.9515295891e-4))
    c = 4.166664568298827e-2 + xx * (-1.388731625493765e-3 + xx * 2.443315711809948e-5)
    c = 1.0 - 0.5 * xx + xx * xx * c
    odd = (quarter & 1) != 0
    cos = tl.where(odd, s, c).to(tl.uint32, bitcast=True) ^ (((quarter + 1) & 2) << 30)
    sin = tl.where(odd, c, s).to(tl.uint32, bitcast=True) ^ ((quarter & 2) << 30)
    return cos.to(tl.float32, bitcast=True), sin.to(tl.float32, bitcast=True)


@triton.jit
def pair_columns(
    HEAD_DIM: tl.constexpr, ROTARY: tl.constexpr, PAIRS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The two columns of each of a head's pairs [PAIRS], and the mask of pairs that exist.

    Elements from ROTARY on are paired, too, and rotated by 0, so that every thread has whole pairs.
    """
    pair = tl.arange(0, PAIRS)
    second = pair + ROTARY // 2
    first = pair
    if ROTARY < HEAD_DIM:
        first = tl.where(pair < ROTARY // 2, pair, second)
        second = tl.where(pair < ROTARY // 2, second, pair + HEAD_DIM // 2)
        if ROTARY % 16 == 0 and HEAD_DIM % 16 == 0:  # keep 16-byte vectors
            first = tl.max_contiguous(tl.multiple_of(first, 8), 8)
            second = tl.max_contiguous(tl.multiple_of(second, 8), 8)
    return first, second, pair < HEAD_DIM // 2


@triton.jit
def cos_sin_of(
    inv_freq: tl.tensor,
    position: tl.tensor,
    axis_stride: tl.tensor,
    ROTARY: tl.constexpr,
    PAIRS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """cos and sin [PAIRS] of one token's angles; angles are 0 for elements from ROTARY on."""
    pair = tl.arange(0, PAIRS)
    token_position = tl.load(position)
    if HEIGHT > 0:
        token_position = tl.where(
            (pair % 3 == 1) & (pair < HEIGHT), tl.load(position + axis_stride), token_position
        )
    if WIDTH > 0:
        token_position = tl.where(
            (pair % 3 == 2) & (pair < WIDTH), tl.load(position + 2 * axis_stride), token_position
        )
    return cos_sin(
        token_position.to(tl.float32) * tl.load(inv_freq + pair, mask=pair < ROTARY // 2, other=0.0)
    )
