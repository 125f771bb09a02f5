"""`python -m profiles record --out DIR`: measure everything that a machine can, as rows on disk.

The sections, most valuable first: the roofline, errors of every op, the op table, the decode step,
engine steps, images. Every case runs in a worker process with a time limit, so a form that hangs,
crashes or poisons its CUDA context costs only its own row. Rows are written as they are measured:
an interrupted run keeps its rows, and the next run with the same clean commit and device continues
from there. Needs torch, Triton and NumPy.
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

from bench.rows import jsonl, show
from model.errors import InputError
from model.terminal import progress, real
from model.text.files import check_target
from profiles.runs.supervisor import Supervisor, stops_on_signals, worker_command
from profiles.runs.task import ORIGIN, OUT_OF_TIME, STOPPED, Row, Task, outstanding, select

PARALLEL = ("numerics",)
MAX_WORKERS = 8
OVERTIME_S = 300.0  # after the budget; then workers are killed

ORDER = """\
Cases without rows in the folder come first: the roofline, errors of every op, the op table, the
decode step, engine steps, images. Then cases that failed or have rows of another commit are
measured again, the oldest first. Cases with rows of this commit are skipped if it is clean. Runs
that are too short for everything therefore fill the folder first and renew it later.

By default: our forms, eager, and PyTorch's own peers (SDPA, cuDNN). Name peers that compile for
every case (flex, compile) and other libraries with --forms.
"""


@dataclass(frozen=True)
class RecordResult:
    """The rows of this run, the number of tasks that were already done, and the tasks left out."""

    rows: list[Row]
    kept: int
    left_out: list[Task]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = ORDER
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--budget",
        type=real(0, 86_400, exclusive=True),
        default=450.0,
        metavar="SECONDS",
        help="start no new case after this time (default: 450)",
    )
    parser.add_argument(
        "--section", nargs="+", default=(), help="only these sections (default: all)"
    )
    parser.add_argument(
        "--shape", default="", metavar="TEXT", help="only cases with TEXT in their op or name"
    )
    parser.add_argument(
        "--forms", nargs="+", default=(), metavar="FORM", help="only these forms and peers"
    )
    parser.add_argument("--no-peers", action="store_true", help="only our forms and eager")
    parser.add_argument(
        "--no-breakdown", action="store_true", help="decode steps only as a whole, not by part"
    )
    parser.add_argument(
        "--time-anyway",
        action="store_true",
        help="also time forms that exceed their tolerance; their rows say so",
    )
    parser.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    parser.add_argument("--json", action="store_true", help="end with one JSON document, no tables")


def run(options: argparse.Namespace) -> int:
    """Measure. Returns 1 if a row failed, 128 + the signal's number after a signal."""
    check_target(options.out / "environment.json")  # now, not after a task
    command = worker_command(options.device or "")
    end = time.monotonic() + options.budget
    with (
        Supervisor(command, end=end + OVERTIME_S) as supervisor,
        stops_on_signals(supervisor) as signals,
    ):
        work, environment = list_tasks(supervisor, options)
        work = select(work, options.section, options.shape)
        jsonl.write_json(options.out / "environment.json", environment)
        origin = {name: environment[name] for name in ORIGIN}
        result = record(options.out, work, supervisor, origin, lambda: time.monotonic() < end)
    if options.json:
        left_out = [str(task) for task in result.left_out]
        print(json.dumps({"rows": result.rows, "kept": result.kept, "left_out": left_out}))
    else:
        _show(result, options.out)
    return 128 + signals[0] if signals else int(any(row["failure"] for row in result.rows))


def list_tasks(supervisor: Supervisor, options: argparse.Namespace) -> tuple[list[Task], Row]:
    """All tasks, and the machine as a worker sees it. Raises InputError if the worker does."""
    arguments = {
        "forms": list(options.forms),
        "peers": not options.no_peers,
        "breakdown": not options.no_breakdown,
        "anyway": options.time_anyway,
    }
    task = Task("task_list", "record", "task list", limit_s=120, arguments=arguments)
    result = supervisor.run_one(task)
    if result.failure == STOPPED:
        raise KeyboardInterrupt
    result.raise_input_error()
    if result.failure:
        print(result.stderr, file=sys.stderr)
        raise InputError(f"this machine cannot be measured: {result.failure}")
    listing = result.rows[0]
    return [Task.from_json(json.dumps(task)) for task in listing["tasks"]], listing["environment"]


def record(
    out: Path,
    work: Sequence[Task],
    supervisor: Supervisor,
    origin: Row,
    in_time: Callable[[], bool],
) -> RecordResult:
    """Run `work` in the order of ORDER and write its rows to `out`; start nothing when `in_time` is
    false.

    Raises InputError if `out` cannot be written or has files that are not rows.
    """
    sections = dict.fromkeys(task.section for task in work)
    known = [
        {"section": name} | row
        for name in sections
        for row in jsonl.read_measured(out / f"{name}.jsonl")
    ]
    todo = outstanding(work, known, origin)
    rows: list[Row] = []
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
                rows += new
                advance(1)
            if supervisor.stopped:
                break
    return RecordResult(rows, len(work) - len(todo), list(left.values()))


def _show(result: RecordResult, out: Path) -> None:
    timed = [row for row in result.rows if row.get("p20_us")]
    if timed:
        show.times(timed)
    failed = [row for row in result.rows if row["failure"]]
    for row in failed:
        name = ", ".join(str(row[key]) for key in ("op", "case", "impl", "dtype"))
        print(f"FAILED: {name}: {row['failure']}")
    print(
        f"{len(result.rows)} rows written to {out}, {len(failed)} of them failed;"
        f" {result.kept} cases already had rows"
    )
    if result.left_out:
        counts = Counter(task.section for task in result.left_out)
        text = ", ".join(f"{count} of {section}" for section, count in counts.items())
        print(f"not started within the budget: {text}; run again to continue", file=sys.stderr)
