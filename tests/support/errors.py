"""The maximum error, the number that tests compare with a bound."""

from torch import Tensor

from bench.errors import compare


def max_error(actual: Tensor, reference: Tensor) -> float:
    """Largest error relative to max(rms(reference), |reference|), as in `bench.errors`."""
    return compare(actual, reference).max
