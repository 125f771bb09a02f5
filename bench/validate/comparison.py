"""One result compared with its reference: errors, the worst element and a histogram."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bench.errors import Error, errors, excess, roundoff, summary

# Edges of a histogram's bins, in roundoffs of the result's dtype, half an octave apart. Two more
# bins hold errors below the first edge, mostly zeros, and beyond the last one, mostly wrong tokens
# and misplaced NaN.
EDGES = 2.0 ** np.arange(-4, 16.5, 0.5)


@dataclass(frozen=True)
class Comparison:
    """`index` is the worst element of the result called `name`, with values `got`, `expected`."""

    name: str
    error: Error
    allowed: Error | None  # None: not judged
    roundoff: float  # of the result's dtype; 0 for integers
    beyond_roundoff: float  # share of elements
    index: tuple[int, ...]
    got: float
    expected: float
    histogram: tuple[int, ...]

    @property
    def failure(self) -> str | None:
        """Which limit is exceeded, and the worst element; None if no limit is."""
        text = excess(self.error, self.allowed) if self.allowed else None
        where = f"{self.name}{list(self.index)} is {self.got!r}, not {self.expected!r}"
        return text and f"{text}: {where}"

    @property
    def limit_ratio(self) -> float:
        """The error as a multiple of the allowed error."""
        if self.allowed is None:
            return 0.0
        pairs = ((getattr(x, name) for x in (self.error, self.allowed)) for name in ("max", "rms"))
        return max(error / limit if limit else math.inf if error else 0 for error, limit in pairs)


def compare_result(
    name: str, result: Tensor, expected: Tensor, allowed: Error | None
) -> Comparison:
    """Compare one result; raises ValueError for a wrong shape or kind of number."""
    result, expected = result.cpu(), expected.cpu()
    element_errors = errors(result, expected)
    unit = roundoff(result.dtype) if result.is_floating_point() else 0.0
    valid = element_errors[~element_errors.isnan()]
    nonempty = element_errors.numel() > 0
    worst = int(element_errors.nan_to_num(-1, posinf=math.inf).argmax()) if nonempty else 0
    shape = element_errors.shape
    return Comparison(
        name=name,
        error=summary(element_errors),
        allowed=allowed,
        roundoff=unit,
        beyond_roundoff=float((valid > unit).double().mean()) if len(valid) else 0.0,
        index=tuple(int(i) for i in np.unravel_index(worst, shape)) if nonempty else (),
        got=result.flatten()[worst].item() if nonempty else math.nan,
        expected=expected.flatten()[worst].item() if nonempty else math.nan,
        histogram=_histogram(valid / unit),
    )


def fields(comparisons: Sequence[Comparison]) -> dict:
    """A row's fields: those of the result with the largest error relative to its limit; the
    histogram is over all results."""
    worst = max(comparisons, key=lambda comparison: comparison.limit_ratio)
    allowed = worst.allowed
    return {
        "result": worst.name,
        "max_err": _json(worst.error.max, None),
        "rms_err": _json(worst.error.rms, None),
        "max_allowed": allowed and allowed.max,
        "rms_allowed": allowed and allowed.rms,
        "roundoff": worst.roundoff,
        "beyond_roundoff": worst.beyond_roundoff,
        "worst_index": list(worst.index),
        "worst_got": _json(worst.got, str(worst.got)),
        "worst_expected": _json(worst.expected, str(worst.expected)),
        "histogram": np.sum([comparison.histogram for comparison in comparisons], axis=0).tolist(),
        "failure": worst.failure,
        "skipped": None,
    }


def empty_fields(*, failure: str | None = None, skipped: str | None = None) -> dict:
    """The fields of a row without a comparison, with the reason."""
    return dict.fromkeys(FIELDS) | {"failure": failure, "skipped": skipped}


FIELDS = (
    "result",
    "max_err",
    "rms_err",
    "max_allowed",
    "rms_allowed",
    "roundoff",
    "beyond_roundoff",
    "worst_index",
    "worst_got",
    "worst_expected",
    "histogram",
)


def _histogram(in_roundoffs: Tensor) -> tuple[int, ...]:
    """The number of errors in each bin. Integers have a roundoff of 0: a right one is 0 / 0, a
    wrong one 1 / 0."""
    edges = torch.from_numpy(EDGES)
    bins = torch.bucketize(in_roundoffs.nan_to_num(0.0, posinf=math.inf), edges, right=True)
    return tuple(torch.bincount(bins, minlength=len(EDGES) + 1).tolist())


def _json(value: float, otherwise: str | None) -> float | str | None:
    """The value, or `otherwise` for NaN and inf, which JSON lacks."""
    return value if math.isfinite(value) else otherwise
