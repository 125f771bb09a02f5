"""Least-squares fit of t = fixed cost + bytes / rate. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean


@dataclass(frozen=True)
class Line:
    """t = start_us + bytes / rate"""

    start_us: float
    gb_s: float  # the rate, 1e9 bytes per second


def fit(points: Sequence[tuple[float, float]]) -> Line | None:
    """The least-squares line through points of (bytes, microseconds).

    None if there is no rate: fewer than two different numbers of bytes, or times that do not grow
    with them.
    """
    if len({num_bytes for num_bytes, _ in points}) < 2:
        return None
    mean_bytes, mean_us = fmean(b for b, _ in points), fmean(us for _, us in points)
    covariance = sum((b - mean_bytes) * (us - mean_us) for b, us in points)
    slope = covariance / sum((b - mean_bytes) ** 2 for b, _ in points)  # microseconds per byte
    return Line(mean_us - slope * mean_bytes, 1e-3 / slope) if slope > 0 else None
