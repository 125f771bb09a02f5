"""Documented errors of a GPU's approximate instructions, and what they add to an op's error.

Triton compiles exp2 and exp of fp32 to ex2.approx, rsqrt to rsqrt.approx and `/` to div.full; its
interpreter computes them exactly. (log2 becomes CUDA's own function, without lg2.approx.) PTX ISA
9.1, section 9.7.3, gives these largest errors:

    ex2.approx.f32     2 ulp from the correctly rounded result
    div.full.f32       2 ulp
    rsqrt.approx.f32   a relative error of 2^-22.9

The unit below is a roundoff of fp32, a relative error of 2^-24; an ulp is one or two roundoffs.
"""

import torch
from torch import Tensor

EX2_ULP, DIV_ULP = 2.5, 2.0  # relative to the exact result
RSQRT = 2**1.1
ULP = 2.0
# exp(x) is ex2 of the rounded product of x and fp32's log2(e), which is 0.22 roundoffs off. Both
# errors shift the exponent, so |x| multiplies them.
EXP_SHIFT = 1.22


def sigmoid_error(x: Tensor) -> Tensor:
    """The largest error of 1 / (1 + exp(-x)) due to approximate exp and division."""
    x = x.double()
    of_exp = EX2_ULP * ULP + EXP_SHIFT * x.abs()
    return torch.sigmoid(-x) * of_exp + DIV_ULP * ULP  # sigmoid(-x): share of exp(-x) in the sum


def norm_error(relative_mean: Tensor | float = 0.0) -> Tensor | float:
    """The largest error of (s - mean) * rsqrt(sum / width): half the division's, due to the root.

    relative_mean: mean / deviation; a LayerNorm subtracts the mean, which has a division's error
    """
    return DIV_ULP * ULP / 2 + RSQRT + DIV_ULP * ULP * abs(relative_mean)
