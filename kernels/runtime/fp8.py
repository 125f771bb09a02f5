"""FP8 KV: e4m3 pages of K and V with one fp32 scale per token and head; value = page * scale.

    scale = max(amax |x|, 2^-60) / 448        page = e4m3(x * (1 / scale))

A separate scale for each token and head costs 4 bytes on top of the head's D. In return a write
changes nothing written earlier, and there is no calibration and no clipping. The table shows
sqrt(sum of squared errors / sum of squared values) in percent. All values are bf16; SmolLM2-135M
reads 512 tokens of prose, mean .. worst of its 30 layers. The calibrated scale is one per head,
from the first half of the tokens; errors are those of the second half.

    scale per            token and head    head, calibrated    none (scale 1)
    SmolLM2, K            2.10 .. 2.36       2.70 .. 3.46       2.62 .. 2.73
    SmolLM2, V            2.42 .. 2.51       2.70 .. 2.95       2.67 .. 2.80
    normal, D 128             2.57               2.64               2.67
    the same, tokens
    scaled by e^(1.5 n)       2.55               37                 8.2

Calibrated heads clip: the largest error of a value was 26 % of its layer's largest.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.runtime.configs import gpu_of

E4M3_MAX = 448.0
SMALLEST_AMAX = 2.0**-60  # keeps the scale and its reciprocal finite; smaller values become 0


def quantise_e4m3(x: Tensor) -> tuple[Tensor, Tensor]:
    """The definition: x [..., D] to e4m3 of the same shape, and fp32 scales [...].

    No clamp is needed: the largest quotient is 448 up to an fp32 rounding error, and e4m3 rounds it
    to 448. A row with NaN or inf gets that as its scale, so its values become NaN.
    """
    scale = x.float().abs().amax(-1).clamp_min(SMALLEST_AMAX) / E4M3_MAX
    return (x.float() * scale.reciprocal()[..., None]).to(torch.float8_e4m3fn), scale


def has_native_e4m3(device: torch.device) -> bool:
    """Whether kernels can use native e4m3 conversions: not in the interpreter, which misrounds."""
    return gpu_of(device).arch >= 89 and not triton.knobs.runtime.interpret


@triton.jit
def magnitude_bits(x: tl.tensor) -> tl.tensor:
    """The bits of |x|, fp32, as int32: ordered like the values, with NaN largest."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def e4m3_scale(bits: tl.tensor) -> tl.tensor:
    """Scales fp32 [M] of rows whose `magnitude_bits` are [M, D]."""
    largest = tl.maximum(tl.max(bits, axis=1), 0x21800000)  # 2^-60
    return tl.div_rn(largest.to(tl.float32, bitcast=True), 448.0)


@triton.jit
def to_e4m3(x: tl.tensor, NATIVE: tl.constexpr) -> tl.tensor:
    """fp32 to e4m3 as bytes (uint8); NATIVE: by the GPU's conversion, see `has_native_e4m3`."""
    return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True) if NATIVE else to_e4m3_bits(x)


@triton.jit
def to_e4m3_bits(x: tl.tensor) -> tl.tensor:
    """fp32 to e4m3 as bytes: round to nearest even, saturate at 448, keep NaN.

    In integer arithmetic, for GPUs before sm_89, where Triton has no `fp8e4nv`.
    """
    bits = x.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # Drop 20 of 23 bits of the mantissa, to nearest even; exponents are biased by 7, not 127.
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 codes are multiples of 2^-9, fp32's last bit at 2^14: adding 2^14 rounds to them.
    shifted = magnitude.to(tl.float32, bitcast=True) + 16384.0
    subnormal = shifted.to(tl.uint32, bitcast=True) - 0x46800000
    code = tl.where(magnitude < 0x3C800000, subnormal, tl.minimum(normal, 0x7E))
    code = tl.where(magnitude > 0x7F800000, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def from_e4m3_bits(code: tl.tensor) -> tl.tensor:
    """Bytes (uint8) of e4m3 to fp16, exactly; the two NaN codes become +-480.

    The bits are moved into fp16's fields; as fp16's exponent bias is 15, not 7, that gives the
    value times 2^-8.
    """
    bits = code.to(tl.uint16)
    bits = ((bits & 0x7F) << 7) | ((bits & 0x80) << 8)
    return bits.to(tl.float16, bitcast=True) * 256.0


@triton.jit
def from_e4m3(code: tl.tensor, NATIVE: tl.constexpr) -> tl.tensor:
    """Bytes (uint8) of e4m3 to fp8e4nv if NATIVE, else fp16: exact in any 16-bit float."""
    return code.to(tl.float8e4nv, bitcast=True) if NATIVE else from_e4m3_bits(code)


@triton.jit
def power_below(x: tl.tensor) -> tl.tensor:
    """The largest power of two that is at most x, for fp32 x > 0; 1 for x = 0."""
    power = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.where(power > 0.0, power, 1.0)
