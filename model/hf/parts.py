"""What a family of models tells `patch`: which of its modules compute with our ops, and how."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


def _anything(module: nn.Module) -> None:
    """The check of modules whose every setting is supported."""


@dataclass(frozen=True)
class Part:
    """A class of modules that can compute with one of our ops.

    op: its name
    forward: the new forward, called as forward(module, *arguments of the old one)
    check: raises ValueError with what is not supported about a module, as a clause: "hidden_act is
        'gelu', not 'silu'"
    method: the method that `forward` replaces
    """

    op: str
    forward: Callable
    check: Callable[[nn.Module], None] = _anything
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
    others: frozenset[str] = field(default_factory=frozenset)


def impl_of(module: nn.Module) -> str | None:
    """The implementation with which `patch` was called for this module."""
    impl = module.pacore_impl
    assert impl is None or isinstance(impl, str)
    return impl


def linear_into(out: Tensor, x: Tensor, layer: nn.Module) -> None:
    """Write layer(x) to `out`: x [T, K], out [T, N] with any row stride."""
    plain = type(layer) is nn.Linear and not torch.is_grad_enabled() and not x.is_meta
    if plain and layer.bias is None:
        torch.mm(x, layer.weight.T, out=out)
    elif plain:
        torch.addmm(layer.bias, x, layer.weight.T, out=out)
    else:  # LoRA, quantised
        out.copy_(layer(x))
