"""Liger's Triton kernels, called as Liger's modules do. Written against liger-kernel 0.8.5."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bench.peers.peer import Library, Unavailable, distribution, halves, imported, on_gpu


def rms_norm(inputs: dict) -> Callable[[], object]:
    """RMS norm with the residual add, if there is one, in one launch."""
    x, weight, residual, eps = (inputs[name] for name in ("x", "weight", "residual", "eps"))
    if residual is None:
        return partial(_function("LigerRMSNormFunction", x), x, weight, eps)
    return partial(_function("LigerFusedAddRMSNormFunction", x), x, residual, weight, eps)


def layer_norm(inputs: dict) -> Callable[[], object]:
    """Layer norm. Liger does not fuse the residual add, so PyTorch does it in a launch before."""
    x, weight, bias, residual, gamma, eps = (
        inputs[name] for name in ("x", "weight", "bias", "residual", "gamma", "eps")
    )
    norm = _function("LigerLayerNormFunction", x)
    if residual is None:
        return partial(norm, x, weight, bias, eps)

    def call() -> tuple[object, Tensor]:
        total = residual + x if gamma is None else torch.addcmul(residual, gamma, x)
        return norm(total, weight, bias, eps), total

    return call


def silu_mul(inputs: dict) -> Callable[[], object]:
    """SiLU of gate times up, given as halves of one tensor, as in the op."""
    gate_up = halves(inputs)
    return partial(_function("LigerFusedGateUpSiLUMulFunction", gate_up), gate_up)


def check(device: torch.device) -> object:
    """Liger's operators; raises Unavailable without them or without a GPU."""
    on_gpu(device)
    return imported("liger_kernel.ops")


def _function(name: str, x: Tensor) -> Callable[..., object]:
    function = getattr(check(x.device), name, None)
    if function is None:
        raise Unavailable(f"this version has no {name}")
    return function.apply


LIGER = Library(
    "Liger",
    "pip install liger-kernel==0.8.5",
    distribution("liger-kernel"),
    check,
)
