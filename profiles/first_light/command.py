"""The first minutes on a GPU: correctness and times of every kernel, even if some hang or crash.

Every case runs in a worker process with a time limit, so a kernel that hangs, crashes or poisons
its CUDA context costs only its own result. The stages, in order: a probe; the numerics of every
kernel (several processes, schedules checked, blocking launches); tests of graphs, races and bits;
what the next decisions depend on (the cost of a launch, old and new forms in pairs, linear layers);
the op table, round-robin over the ops; decode steps; engine steps; the vision tower. DIR then has
rows.jsonl (at least one row per case), environment.json, log.txt and summary.txt, which says what
to do next. A second run into the same DIR skips cases that have good rows of the same clean commit.
Needs only torch, Triton and NumPy; GIT_COMMIT names the commit where there is no .git.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from bench.rows import jsonl
from model.terminal import integer, progress, real
from model.text.files import check_regular, check_target
from profiles.first_light.summary import summary
from profiles.runs.supervisor import Supervisor, stops_on_signals, worker_command
from profiles.runs.task import (
    NOT_STARTED,
    ORIGIN,
    OUT_OF_TIME,
    Result,
    Row,
    Task,
    outstanding,
    rows_from,
)

# The stages and when each ends, as a share of the total time. Unfinished tasks run at the end.
STAGES = {
    "numerics": 0.20,
    "tests": 0.30,
    "pairs": 0.50,
    "ops": 0.70,
    "decode": 0.79,
    "engine": 0.87,
    "vision": 0.95,
}
# A section without its own stage runs in the first of these stages that is selected.
STAGES_OF_SECTION = {
    "compile": ("pairs", "ops"),
    "roofline": ("pairs", "ops"),
    "launches": ("pairs",),
    "linears": ("pairs",),
}
PARALLEL = ("numerics", "tests")
CHECKED = {"CUDA_LAUNCH_BLOCKING": "1", "PACORE_CHECK_SCHEDULE": "1"}  # while checking numerics
REFERENCE_SECONDS = 300.0  # the run that task limits are for; shorter runs scale them down
PROBE_S = 50.0
MIN_SECONDS = 60.0
MAX_WORKERS = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--seconds",
        type=real(MIN_SECONDS, 86_400),
        default=300.0,
        metavar="S",
        help=f"time limit of the whole run, at least {MIN_SECONDS:.0f} (default: 300)",
    )
    parser.add_argument(
        "--workers",
        type=integer(1, 256),
        default=min(MAX_WORKERS, os.cpu_count() or 1),
        metavar="N",
        help="worker processes while nothing is timed (default: one per CPU, at most 10)",
    )
    parser.add_argument(
        "--stage",
        nargs="+",
        choices=list(STAGES),
        default=list(STAGES),
        help="stages to run, always in this order (default: all)",
    )
    parser.add_argument(
        "--kernels",
        type=Path,
        metavar="FILE",
        help="a pack of `profiles kernels pack`, unpacked first",
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda", help="device to test (default: cuda)"
    )
    parser.add_argument("--json", action="store_true", help="end with one JSON document")


def run(options: argparse.Namespace) -> int:
    """Measure. Returns 1 if anything failed, 128 + the signal's number after a signal."""
    if options.kernels:
        check_regular(options.kernels, f"--kernels {options.kernels}")
    start = time.monotonic()
    command, keep_spare = worker_command(options.device), options.device == "cuda"
    with (
        Supervisor(command, end=start + options.seconds, spare=keep_spare) as supervisor,
        stops_on_signals(supervisor) as signals,
    ):
        session = FirstLightRun(options.out, supervisor, start, options.seconds, options.workers)
        text = session.run(options.stage, _probe_task(options))
    print(json.dumps({"rows": session.rows, "signals": signals}) if options.json else text)
    if signals:
        return 128 + signals[0]
    return int(any(_failed(row) for row in session.rows))


def _probe_task(options: argparse.Namespace) -> Task:
    form = "triton" if options.device == "cuda" else "portable"
    arguments = {"kernels": str(options.kernels.resolve())} if options.kernels else {}
    return Task("probe", "silu_mul", "probe", None, (form,), PROBE_S, arguments)


