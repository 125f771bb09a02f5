"""Cost models fitted to measured steps, for machines without a good roofline, such as a CPU.

Seconds of a step = a rising piecewise linear function of its rows + a constant for each sampled
row, token of KV read, pair of query and key, and segment; fitted to samples of (shape, seconds).
Segments count because attention on a CPU runs one matrix product per node length: eight prompts of
different lengths cost more than one that is eight times as long.
Seconds of the vision tower = a constant for each call, patch and pair of patches of a view.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pacore_sched.sim.cost_model import StepShape, StepWork
from pacore_sched.sim.vision.cost import VisionWork

MAX_KNOTS = 20  # of the piecewise linear function
ROUNDS = 6  # of reweighted fitting: enough for predictions to converge


@dataclass(frozen=True)
class FittedCost:
    """A CostModel fitted to measured steps. `row_seconds[i]` is for a step of `knots[i]` rows."""

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
        """Interpolates between knots and extrapolates the last line beyond them."""
        if rows <= self.knots[-1] or len(self.knots) == 1:
            return float(np.interp(rows, self.knots, self.row_seconds))
        (x0, x1), (y0, y1) = self.knots[-2:], self.row_seconds[-2:]
        return y1 + (rows - x1) * (y1 - y0) / (x1 - x0)


def fit(
    samples: Sequence[tuple[StepShape, float]], work: StepWork, shared_reads: bool = True
) -> FittedCost:
    """The cost model with the smallest sum of squared errors, relative to its own predictions.

    Relative to measured seconds, a slow outlier would count less than a fast one; as noise mostly
    makes steps slower, predicted sums of many steps would be too small.
    No coefficient is negative, and a step with more rows never takes less time. Raises ValueError
    without samples, and for one that is not above 0 seconds.
    """
    shapes, seconds = [shape for shape, _ in samples], _seconds(samples)
    rows = np.array([shape.rows for shape in shapes], dtype=float)
    knots = _knots(rows)
    reads = [s.kv_read if shared_reads else s.kv_read_unshared for s in shapes]
    others = [(s.sampled, read, s.pairs, s.segments) for s, read in zip(shapes, reads, strict=True)]
    columns = np.hstack([_ramps(rows, knots), np.array(others, dtype=float)])
    weights = _fitted_weights(columns, seconds)
    heights = np.cumsum(weights[: len(knots)])
    points = tuple(int(knot) for knot in knots), tuple(heights.tolist())
    sampled, kv_token, pair, segment = weights[len(knots) :].tolist()
    return FittedCost(work, *points, sampled, kv_token, pair, segment, shared_reads)


@dataclass(frozen=True)
class FittedVision:
    """A VisionCost fitted to measured calls of a tower and its projector."""

    work: VisionWork
    per_call: float
    per_patch: float
    per_pair: float

    def seconds(self, views: Sequence[int]) -> float:
        """As VisionCost.seconds."""
        return self.per_call + sum(n * (self.per_patch + n * self.per_pair) for n in views)


def fit_vision(samples: Sequence[tuple[Sequence[int], float]], work: VisionWork) -> FittedVision:
    """The cost model of (patches of each view, seconds) with the smallest errors, as in `fit`."""
    columns = [(1, sum(views), sum(n * n for n in views)) for views, _ in samples]
    weights = _fitted_weights(np.array(columns, dtype=float), _seconds(samples))
    return FittedVision(work, *weights.tolist())


def _seconds(samples: Sequence[tuple[object, float]]) -> np.ndarray:
    if not samples or any(seconds <= 0 for _, seconds in samples):
        raise ValueError("a cost model needs samples, all of more than 0 seconds")
    return np.array([seconds for _, seconds in samples])


def _fitted_weights(columns: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    predicted = seconds
    for _ in range(ROUNDS):
        weights = nonnegative_least_squares(columns / predicted[:, None], seconds / predicted)
        predicted = np.maximum(columns @ weights, seconds.min())
    return weights


def nonnegative_least_squares(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """x >= 0 that minimises |a x - b|, for a [m, n] and b [m], by Lawson and Hanson's algorithm."""
    scale = np.linalg.norm(a, axis=0)
    scale[scale == 0] = 1
    a = a / scale
    x = np.zeros(a.shape[1])
    free = np.zeros(a.shape[1], dtype=bool)  # the other entries of x are fixed at 0
    for _ in range(3 * a.shape[1]):
        slope = np.where(free, -np.inf, a.T @ (b - a @ x))
        if slope.max() <= 1e-10 * np.linalg.norm(b):
            break
        free[slope.argmax()] = True
        x = _solve_within(a, b, x, free)
    return x / scale


def _solve_within(a: np.ndarray, b: np.ndarray, x: np.ndarray, free: np.ndarray) -> np.ndarray:
    """Least squares over the `free` columns; columns that would turn negative leave that set."""
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
    """The measured numbers of rows; if there are too many, those nearest to a geometric sequence:
    steps of one and two rows may differ as much as steps of one hundred and two hundred."""
    counts = np.unique(rows)
    targets = np.geomspace(counts[0], counts[-1], MAX_KNOTS)
    nearest = np.abs(counts[:, None] - targets).argmin(axis=0)
    return counts if len(counts) <= MAX_KNOTS else counts[np.unique(nearest)]


def _ramps(rows: np.ndarray, knots: np.ndarray) -> np.ndarray:
    """Columns [samples, knots]: a column of ones, then for every interval between knots the share
    of it below the sample's rows, from 0 to 1. Sums with weights >= 0 are exactly the
    non-decreasing functions that are linear between knots."""
    passed = (rows[:, None] - knots[:-1]) / np.diff(knots)
    return np.column_stack([np.ones(len(rows)), passed.clip(0, 1)])
