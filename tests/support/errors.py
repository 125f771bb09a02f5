"""The one measure of error, as a number to compare with a bound."""

from torch import Tensor

from bench.numerics import compare


def max_error(actual: Tensor, reference: Tensor) -> float:
    """Largest error relative to max(rms(reference), |reference|), as `bench.numerics` has it."""
    return compare(actual, reference).max
