"""The one measure of error in all tests: relative to the size of the reference."""

import torch
from torch import Tensor


def max_error(actual: Tensor, reference: Tensor) -> float:
    """Largest |actual - reference| / max(rms(reference), |reference|); inf and NaN must match."""
    actual, reference = actual.double(), reference.double()
    if not torch.equal(actual.isfinite(), reference.isfinite()):
        return float("inf")
    finite = reference.isfinite()
    if not torch.equal(actual[~finite].nan_to_num(), reference[~finite].nan_to_num()):
        return float("inf")
    actual, reference = actual[finite], reference[finite]
    if reference.numel() == 0:
        return 0.0
    size = reference.abs().clamp_min(reference.square().mean().sqrt())
    return (
        ((actual - reference).abs() / size.clamp_min(torch.finfo(torch.float64).tiny)).max().item()
    )
