"""What the portable forms are worth, held against floors: `python -m bench gate`.

A few ratios on the CPU, each of two forms timed in one run, in turns, by one thread: with several,
on a machine that others share, parallel regions wait for threads that are not running, and all
forms alike take what the waiting takes. The floors lie well below all that was measured, so that
only a loss of what a form is for goes below one. A ratio below its floor is measured once more
before it counts. Exit code 1 if it is below twice, or if a form's numbers are wrong.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch

from bench import rows
from bench.cases import cases
from bench.ops import MAIN_DTYPE, time_case
from bench.show import titled
from model.terminal import track

CPU = torch.device("cpu")
BUDGET_S = 1.0  # for the forms of a case together
BIG, SMALL = "B16 P2048 S128", "smollm2 B16 P1500 S64"
PHOTO = "4x 8x8 + 1x 12x12"


@dataclass(frozen=True)
class Floor:
    """`over`'s time over the portable form's must be `floor` or more.

    `recorded` is the ratio that profiles/results/amd-epyc-2-threads/bench.jsonl had by two threads
    at commit d70f76e2d437, `seen` the least and the most of seven runs of this command on a machine
    with two cores and ten busy processes.
    """

    op: str
    case: str
    over: str
    recorded: float
    seen: tuple[float, float]
    floor: float


FLOORS = (
    Floor("prefix_attention", BIG, "eager", 83.4, (49.9, 83.6), 20),
    Floor("prefix_attention", BIG, "sdpa", 5.3, (2.0, 5.5), 1.3),
    Floor("prefix_attention", SMALL, "eager", 8.1, (13.0, 20.6), 4),
    Floor("prefix_attention", SMALL, "sdpa", 2.6, (1.9, 4.0), 1.2),
    Floor("vision_attention", f"{PHOTO} H2 D96", "eager", 1.30, (1.06, 1.69), 0.85),
    Floor("projector", f"{PHOTO} C192", "eager", 1.69, (1.67, 2.03), 1.2),
    Floor("layer_norm", "T1296 C1536", "eager", 2.03, (2.25, 3.63), 1.3),
    Floor("silu_mul", "T256 F12288", "eager", 1.75, (1.36, 1.84), 1.0),
)
CASES = len({(floor.op, floor.case) for floor in FLOORS})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own options."""
    parser.add_argument("--json", action="store_true", help="no table; one JSON document")


def run(options: argparse.Namespace) -> int:
    """Measure and show; 1 if a ratio is below its floor."""
    found = [row for of_case in track(measure(FLOORS), "gate", CASES) for row in of_case]
    if options.json:
        print(json.dumps({"rows": found}))
    else:
        _show(found)
    return int(any(row["failure"] for row in found))


def measure(floors: Sequence[Floor]) -> Iterator[list[dict]]:
    """The rows of each case in turn; those below their floors are from its second measurement."""
    for op, case in dict.fromkeys((floor.op, floor.case) for floor in floors):
        of_case = [floor for floor in floors if (floor.op, floor.case) == (op, case)]
        with _one_thread():
            found = _ratios(of_case)
            if any(row["failure"] for row in found):
                found = _ratios(of_case)
        yield found


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _ratios(floors: Sequence[Floor]) -> list[dict]:
    """Of one case: its forms timed in turns, and what the floors say of them."""
    op, name = floors[0].op, floors[0].case
    case = next(case for case in cases("cpu") if (case.op, case.name) == (op, name))
    forms = ("portable", *(floor.over for floor in floors))
    timed = {row["impl"]: row for row in time_case(case, CPU, MAIN_DTYPE["cpu"], forms, BUDGET_S)}
    return [_judged(floor, timed["portable"], timed[floor.over]) for floor in floors]


def _judged(floor: Floor, ours: dict, other: dict) -> dict:
    """The row of a floor: `ratio` is None, and `failure` says why, where a form has no times."""
    reasons = [row["failure"] or row["skipped"] for row in (ours, other)]
    failure, ratio = next(filter(None, reasons), None), None
    if not failure:
        ratio = other["median_us"] / ours["median_us"]
        if ratio < floor.floor:
            failure = f"{ratio:.2f} times is below the floor of {floor.floor:g}"
    return asdict(floor) | {"ratio": ratio, "failure": failure} | rows.origin(CPU)


def _show(found: Sequence[dict]) -> None:
    header = ("op", "case", "over", " ratio", " floor", " recorded", " seen", "")
    lines = [
        [
            *(row[name] for name in ("op", "case", "over")),
            f"{row['ratio']:.2f}" if row["ratio"] else "",
            *(f"{row[name]:g}" for name in ("floor", "recorded")),
            "{:g}..{:g}".format(*row["seen"]),
            f"FAILED: {row['failure']}" if row["failure"] else "holds",
        ]
        for row in found
    ]
    titled("portable: how many times faster", found, header, lines)
