"""A cost model from measured steps, for machines that no roofline describes well, such as a CPU.

Seconds of a step = a rising piecewise linear function of its rows + a constant per row that is
sampled, per token of KV read, per pair of query and key, and per segment; fitted to samples of
(shape, seconds). Segments, because attention on a CPU makes a product for every length of node:
eight prompts of different lengths cost more than one that is eight times as long.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pacore_sched.sim.cost_model import StepShape, StepWork

MAX_KNOTS = 20  # of the function of the rows
ROUNDS = 6  # of fitting, in which predictions settle


@dataclass(frozen=True)
class FittedCost:
    """Measured steps as a CostModel. `row_seconds[i]` belongs to a step of `knots[i]` rows."""

    work: StepWork
    knots: tuple[int, ...]
    row_seconds: tuple[float, ...]
    per_sampled: float
    per_kv_token: float
    per_pair: float
    per_segment: float = 0.0
    shared_reads: bool = True

    def seconds(self, shape: StepShape, steps: int = 1) -> float:
        """As CostModel.seconds, in closed form."""
        read = shape.kv_read if self.shared_reads else shape.kv_read_unshared
        first = self._linear(shape.rows) + self.per_sampled * shape.sampled
        first += self.per_kv_token * read + self.per_pair * shape.pairs
        first += self.per_segment * shape.segments
        growth = shape.rows * (self.per_kv_token + self.per_pair)
        return steps * first + growth * (steps * (steps - 1) / 2)

    def _linear(self, rows: int) -> float:
        """Between knots by interpolation, beyond the last one along the last line."""
        if rows <= self.knots[-1] or len(self.knots) == 1:
            return float(np.interp(rows, self.knots, self.row_seconds))
        (x0, x1), (y0, y1) = self.knots[-2:], self.row_seconds[-2:]
        return y1 + (rows - x1) * (y1 - y0) / (x1 - x0)


def fit(
    samples: Sequence[tuple[StepShape, float]], work: StepWork, shared_reads: bool = True
) -> FittedCost:
    """The cost model with the least sum of squared errors over `samples`, relative to itself.

    Relative to what it predicts, not to what was measured, for noise that is mostly upward: a slow
    outlier would count for less than a fast one, and sums of many steps come out too short.
    No coefficient is negative, and a step of more rows never takes less time. Raises ValueError
    without samples, and for one that took no time.
    """
    if not samples or any(seconds <= 0 for _, seconds in samples):
        raise ValueError("a cost model is fitted to steps that took some time")
    shapes = [shape for shape, _ in samples]
    seconds = np.array([seconds for _, seconds in samples])
    rows = np.array([shape.rows for shape in shapes], dtype=float)
    knots = _knots(rows)
    reads = [s.kv_read if shared_reads else s.kv_read_unshared for s in shapes]
    others = [(s.sampled, read, s.pairs, s.segments) for s, read in zip(shapes, reads, strict=True)]
    columns = np.hstack([_ramps(rows, knots), np.array(others, dtype=float)])
    predicted = seconds
    for _ in range(ROUNDS):
        weights = nonnegative_least_squares(columns / predicted[:, None], seconds / predicted)
        predicted = np.maximum(columns @ weights, seconds.min())
    heights = np.cumsum(weights[: len(knots)])
    points = tuple(int(knot) for knot in knots), tuple(heights.tolist())
    sampled, kv_token, pair, segment = weights[len(knots) :].tolist()
    return FittedCost(work, *points, sampled, kv_token, pair, segment, shared_reads)


def nonnegative_least_squares(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """x >= 0 that minimises |a x - b|, for a [m, n] and b [m], by Lawson and Hanson's algorithm."""
    scale = np.linalg.norm(a, axis=0)
    scale[scale == 0] = 1
    a = a / scale
    x = np.zeros(a.shape[1])
    free = np.zeros(a.shape[1], dtype=bool)  # the others are held at 0
    for _ in range(3 * a.shape[1]):
        slope = np.where(free, -np.inf, a.T @ (b - a @ x))
        if slope.max() <= 1e-10 * np.linalg.norm(b):
            break
        free[slope.argmax()] = True
        x = _solve_within(a, b, x, free)
    return x / scale


def _solve_within(a: np.ndarray, b: np.ndarray, x: np.ndarray, free: np.ndarray) -> np.ndarray:
    """Least squares over the `free` columns; those that would turn negative are freed no more."""
    while free.any():
        best = np.zeros_like(x)
        best[free] = np.linalg.lstsq(a[:, free], b, rcond=None)[0]
        falling = free & (best <= 0)
        if not falling.any():
            return best
        x = x + np.min(x[falling] / (x[falling] - best[falling])) * (best - x)
        free &= x > 1e-12
        x = np.where(free, x, 0.0)
    return np.zeros_like(x)


def _knots(rows: np.ndarray) -> np.ndarray:
    """Numbers of rows that were measured: of many, those nearest to equal ratios, because a step of
    two rows may differ from one of a single row as much as one of two hundred from one hundred."""
    found = np.unique(rows)
    wanted = np.geomspace(found[0], found[-1], MAX_KNOTS)
    nearest = np.abs(found[:, None] - wanted).argmin(axis=0)
    return found if len(found) <= MAX_KNOTS else found[np.unique(nearest)]


def _ramps(rows: np.ndarray, knots: np.ndarray) -> np.ndarray:
    """Columns [samples, knots]: one of ones, and for every stretch between knots how far it is
    passed, from 0 to 1. Sums with weights >= 0 are the rising functions that are linear between."""
    passed = (rows[:, None] - knots[:-1]) / np.diff(knots)
    return np.column_stack([np.ones(len(rows)), passed.clip(0, 1)])
