"""FP8 (e4m3) pages of K and V: one fp32 scale per token and head, value = page * scale.

    scale = max(amax |x|, 2^-60) / 448        page = e4m3(x * (1 / scale))

A scale of its own for every token and head costs 4 bytes beside the head's D, and a write never
touches what was written before, which one scale per page or per head would have to.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

E4M3_MAX = 448.0
SMALLEST_AMAX = 2.0**-60  # below it values become zeros; the scale and its reciprocal stay finite


def quantise_e4m3(x: Tensor) -> tuple[Tensor, Tensor]:
    """The definition: x [..., D] to e4m3 of the same shape, and fp32 scales [...].

    No clamp: the largest quotient is 448 give or take an fp32 roundoff, which e4m3 rounds to 448.
    A row with NaN or inf gets NaN or inf as its scale, so that its values are NaN.
    """
    scale = x.float().abs().amax(-1).clamp_min(SMALLEST_AMAX) / E4M3_MAX
    return (x.float() * scale.reciprocal()[..., None]).to(torch.float8_e4m3fn), scale


@triton.jit
def to_e4m3_bits(x: tl.tensor) -> tl.tensor:
    """fp32 to the bytes of e4m3: to nearest even, what lies beyond 448 to 448, NaN to NaN.

    By integers, for GPUs without a conversion (before sm_89, where Triton has no `fp8e4nv`).
    """
    bits = x.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # Drop 20 of 23 bits of the mantissa, to nearest even; exponents are biased by 7, not 127.
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 codes are multiples of 2^-9: adding 2^14, whose last bit that is, rounds to them.
    shifted = magnitude.to(tl.float32, bitcast=True) + 16384.0
    subnormal = shifted.to(tl.uint32, bitcast=True) - 0x46800000
    code = tl.where(magnitude < 0x3C800000, subnormal, tl.minimum(normal, 0x7E))
    code = tl.where(magnitude > 0x7F800000, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def from_e4m3_bits(code: tl.tensor) -> tl.tensor:
    """Bytes (uint8) of e4m3 to fp16, exactly; the two NaN codes become +-480.

    As the bits of an fp16 with its wider exponent the value is 2^-8 of what it should be.
    """
    bits = code.to(tl.uint16)
    bits = ((bits & 0x7F) << 7) | ((bits & 0x80) << 8)
    return bits.to(tl.float16, bitcast=True) * 256.0
