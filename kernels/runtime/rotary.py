"""Rotary embeddings in Triton: pairs of elements, and cos and sin of their angles."""

import triton
import triton.language as tl


@triton.jit
def cos_sin(position: tl.tensor, frequency: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """cos and sin of position * frequency, with an error below 2^-23, for positions under 2^32.

    frequency: int64, turns per position in units of 2^-64 (`rotary_frequencies`)

    The product overflows by whole turns, so that all bits are left for the rest. `tl.cos` and
    `tl.sin` cost seven times the instructions, a branch for large angles and a table in local
    memory.
    """
    position = position.to(tl.uint32)
    high, low = (frequency >> 32).to(tl.uint32), frequency.to(tl.uint32)
    turns = position * high + tl.umulhi(position, low)  # in units of 2^-32
    quarter = (turns + 0x20000000) >> 30  # the nearest multiple of a quarter turn
    x = (turns - (quarter << 30)).to(tl.int32, bitcast=True).to(tl.float32)
    x *= 1.4629180792671596e-09  # 2 pi / 2^32: radians, in [-pi/4, pi/4]
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
    frequencies: tl.tensor,
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
    frequency = tl.load(frequencies + pair, mask=pair < ROTARY // 2, other=0)
    return cos_sin(token_position, frequency)
