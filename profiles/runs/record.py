"""`python -m profiles record --out DIR`: all that a machine can measure in one go, as rows on disk.

Sections in order of worth: the roofline, errors of every op, the op table, the decode step, the
engine's steps, images. Every case runs in a worker process with a time limit, so that a form that
hangs, crashes or ruins its CUDA context costs its own row only. Rows are written as they are made:
an interrupted or too short run leaves what it had, and the next one with the same clean commit and
device goes on from there. Needs torch, Triton and NumPy.
"""

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from bench import jsonl
from model.errors import InputError
from model.terminal import progress
from profiles.runs.supervisor import Supervisor, stops_on_signals, worker_command
from profiles.runs.task import ORIGIN, OUT_OF_TIME, STOPPED, Row, Task, outstanding, select

PARALLEL = ("numerics",)
MAX_WORKERS = 8
OVERTIME_S = 300.0  # beyond the budget, after which workers are killed

ORDER = """\
Work that the folder has no rows of comes first: the roofline, errors of every op, the op table, the
decode step, the engine's steps, images. Then what has rows of another commit, or failed, is
measured again, the oldest rows first. Rows of this very commit are left as they are, if it is
clean. So runs that are too short for everything fill the folder first, and renew it then.

By default: all forms of ours, eager, and what PyTorch itself offers (SDPA, cuDNN). Peers that
compile for every case (flex, compile) and other libraries are named with --forms.
"""


@dataclass(frozen=True)
class Recorded:
    """The rows made now, the number of tasks found done, and the tasks left out."""

    rows: list[Row]
    kept: int
    left_out: list[Task]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = ORDER
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--budget",
        type=float,
        default=450.0,
        metavar="SECONDS",
        help="start no new case after this time (default: 450)",
    )
    parser.add_argument("--section", nargs="+", default=(), help="these only (default: all)")
    parser.add_argument("--shape", default="", metavar="TEXT", help="TEXT in the op or case only")
    parser.add_argument(
        "--forms", nargs="+", default=(), metavar="FORM", help="these forms and peers only"
    )
    parser.add_argument("--no-peers", action="store_true", help="nothing but our own and eager")
    parser.add_argument(
        "--no-breakdown", action="store_true", help="decode steps as a whole, not by part"
    )
    parser.add_argument(
        "--time-anyway", action="store_true", help="time forms over their tolerance, and say so"
    )
    parser.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    parser.add_argument("--json", action="store_true", help="no tables; end with one JSON document")


def run(options: argparse.Namespace) -> int:
    """Measure; 1 if a row failed, 128 + its number after a signal."""
    if options.budget <= 0:
        raise InputError(f"--budget must be a positive number of seconds, not {options.budget}")
    command = worker_command(options.device or "")
    end = time.monotonic() + options.budget
    with (
        Supervisor(command, end=end + OVERTIME_S) as supervisor,
        stops_on_signals(supervisor) as signals,
    ):
        work, environment = planned(supervisor, options)
        work = select(work, options.section, options.shape)
        jsonl.write_json(options.out / "environment.json", environment)
        origin = {name: environment[name] for name in ORIGIN}
        found = record(options.out, work, supervisor, origin, lambda: time.monotonic() < end)
    if options.json:
        left_out = [str(task) for task in found.left_out]
        print(json.dumps({"rows": found.rows, "kept": found.kept, "left_out": left_out}))
    else:
        _show(found, options.out)
    return 128 + signals[0] if signals else int(any(row["failure"] for row in found.rows))


def planned(supervisor: Supervisor, options: argparse.Namespace) -> tuple[list[Task], Row]:
    """All tasks, and the machine as a worker finds it. Raises InputError for what the worker says
    is a mistake."""
    arguments = {
        "forms": list(options.forms),
        "peers": not options.no_peers,
        "breakdown": not options.no_breakdown,
        "anyway": options.time_anyway,
    }
    task = Task("plan", "record", "plan", limit_s=120, arguments=arguments)
    result = supervisor.run_one(task)
    if result.failure == STOPPED:
        raise KeyboardInterrupt
    result.raise_mistake()
    if result.failure:
        print(result.stderr, file=sys.stderr)
        raise InputError(f"this machine cannot be measured: {result.failure}")
    plan = result.rows[0]
    return [Task.from_json(json.dumps(one)) for one in plan["tasks"]], plan["environment"]


def record(
    out: Path,
    work: Sequence[Task],
    supervisor: Supervisor,
    origin: Row,
    in_time: Callable[[], bool],
) -> Recorded:
    """Run `work` in the order of ORDER and write its rows to `out`; start nothing once not
    `in_time`.

    Raises InputError if `out` cannot be written or holds what is not rows.
    """
    sections = dict.fromkeys(task.section for task in work)
    known = [
        {"section": name} | row for name in sections for row in jsonl.read(out / f"{name}.jsonl")
    ]
    todo = outstanding(work, known, origin)
    made: list[Row] = []
    left = {id(task): task for task in todo}
    with progress("record", len(todo)) as advance:
        for section, tasks in groupby(todo, lambda task: task.section):
            parallel = min(MAX_WORKERS, os.cpu_count() or 1) if section in PARALLEL else 1
            for result in supervisor.run(
                list(tasks), may_start=lambda task: in_time(), workers=parallel
            ):
                if result.failure == OUT_OF_TIME:
                    continue
                left.pop(id(result.task), None)
                new = result.as_rows(origin)
                jsonl.append(out / f"{section}.jsonl", new)
                made += new
                advance(1)
            if supervisor.stopped:
                break
    return Recorded(made, len(work) - len(todo), list(left.values()))


def _show(found: Recorded, out: Path) -> None:
    timed = [row for row in found.rows if row.get("p20_us")]
    if timed:
        from bench import show  # imports torch

        show.times(timed)
    failed = [row for row in found.rows if row["failure"]]
    for row in failed:
        name = ", ".join(str(row[key]) for key in ("op", "case", "impl", "dtype"))
        print(f"FAILED: {name}: {row['failure']}")
    print(
        f"{len(found.rows)} rows written to {out}, {len(failed)} of them failed;"
        f" {found.kept} cases were already there"
    )
    if found.left_out:
        counts = Counter(task.section for task in found.left_out)
        text = ", ".join(f"{count} of {section}" for section, count in counts.items())
        print(f"the budget left out {text}; run again to go on", file=sys.stderr)
