"""The first minutes on a GPU: what works, what is wrong, how fast it is, whatever goes wrong.

Every case runs in a worker process with a time limit, so that a kernel that hangs, crashes or ruins
its CUDA context costs its own result only. In order: a probe, the numerics of every kernel (many
processes, schedules checked, launches blocking), the tests of graphs, races and bits, what the next
decisions hang on (the cost of a launch, old and new forms in pairs, linear layers), the op table in
turns over the ops, decode steps, engine steps, the vision tower. DIR then has rows.jsonl (a row for
every case at least), environment.json, summary.txt, which says what to do next, and log.txt. A
second run into the same DIR leaves out what the same clean commit has good rows of. Needs torch,
Triton and NumPy alone; GIT_COMMIT names the commit where there is no .git.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from bench import jsonl
from model.errors import InputError
from model.terminal import progress
from profiles.first_light.summary import summary
from profiles.runs.supervisor import Supervisor, stops_on_signals, worker_command
from profiles.runs.task import (
    NOT_STARTED,
    ORIGIN,
    OUT_OF_TIME,
    Result,
    Row,
    Task,
    of_origin,
    outstanding,
)

# The stages, and when each ends, as a share of all the time. What it left goes last.
STAGES = {
    "numerics": 0.20,
    "tests": 0.30,
    "pairs": 0.50,
    "ops": 0.70,
    "decode": 0.79,
    "engine": 0.87,
    "vision": 0.95,
}
# The stages that other sections go with: the first of them that is asked for.
STAGES_OF = {
    "compile": ("pairs", "ops"),
    "roofline": ("pairs", "ops"),
    "launches": ("pairs",),
    "linears": ("pairs",),
}
PARALLEL = ("numerics", "tests")
CHECKED = {"CUDA_LAUNCH_BLOCKING": "1", "PACORE_CHECK_SCHEDULE": "1"}  # while numbers are checked
LIMITS_FOR_S = 300.0  # what the tasks' limits are made for; shorter runs have shorter ones
PROBE_S = 50.0
LEAST_S = 60.0
MAX_WORKERS = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--seconds",
        type=float,
        default=300.0,
        metavar="S",
        help=f"all that there is, {LEAST_S:.0f} at least (default: 300)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=min(MAX_WORKERS, os.cpu_count() or 1),
        metavar="N",
        help="processes where nothing is timed (default: one for each CPU, at most 10)",
    )
    parser.add_argument(
        "--stage", nargs="+", choices=list(STAGES), default=list(STAGES), help="(default: all)"
    )
    parser.add_argument(
        "--kernels", type=Path, metavar="FILE", help="a pack of `profiles kernels pack`, to begin"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="(default: cuda)")
    parser.add_argument("--json", action="store_true", help="end with one JSON document")


def run(options: argparse.Namespace) -> int:
    """Measure; 1 if anything failed, 128 + its number after a signal."""
    if not options.seconds >= LEAST_S:
        raise InputError(f"--seconds must be at least {LEAST_S:.0f}, not {options.seconds:g}")
    if options.workers < 1:
        raise InputError(f"--workers must be at least 1, not {options.workers}")
    if options.kernels and not options.kernels.is_file():
        raise InputError(f"--kernels {options.kernels}: there is no such file")
    start = time.monotonic()
    command, spare = worker_command(options.device), options.device == "cuda"
    with (
        Supervisor(command, end=start + options.seconds, spare=spare) as supervisor,
        stops_on_signals(supervisor) as signals,
    ):
        visit = Visit(options.out, supervisor, start, options.seconds, options.workers)
        text = visit.run(options.stage, _probe(options))
    print(json.dumps({"rows": visit.rows, "signals": signals}) if options.json else text)
    if signals:
        return 128 + signals[0]
    return int(any(_failed(row) for row in visit.rows))


def _probe(options: argparse.Namespace) -> Task:
    form = "triton" if options.device == "cuda" else "portable"
    arguments = {"kernels": str(options.kernels.resolve())} if options.kernels else {}
    return Task("probe", "silu_mul", "probe", None, (form,), PROBE_S, arguments)


class Visit:
    """One run of the command: what is to be done, and the files that tell of it."""

    def __init__(
        self, out: Path, supervisor: Supervisor, start: float, seconds: float, workers: int
    ) -> None:
        self.rows: list[Row] = []
        self._out, self._supervisor, self._workers = out, supervisor, workers
        self._start, self._seconds = start, seconds
        self._origin: Row = {"device": None, "commit": "unknown"}
        jsonl.append(out / "rows.jsonl", [])  # now, not after minutes of work

    def run(self, stages: Sequence[str], probe: Task) -> str:
        """Probe, then all stages; the summary."""
        path = self._out / "rows.jsonl"
        work = [task for task in self._prepared(probe) if _stage(task, stages)]
        todo = outstanding(work, jsonl.read(path), self._origin)
        self._log(f"{len(todo)} of {len(work)} tasks to do")
        with progress("first light", len(todo)) as advance:
            self._stages(todo, stages, advance)
        seconds = time.monotonic() - self._start
        known = of_origin(jsonl.read(path), self._origin)
        text = summary(self.rows, known, self._origin, seconds, len(work) - len(todo))
        (self._out / "summary.txt").write_text(text + "\n")
        return text

    def _prepared(self, probe: Task) -> list[Task]:
        """The tasks, once a kernel has run on the device; none if none did. Raises InputError if
        there is no such device."""
        result = self._supervisor.run_one(probe)
        result.raise_mistake()
        plan = next((row for row in result.rows if "tasks" in row), None)
        if plan is None:
            print(result.stderr, file=sys.stderr)
        else:
            jsonl.write_json(self._out / "environment.json", plan["environment"])
            self._origin = {name: plan["environment"][name] for name in ORIGIN}
        self._keep(replace(result, rows=[row for row in result.rows if row is not plan]))
        tasks = [Task.from_json(json.dumps(task)) for task in plan["tasks"]] if plan else []
        scale = min(1.0, self._seconds / LIMITS_FOR_S)
        return [replace(task, limit_s=scale * task.limit_s) for task in tasks]

    def _stages(
        self, todo: Sequence[Task], stages: Sequence[str], advance: Callable[[int], None]
    ) -> None:
        """Each stage until its time is up, then what they left, as long as there is time."""
        left: dict[str, list[Task]] = {}
        for stage, share in STAGES.items():
            tasks = [task for task in todo if _stage(task, stages) == stage]
            left[stage] = self._stage(stage, tasks, share, advance)
        for stage, tasks in left.items():
            self._stage(stage, tasks, 1.0, advance)

    def _stage(
        self, stage: str, tasks: Sequence[Task], share: float, advance: Callable[[int], None]
    ) -> list[Task]:
        """Run tasks until the first `share` of the time is up, none that might outlast all of it;
        those that had to wait. If the share is 1 they have rows that say so."""
        end, done = self._start + share * self._seconds, {id(task): task for task in tasks}

        def may_start(task: Task) -> bool:
            now = time.monotonic()
            return now < end and now + task.limit_s <= self._supervisor.end

        results = self._supervisor.run(
            tasks,
            may_start=may_start,
            workers=self._workers if stage in PARALLEL else 1,
            environment=CHECKED if stage == "numerics" else {},
        )
        left = []
        for result in results:
            done.pop(id(result.task), None)
            if share < 1 and result.failure == OUT_OF_TIME:
                left.append(result.task)
                continue
            self._keep(result)
            advance(1)
        if self._supervisor.stopped:
            for task in done.values():
                self._keep(Result(task, failure=f"{NOT_STARTED}stopped"))
        return left

    def _keep(self, result: Result) -> None:
        made = result.as_rows(self._origin)
        jsonl.append(self._out / "rows.jsonl", made)
        self.rows += made
        failures = [row["failure"] for row in made if row["failure"]]
        self._log(f"{result.task}: {result.seconds:.1f} s, {'; '.join(failures) or 'ok'}")
        for text in (*(row.get("trace") for row in made), failures and result.stderr):
            if text:
                self._log(text)

    def _log(self, text: str) -> None:
        with (self._out / "log.txt").open("a") as file:
            file.write(f"{time.monotonic() - self._start:7.1f} {text}\n")


def _stage(task: Task, stages: Sequence[str]) -> str | None:
    """The stage that a task belongs to, if that is one of `stages`."""
    possible = STAGES_OF.get(task.section, (task.section,))
    return next((stage for stage in possible if stage in stages), None)


def _failed(row: Row) -> bool:
    return bool(row["failure"]) and not row["failure"].startswith(NOT_STARTED)
