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

    `recorded` is the ratio that profiles/results/amd-epyc-avx2-2-threads/bench.jsonl has by two
    threads, `seen` the least and the most of three runs of this command on the same machine.
    """

    op: str
    case: str
    over: str
    recorded: float
    seen: tuple[float, float]
    floor: float


FLOORS = (
    Floor("prefix_attention", BIG, "eager", 24.8, (25.2, 27.5), 10),
    Floor("prefix_attention", BIG, "sdpa", 4.6, (5.3, 7.0), 2.5),
    Floor("prefix_attention", SMALL, "eager", 11.7, (16.0, 17.1), 6),
    Floor("prefix_attention", SMALL, "sdpa", 2.1, (3.1, 3.6), 1.4),
    Floor("vision_attention", f"{PHOTO} H2 D96", "eager", 1.47, (1.34, 1.39), 1.0),
    Floor("projector", f"{PHOTO} C192", "eager", 1.95, (1.82, 2.12), 1.2),
    Floor("layer_norm", "T1296 C1536", "eager", 2.51, (2.62, 2.72), 1.5),
    Floor("silu_mul", "T256 F12288", "eager", 1.45, (1.43, 1.45), 1.1),
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
