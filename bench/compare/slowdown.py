"""When a slow-down is more than run-to-run spread: the statistic of `bench compare`.

Two sides take turns, A B B A A B ...; a run of one and its neighbour of the other make a pair, and
each pair gives one log ratio, B over A. Drift of the machine is slow against a pair and leaves it;
what is left of it grows and falls with the order of the pair, which alternates. A burst spoils the
pair it falls into, an outlier that the median of the log ratios, the centre, does not follow.

B is slower if

- the centre is above the margin: the larger of the threshold and ERRORS standard errors of the
  centre. These come from the spread, 1.4826 times the median absolute deviation of the log ratios
  (one standard deviation, were they normal): by how much both sides' runs differ from one to the
  next, drift aside;
- and nearly all pairs say so: AGREE of them, 9 of 10, are above the threshold themselves.

Faster is the same the other way round. A centre beyond the threshold that is not enough for either
is "unclear". Noise alone hardly does both. What could is what stays as long as a process does, as
where its memory lies: so `bench compare` takes a first finding as no more than a reason to measure
again, twice as often, in two new processes, and judges by the second measurement alone, in which
the luck of the first has no part; what is unclear then is left to a third, in four. Of synthetic
rows of a busy machine (tests/bench/test_compare.py) none of 32,000 equal ones was told apart; 1,574
of 1,600 doublings were, and 1,544 of 1,600 rows half as slow again.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

ERRORS = 3.6
SPREADS = 2.0  # of rows that have not been measured in turns
AGREE = 0.85
NORMAL = 1.4826  # standard deviations in a median absolute deviation
MEDIAN_ERROR = 1.2533  # of the median of n normal numbers, in standard deviations / sqrt(n)
P80 = 0.8416  # the 80th percentile of a normal distribution, in standard deviations

Pair = tuple[float, float]  # neighbouring runs of A and of B


@dataclass(frozen=True)
class Change:
    """`ratio` is B over A; `verdict` is "slower", "faster", "same" or "unclear"."""

    ratio: float
    margin: float
    agreeing: int | None  # pairs, of `pairs`; None for rows that were not measured in turns
    pairs: int | None
    verdict: str


def judged(pairs: Sequence[Pair], threshold: float) -> Change:
    """Judge neighbouring runs; `threshold` is the smallest slow-down that counts, 0.1 for 10 %."""
    logs = [math.log(b / a) for a, b in pairs]
    centre = median(logs)
    spread = NORMAL * median(abs(value - centre) for value in logs)
    least, sign = math.log1p(threshold), math.copysign(1, centre)
    agreeing = sum(sign * value > least for value in logs)
    margin = max(least, ERRORS * MEDIAN_ERROR * spread / math.sqrt(len(logs)))
    settled = abs(centre) > margin and agreeing >= AGREE * len(logs)
    return Change(
        math.exp(centre), math.exp(margin), agreeing, len(logs), _verdict(centre, least, settled)
    )


def unpaired(a: Sequence[dict], b: Sequence[dict], threshold: float) -> Change:
    """Judge recorded rows of one case, which have not been measured in turns.

    The spread is that of repeated rows, or that between a single row's percentiles, which says
    less: it knows nothing of what changes from run to run.
    """
    centre = _centre(b) - _centre(a)
    least = math.log1p(threshold)
    margin = max(least, SPREADS * math.hypot(_spread(a), _spread(b)))
    verdict = _verdict(centre, least, abs(centre) > margin)
    return Change(math.exp(centre), math.exp(margin), None, None, verdict)


def _verdict(centre: float, least: float, settled: bool) -> str:
    if settled:
        return "slower" if centre > 0 else "faster"
    return "unclear" if abs(centre) > least else "same"


def _centre(rows: Sequence[dict]) -> float:
    return median(math.log(row["median_us"]) for row in rows)


def _spread(rows: Sequence[dict]) -> float:
    if len(rows) == 1:
        return math.log(rows[0]["p80_us"] / rows[0]["p20_us"]) / (2 * P80)
    centre = _centre(rows)
    return NORMAL * median(abs(math.log(row["median_us"]) - centre) for row in rows)
