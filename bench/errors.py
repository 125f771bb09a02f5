"""Errors of results, relative to max(rms(reference), |reference|).

A large value does not hide the error of a small one, and a small one need not have more correct
digits than its neighbours.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Error:
    """Largest and root-mean-square relative error."""

    max: float
    rms: float


def roundoff(dtype: torch.dtype) -> float:
    """The largest relative error of rounding to a float `dtype`."""
    return torch.finfo(dtype).eps / 2


def excess(error: Error, allowed: Error) -> str | None:
    """By how much `error` exceeds `allowed`, as text, or None."""
    for name in ("max", "rms"):
        value, limit = getattr(error, name), getattr(allowed, name)
        if not value <= limit:
            return f"{name} error {value:.2e} exceeds {limit:.2e}"
    return None


def compare(result: Tensor, expected: Tensor) -> Error:
    """The error of one result; raises ValueError as `errors` does."""
    return summary(errors(result, expected))


def errors(result: Tensor, expected: Tensor) -> Tensor:
    """The error of each element, fp64 in the result's shape; an integer's is 0 if right, else 1.

    NaN where both are NaN or both the same infinity, inf where only one of them is. Raises
    ValueError for a wrong shape, and for integers where floats are expected or vice versa.
    """
    if result.shape != expected.shape:
        raise ValueError(f"result of shape {list(result.shape)}, expected {list(expected.shape)}")
    if result.is_floating_point() != expected.is_floating_point():
        raise ValueError(f"result is {result.dtype}, expected {expected.dtype}")
    if not expected.is_floating_point():
        return (result != expected).double()
    result, expected = result.double(), expected.double()
    finite = expected.isfinite()
    squares = expected.square().where(finite, 0)
    rms = (squares.sum() / finite.sum()).sqrt()
    scale = expected.abs().clamp_min(rms).clamp_min(torch.finfo(torch.float64).tiny)
    relative = ((result - expected).abs() / scale).where(finite, torch.nan)
    misplaced = [special(result) != special(expected) for special in _SPECIAL]
    return relative.masked_fill(torch.stack(misplaced).any(0), torch.inf)


def summary(errors: Tensor) -> Error:
    """Largest and root-mean-square of `errors`, ignoring NaN."""
    errors = errors[~errors.isnan()]
    if not errors.numel():
        return Error(0.0, 0.0)
    return Error(float(errors.max()), float(errors.square().mean().sqrt()))


_SPECIAL: tuple[Callable[[Tensor], Tensor], ...] = (torch.isnan, torch.isposinf, torch.isneginf)
