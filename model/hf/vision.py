"""What vision towers of both libraries need to compute with our ops.

Their rotary embeddings return angles, which `vision_attention` computes itself. Patched ones return
the grid of the patches instead, an `Axial`, which only patched attentions read.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from kernels.activation import quick_gelu
from kernels.linear_quick_gelu import linear_quick_gelu
from kernels.norm import layer_norm
from kernels.runtime.dispatch import check
from kernels.runtime.grids import Grid
from kernels.vision_attention import vision_attention
from model.hf.parts import Module, check_activation, impl_of, is_plain


class Axial(NamedTuple):
    """Axial 2-D rotary of a view's patches, for `attend`."""

    grid: Grid
    theta: float


def attend(self: Module, qkv: Tensor, views: int, rotary: object) -> Tensor:
    """Attention within each of `views` views of one grid: [T, 3 * H * D] -> [T, H * D].

    self: the attention, with `num_heads`; rotary: what it was given by the rotary embedding
    """
    check(
        isinstance(rotary, Axial),
        "vision_attention: the attention is patched, but not the tower's rotary embedding; patch"
        " the whole tower",
    )
    assert isinstance(rotary, Axial)
    return vision_attention(
        qkv, [rotary.grid] * views, heads=self.num_heads, theta=rotary.theta, impl=impl_of(self)
    )


def norm(self: Module, x: Tensor) -> Tensor:
    """The forward of an nn.LayerNorm."""
    rows = x.reshape(-1, x.shape[-1])
    return layer_norm(rows, self.weight, self.bias, eps=self.eps, impl=impl_of(self)).view(x.shape)


def norm_of_sum(
    norm: Module, branch: Tensor, residual: Tensor, gamma: Tensor | None, impl: str | None
) -> tuple[Tensor, Tensor]:
    """residual + gamma * branch, normalised by an nn.LayerNorm, and not normalised."""
    y, total = layer_norm(
        branch.reshape(-1, branch.shape[-1]),
        norm.weight,
        norm.bias,
        eps=norm.eps,
        residual=residual.reshape(-1, branch.shape[-1]),
        gamma=gamma,
        impl=impl,
    )
    return y.view(branch.shape), total.view(branch.shape)


def expand(self: Module, x: Tensor) -> Tensor:
    """quick_gelu(self.fc1(x)), the first half of a feed-forward block."""
    rows, fc1 = x.reshape(-1, x.shape[-1]), self.fc1
    if is_plain(fc1) and fc1.bias is not None:
        y = linear_quick_gelu(rows, fc1.weight, fc1.bias, impl=impl_of(self))
    else:  # LoRA, quantised
        y = quick_gelu(fc1(rows), impl=impl_of(self))
    return y.view(*x.shape[:-1], -1)


def check_norm(module: Module) -> None:
    """Raises ValueError as `Part.check` does, for anything but an nn.LayerNorm with weights."""
    check(isinstance(module, nn.LayerNorm), f"it is {type(module).__name__}, not LayerNorm")
    check(len(module.normalized_shape) == 1, "it normalises more than the last axis")
    check(module.weight is not None and module.bias is not None, "it has no weight and bias")


def check_quick_gelu(act: nn.Module) -> None:
    """Raises ValueError as `Part.check` does, for another activation."""
    check_activation(act, lambda x: x * torch.sigmoid(1.702 * x), "quick_gelu")
