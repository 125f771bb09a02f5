"""Norms and activations as operators; each op with a residual is an operator of its own."""

from torch import Tensor

from kernels import activation, norm
from kernels import linear_quick_gelu as block
from kernels.torch_ops.registration import torch_op


def _like(x: Tensor, *_: object, **__: object) -> Tensor:
    return x.new_empty(x.shape)


def _two_like(x: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _half(gate_up: Tensor, *_: object, **__: object) -> Tensor:
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


def _product(x: Tensor, weight: Tensor, *_: object, **__: object) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@torch_op(_like)
def rms_norm(x: Tensor, weight: Tensor, eps: float, impl: str | None = None) -> Tensor:
    """`norm.rms_norm` of x [T, C]."""
    return norm.rms_norm(x, weight, eps=eps, impl=impl)


@torch_op(_two_like)
def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, impl: str | None = None
) -> tuple[Tensor, Tensor]:
    """`norm.rms_norm` of x + residual, and that sum."""
    return norm.rms_norm(x, weight, eps=eps, residual=residual, impl=impl)


@torch_op(_like)
def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, impl: str | None = None
) -> Tensor:
    """`norm.layer_norm` of x [T, C]."""
    return norm.layer_norm(x, weight, bias, eps=eps, impl=impl)


@torch_op(_two_like)
def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    gamma: Tensor | None,
    eps: float,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`norm.layer_norm` of residual + gamma * x, and that sum."""
    return norm.layer_norm(x, weight, bias, eps=eps, residual=residual, gamma=gamma, impl=impl)


@torch_op(_half)
def silu_mul(gate_up: Tensor, interleaved: bool = False, impl: str | None = None) -> Tensor:
    """`activation.silu_mul`: [T, 2F] -> [T, F]."""
    return activation.silu_mul(gate_up, interleaved=interleaved, impl=impl)


@torch_op(_like)
def quick_gelu(x: Tensor, impl: str | None = None) -> Tensor:
    """`activation.quick_gelu` of x [T, F]."""
    return activation.quick_gelu(x, impl=impl)


@torch_op(_product)
def linear_quick_gelu(
    x: Tensor, weight: Tensor, bias: Tensor, fused: bool | None = None, impl: str | None = None
) -> Tensor:
    """`linear_quick_gelu.linear_quick_gelu`: x [T, C] -> [T, F]."""
    return block.linear_quick_gelu(x, weight, bias, fused=fused, impl=impl)
