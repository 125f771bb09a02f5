"""fp64 formulas that ops are judged by: they share neither code nor rounding with the ops.

One quantity stays in fp32, because the op defines it in fp32 and its rounding is no error of a
form: the u of suite/sample.py, whose rounding shifts the noise of the likeliest tokens by
thousandths.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.runtime.arithmetic import cdiv
from kernels.runtime.grids import Grid


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis."""
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def layer(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last axis."""
    var, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
    return (x - mean) / (var + eps).sqrt() * weight + bias


def logistic(x: Tensor) -> Tensor:
    """1 / (1 + e^-x)."""
    return 1 / (1 + (-x).exp())


def rope_half(x: Tensor, positions: Tensor, inv_freq: Tensor) -> Tensor:
    """x [T, H, D], elements i and i + D/2 as a complex number, turned by position * inv_freq
    radians."""
    angle = (positions[:, None].double() * inv_freq.double())[:, None]
    z = torch.complex(*x.chunk(2, -1)) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([z.real, z.imag], -1)


def rope_axial(x: Tensor, grid: Grid, theta: float) -> Tensor:
    """x [tokens, H, D] of a view: pairs (2i, 2i + 1), turned by column in the first half of a
    head and by row in the second."""
    token, dim = torch.arange(len(x)), x.shape[-1]
    frequency = theta ** (-4 / dim * torch.arange(dim // 4, dtype=torch.float64))
    positions = torch.stack([token % grid[1], token // grid[1]], 1)  # [tokens, 2]
    angle = (positions[..., None] * frequency).flatten(1)[:, None]  # [tokens, 1, D / 2]
    z = torch.complex(x[..., 0::2], x[..., 1::2]) * torch.polar(torch.ones_like(angle), angle)
    return torch.view_as_real(z).flatten(-2)


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, seen: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """q [T, Hq, D] over k, v [tokens, Hkv, D]: out [T, Hq, D] and log-sum-exp [T, Hq].

    seen: bool [T, tokens]; None: every row sees all tokens
    """
    grouped = q.unflatten(1, (k.shape[1], -1))
    scores = torch.einsum("rkgd,tkd->rkgt", grouped, k) * scale
    if seen is not None:
        scores = scores.masked_fill(~seen[:, None, None], -torch.inf)
    top = scores.amax(-1, keepdim=True)
    weights = (scores - top).exp()
    total = weights.sum(-1, keepdim=True)
    out = torch.einsum("rkgt,tkd->rkgd", weights / total, v)
    return out.flatten(1, 2), (top + total.log())[..., 0].flatten(1)


def convolve(image: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """3x3, stride 2, padding 1, by unfolding: [C, R, S] -> [C', ceil(R / 2), ceil(S / 2)]."""
    patches = F.unfold(image[None], 3, padding=1, stride=2)[0]  # [C * 9, positions]
    result = weight.flatten(1) @ patches + bias[:, None]
    return result.unflatten(1, [cdiv(side, 2) for side in image.shape[1:]])


def downsample(x: Tensor, grid: Grid, *convolutions: tuple[Tensor, Tensor]) -> Tensor:
    """A view's tokens [rows * columns, C] after convolutions, as tokens again."""
    image = x.T.unflatten(1, grid)
    for weight, bias in convolutions:
        image = convolve(image, weight, bias)
    return image.flatten(1).T


def split_views(x: Tensor, grids: Sequence[Grid]) -> Iterator[tuple[Tensor, Grid]]:
    """The tokens of each view, and its grid."""
    return zip(x.split([rows * columns for rows, columns in grids]), grids, strict=True)
