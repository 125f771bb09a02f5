"""The statistic of `bench compare`: when a slow-down exceeds run-to-run variation.

A and B are run alternately, A B B A A B ...; neighbouring runs of A and B form a pair, and each
pair gives one log ratio, B over A. Drift of the machine is slow compared with a pair and nearly
cancels; the remainder changes sign with the order of the pair, which alternates. A burst of other
load spoils one pair, an outlier that hardly moves the median of the log ratios (the centre).

B is slower if

- the centre exceeds the margin: the larger of the threshold and ERRORS standard errors of the
  centre. The standard error comes from the spread, 1.4826 times the median absolute deviation of
  the log ratios (one standard deviation of a normal distribution): how much both sides' runs vary
  from one to the next, apart from drift;
- and nearly all pairs agree: at least AGREE of them (85 %, so 9 of 10) exceed the threshold.

B is faster by the same rule with the sign reversed. A centre beyond the threshold that meets
neither rule is "unclear". Noise alone rarely meets both conditions, but an effect that lasts as
long as a process can, such as its memory layout. So `bench compare` takes a first verdict only as a
reason to measure again, with twice as many pairs, in two new processes, and the second measurement
alone decides; what is then unclear is measured a third time, in four processes. Of synthetic rows
of a busy machine (tests/bench/test_compare.py), 0 of 32,000 equal ones were reported as changed;
1,574 of 1,600 rows with twice the time and 1,544 of 1,600 with 1.5 times were found.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

ERRORS = 3.6
SPREADS = 2.0  # the margin of recorded rows, which were not run alternately
AGREE = 0.85
MAD_TO_STD = 1.4826  # standard deviation / median absolute deviation of a normal distribution
MEDIAN_ERROR = 1.2533  # of the median of n normal numbers, in standard deviations / sqrt(n)
P80 = 0.8416  # the 80th percentile of a normal distribution, in standard deviations

Pair = tuple[float, float]  # neighbouring runs of A and of B


@dataclass(frozen=True)
class Change:
    """`ratio` is B over A; `verdict` is "slower", "faster", "same" or "unclear"."""

    ratio: float
    margin: float
    agreeing: int | None  # of `pairs`; None for rows that were not run alternately
    pairs: int | None
    verdict: str


def judge_pairs(pairs: Sequence[Pair], threshold: float) -> Change:
    """Judge neighbouring runs; `threshold` is the smallest change to report, 0.1 for 10 %."""
    logs = [math.log(b / a) for a, b in pairs]
    centre = median(logs)
    spread = MAD_TO_STD * median(abs(value - centre) for value in logs)
    min_change, sign = math.log1p(threshold), math.copysign(1, centre)
    agreeing = sum(sign * value > min_change for value in logs)
    margin = max(min_change, ERRORS * MEDIAN_ERROR * spread / math.sqrt(len(logs)))
    significant = abs(centre) > margin and agreeing >= AGREE * len(logs)
    return Change(
        math.exp(centre),
        math.exp(margin),
        agreeing,
        len(logs),
        _verdict(centre, min_change, significant),
    )


def judge_rows(a: Sequence[dict], b: Sequence[dict], threshold: float) -> Change:
    """Judge recorded rows of one case, which were not run alternately.

    The spread is that of repeated rows, or that between the percentiles of a single row, which
    excludes what changes from run to run.
    """
    centre = _centre(b) - _centre(a)
    min_change = math.log1p(threshold)
    margin = max(min_change, SPREADS * math.hypot(_spread(a), _spread(b)))
    verdict = _verdict(centre, min_change, abs(centre) > margin)
    return Change(math.exp(centre), math.exp(margin), None, None, verdict)


def _verdict(centre: float, min_change: float, significant: bool) -> str:
    if significant:
        return "slower" if centre > 0 else "faster"
    return "unclear" if abs(centre) > min_change else "same"


def _centre(rows: Sequence[dict]) -> float:
    return median(math.log(row["median_us"]) for row in rows)


def _spread(rows: Sequence[dict]) -> float:
    if len(rows) == 1:
        return math.log(rows[0]["p80_us"] / rows[0]["p20_us"]) / (2 * P80)
    centre = _centre(rows)
    return MAD_TO_STD * median(abs(math.log(row["median_us"]) - centre) for row in rows)
