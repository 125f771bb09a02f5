"""One result beside its reference: its errors, where the worst one is, and how they spread."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bench.numerics import Error, errors, excess, roundoff, summary

# A histogram's bins, in roundoffs of the result's dtype: what is below the first edge, zero above
# all, half octaves, and what is beyond the last edge, wrong tokens and misplaced NaN above all.
EDGES = 2.0 ** np.arange(-4, 16.5, 0.5)


@dataclass(frozen=True)
class Comparison:
    """`expected` and `got` stand at `index` of the result called `name`, where it is worst."""

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
        """What exceeds what is allowed, and where."""
        text = excess(self.error, self.allowed) if self.allowed else None
        where = f"{self.name}{list(self.index)} is {self.got!r}, not {self.expected!r}"
        return text and f"{text}: {where}"

    @property
    def strain(self) -> float:
        """The error as a multiple of what is allowed."""
        if self.allowed is None:
            return 0.0
        pairs = ((getattr(x, name) for x in (self.error, self.allowed)) for name in ("max", "rms"))
        return max(error / limit if limit else math.inf if error else 0 for error, limit in pairs)


def compared(name: str, result: Tensor, expected: Tensor, allowed: Error | None) -> Comparison:
    """Compare one result; raises ValueError for a wrong shape or kind of number."""
    result, expected = result.cpu(), expected.cpu()
    found = errors(result, expected)
    unit = roundoff(result.dtype) if result.is_floating_point() else 0.0
    counted = found[~found.isnan()]
    place = int(found.nan_to_num(-1, posinf=math.inf).argmax()) if found.numel() else 0
    some = found.numel() > 0
    return Comparison(
        name=name,
        error=summary(found),
        allowed=allowed,
        roundoff=unit,
        beyond_roundoff=float((counted > unit).double().mean()) if len(counted) else 0.0,
        index=tuple(int(i) for i in np.unravel_index(place, found.shape)) if some else (),
        got=result.flatten()[place].item() if some else math.nan,
        expected=expected.flatten()[place].item() if some else math.nan,
        histogram=_counts(counted / unit),
    )


def fields(comparisons: Sequence[Comparison]) -> dict:
    """A row's fields: of the result that comes nearest to what it is allowed, or exceeds it most;
    the histogram is of all results."""
    worst = max(comparisons, key=lambda one: one.strain)
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
        "histogram": np.sum([one.histogram for one in comparisons], axis=0).tolist(),
        "failure": worst.failure,
        "skipped": None,
    }


def nothing(*, failure: str | None = None, skipped: str | None = None) -> dict:
    """The fields of a row without a comparison, and why there is none."""
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


def _counts(in_roundoffs: Tensor) -> tuple[int, ...]:
    """How many errors lie in each bin; of integers, 0 / 0 is right and 1 / 0 wrong."""
    edges = torch.from_numpy(EDGES)
    bins = torch.bucketize(in_roundoffs.nan_to_num(0.0, posinf=math.inf), edges, right=True)
    return tuple(torch.bincount(bins, minlength=len(EDGES) + 1).tolist())


def _json(value: float, otherwise: str | None) -> float | str | None:
    """JSON has no NaN and no inf."""
    return value if math.isfinite(value) else otherwise