class FirstLightRun:
    """One run of the command: its tasks, and the files that it writes."""

    def __init__(
        self, out: Path, supervisor: Supervisor, start: float, seconds: float, workers: int
    ) -> None:
        self.rows: list[Row] = []
        self._out, self._supervisor, self._workers = out, supervisor, workers
        self._start, self._seconds = start, seconds
        self._origin: Row = {"device": None, "commit": "unknown"}
        jsonl.append(out / "rows.jsonl", [])  # fails now, not after minutes of work
        for name in ("environment.json", "log.txt", "summary.txt"):
            check_target(out / name)

    def run(self, stages: Sequence[str], probe: Task) -> str:
        """Run the probe, then all stages, and return the summary."""
        path = self._out / "rows.jsonl"
        work = [task for task in self._probe(probe) if _stage_of(task, stages)]
        todo = outstanding(work, jsonl.read_measured(path), self._origin)
        self._log(f"{len(todo)} of {len(work)} tasks to run")
        with progress("first light", len(todo)) as advance:
            self._run_stages(todo, stages, advance)
        seconds = time.monotonic() - self._start
        known = rows_from(jsonl.read_measured(path), self._origin)
        text = summary(self.rows, known, self._origin, seconds, len(work) - len(todo))
        (self._out / "summary.txt").write_text(text + "\n")
        return text

    def _probe(self, probe: Task) -> list[Task]:
        """Run one kernel and return the tasks; none if the kernel failed.

        Raises InputError if the device does not exist.
        """
        result = self._supervisor.run_one(probe)
        result.raise_input_error()
        listing = next((row for row in result.rows if "tasks" in row), None)
        if listing is None:
            print(result.stderr, file=sys.stderr)
        else:
            jsonl.write_json(self._out / "environment.json", listing["environment"])
            self._origin = {name: listing["environment"][name] for name in ORIGIN}
        self._write(replace(result, rows=[row for row in result.rows if row is not listing]))
        tasks = [Task.from_json(json.dumps(task)) for task in listing["tasks"]] if listing else []
        scale = min(1.0, self._seconds / REFERENCE_SECONDS)
        return [replace(task, limit_s=scale * task.limit_s) for task in tasks]

    def _run_stages(
        self, todo: Sequence[Task], stages: Sequence[str], advance: Callable[[int], None]
    ) -> None:
        """Run each stage until its time is up, then the postponed tasks while time remains."""
        postponed: dict[str, list[Task]] = {}
        for stage, share in STAGES.items():
            tasks = [task for task in todo if _stage_of(task, stages) == stage]
            postponed[stage] = self._run_stage(stage, tasks, share, advance)
        for stage, tasks in postponed.items():
            self._run_stage(stage, tasks, 1.0, advance)

    def _run_stage(
        self, stage: str, tasks: Sequence[Task], share: float, advance: Callable[[int], None]
    ) -> list[Task]:
        """Run tasks until `share` of the time is up; none is started that could outlast the run.

        Returns the tasks that were not started. If the share is 1 they get rows that say so.
        """
        end, open_tasks = self._start + share * self._seconds, {id(task): task for task in tasks}

        def may_start(task: Task) -> bool:
            now = time.monotonic()
            return now < end and now + task.limit_s <= self._supervisor.end

        results = self._supervisor.run(
            tasks,
            may_start=may_start,
            workers=self._workers if stage in PARALLEL else 1,
            environment=CHECKED if stage == "numerics" else {},
        )
        postponed = []
        for result in results:
            open_tasks.pop(id(result.task), None)
            if share < 1 and result.failure == OUT_OF_TIME:
                postponed.append(result.task)
                continue
            self._write(result)
            advance(1)
        if self._supervisor.stopped:
            for task in open_tasks.values():
                self._write(Result(task, failure=f"{NOT_STARTED}stopped"))
        return postponed

    def _write(self, result: Result) -> None:
        rows = result.as_rows(self._origin)
        jsonl.append(self._out / "rows.jsonl", rows)
        self.rows += rows
        failures = [row["failure"] for row in rows if row["failure"]]
        self._log(f"{result.task}: {result.seconds:.1f} s, {'; '.join(failures) or 'ok'}")
        for text in (*(row.get("trace") for row in rows), failures and result.stderr):
            if text:
                self._log(text)

    def _log(self, text: str) -> None:
        with (self._out / "log.txt").open("a") as file:
            file.write(f"{time.monotonic() - self._start:7.1f} {text}\n")


def _stage_of(task: Task, stages: Sequence[str]) -> str | None:
    """The stage that a task runs in; None if that is not one of `stages`."""
    candidates = STAGES_OF_SECTION.get(task.section, (task.section,))
    return next((stage for stage in candidates if stage in stages), None)


def _failed(row: Row) -> bool:
    return bool(row["failure"]) and not row["failure"].startswith(NOT_STARTED)
