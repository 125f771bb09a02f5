"""Minimum speed-ups of the portable forms on a CPU: `python -m bench gate`.

Each ratio compares two forms that are timed alternately in one run, on one thread: with several
threads on a shared machine, parallel regions wait for threads that are not running, and every form
takes as long as the wait. The minimums are well below all measured ratios, so that a ratio
falls below its minimum only if the form has lost its purpose. Such a ratio is measured again after
all others, when what disturbed it may be over. Exit code 1 if it is below twice, or if a form's
numbers are wrong.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch

from bench.measure.devices import MAIN_DTYPE
from bench.measure.ops import time_case
from bench.measure.origin import origin
from bench.rows import show
from bench.suite import cases
from model.terminal import track

CPU = torch.device("cpu")
BUDGET_S = 1.0  # for all forms of a case together
BIG, SMALL = "B16 P2048 S128", "smollm2 B16 P1500 S64"
PHOTO = "4x 8x8 + 1x 12x12"


@dataclass(frozen=True)
class MinSpeedup:
    """The time of form `over` divided by the portable form's must be at least `minimum`.

    `recorded` is the ratio in profiles/results/amd-epyc-avx512-2-threads/bench.jsonl, with two
    threads; `seen` is the lowest and the highest of three runs of this command on the same machine.
    """

    op: str
    case: str
    over: str
    recorded: float
    seen: tuple[float, float]
    minimum: float


MIN_SPEEDUPS = (
    MinSpeedup("prefix_attention", BIG, "eager", 22.6, (30.4, 32.0), 12),
    MinSpeedup("prefix_attention", BIG, "sdpa", 5.3, (7.0, 8.2), 3.5),
    MinSpeedup("prefix_attention", SMALL, "eager", 8.4, (8.8, 9.0), 6),
    MinSpeedup("prefix_attention", SMALL, "sdpa", 2.4, (3.5, 3.7), 1.6),
    MinSpeedup("prefix_attention", "prefill 128 behind 896", "sdpa", 1.45, (1.79, 1.85), 0.9),
    MinSpeedup("sample", "B16 V49152 k20 p0.95", "eager", 4.7, (6.3, 6.5), 3),
    MinSpeedup("vision_attention", f"{PHOTO} H2 D96", "eager", 1.28, (1.13, 1.14), 1.0),
    MinSpeedup("projector", f"{PHOTO} C192", "eager", 2.08, (2.11, 2.19), 1.2),
    MinSpeedup("layer_norm", "T1296 C1536", "eager", 2.18, (2.25, 2.30), 1.5),
    MinSpeedup("silu_mul", "T256 F12288", "eager", 1.67, (1.48, 1.51), 1.1),
)
CASES = len({(minimum.op, minimum.case) for minimum in MIN_SPEEDUPS})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--json", action="store_true", help="print one JSON document, no table")


def run(options: argparse.Namespace) -> int:
    """Measure and print; returns 1 if a ratio is below its minimum."""
    rows = [row for case_rows in track(measure(MIN_SPEEDUPS), "gate", CASES) for row in case_rows]
    if options.json:
        print(json.dumps({"rows": rows}))
    else:
        show.gate(rows)
    return int(any(row["failure"] for row in rows))


def measure(minimums: Sequence[MinSpeedup]) -> Iterator[list[dict]]:
    """The rows of each case in turn; at the end those of a second measurement of the cases with one
    below its minimum."""
    again = []
    for op, case in dict.fromkeys((minimum.op, minimum.case) for minimum in minimums):
        case_minimums = [
            minimum for minimum in minimums if (minimum.op, minimum.case) == (op, case)
        ]
        with _one_thread():
            rows = _ratios(case_minimums)
        if any(row["failure"] for row in rows):
            again.append(case_minimums)
        else:
            yield rows
    for case_minimums in again:
        with _one_thread():
            rows = _ratios(case_minimums)
        yield rows


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _ratios(minimums: Sequence[MinSpeedup]) -> list[dict]:
    """One row per minimum of a case, whose forms are timed alternately."""
    op, name = minimums[0].op, minimums[0].case
    case = next(case for case in cases("cpu") if (case.op, case.name) == (op, name))
    forms = ("portable", *(minimum.over for minimum in minimums))
    timed = {row["impl"]: row for row in time_case(case, CPU, MAIN_DTYPE["cpu"], forms, BUDGET_S)}
    return [_judged(minimum, timed["portable"], timed[minimum.over]) for minimum in minimums]


def _judged(minimum: MinSpeedup, ours: dict, other: dict) -> dict:
    """The row of a minimum. If a form has no times, `ratio` is None and `failure` says why."""
    reasons = [row["failure"] or row["skipped"] for row in (ours, other)]
    failure, ratio = next(filter(None, reasons), None), None
    if not failure:
        ratio = other["median_us"] / ours["median_us"]
        if ratio < minimum.minimum:
            failure = f"speed-up {ratio:.2f} is below the minimum of {minimum.minimum:g}"
    fields = asdict(minimum)
    fields["floor"] = fields.pop("minimum")
    return fields | {"ratio": ratio, "failure": failure} | origin(CPU)
