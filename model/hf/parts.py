"""What a family of models tells `patch`: which of its modules compute with our ops, and how."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from kernels.runtime.dispatch import check

Module = Any  # an nn.Module of a library, whose attributes have no types here


def _anything(module: nn.Module) -> None:
    """The check of modules whose every setting is supported."""


def _no_buffers(module: nn.Module) -> dict[str, Tensor]:
    """For a `forward` that needs the module's own tensors only."""
    return {}


@dataclass(frozen=True)
class Part:
    """A class of modules that can compute with one of our ops.

    op: its name
    forward: the new forward, called as forward(module, *arguments of the old one)
    check: raises ValueError with what is not supported about a module, as a clause: "its
        activation GELU is not silu"
    buffers: further tensors that the new forward reads, by name; the module gets them as buffers
        that are not saved, under BUFFER + name
    method: the method that `forward` replaces
    """

    op: str
    forward: Callable
    check: Callable[[nn.Module], None] = _anything
    buffers: Callable[[nn.Module], dict[str, Tensor]] = _no_buffers
    method: str = "forward"


@dataclass(frozen=True)
class Family:
    """Models of one library module, such as transformers.models.qwen3.modeling_qwen3.

    parts: class name -> how it is patched; "class.attribute": the same for a module of PyTorch's
        own, by its place
    others: names of its classes that stay as they are and contain parts or need none
    """

    module: str
    parts: dict[str, Part]
    others: frozenset[str] = frozenset()


BUFFER = "pacore_"


def impl_of(module: nn.Module) -> str | None:
    """The implementation with which `patch` was called for this module."""
    impl = module.pacore_impl
    assert impl is None or isinstance(impl, str)
    return impl


def joined(x: Tensor, *layers: nn.Module) -> Tensor:
    """The results of linear layers side by side: x [..., K] -> [T, N1 + N2 + ...]."""
    rows = x.reshape(-1, x.shape[-1])
    plain = [layer for layer in layers if is_plain(layer)]
    # out= records no gradients, without which ops could not refuse them.
    out_works = not (torch.is_grad_enabled() or torch.compiler.is_compiling())
    if len(plain) < len(layers) or not out_works:
        return torch.cat([layer(rows) for layer in layers], dim=1)
    widths = [layer.out_features for layer in plain]
    out = rows.new_empty(len(rows), sum(widths))
    for part, layer in zip(out.split(widths, dim=1), plain, strict=True):
        if layer.bias is None:
            torch.mm(rows, layer.weight.T, out=part)
        else:
            torch.addmm(layer.bias, rows, layer.weight.T, out=part)
    return out


def is_plain(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a layer is its weight and bias: not LoRA's or a quantised one, and without hooks."""
    return (
        type(layer) is nn.Linear
        and type(layer.weight) is nn.Parameter  # quantised ones may be of another class
        and not (layer._forward_hooks or layer._forward_pre_hooks)
        and "forward" not in layer.__dict__
    )


def check_activation(act: nn.Module, expected: Callable[[Tensor], Tensor], name: str) -> None:
    """Raise ValueError as `Part.check` does, if an activation computes something else.

    Libraries have activations under several names, so the values decide.
    """
    x = torch.linspace(-4, 4, 17)
    same = torch.allclose(act(x), expected(x), atol=1e-5)
    check(same, f"its activation {type(act).__name__} is not {name}")
