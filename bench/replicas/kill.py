"""Replicas and their driver killed while they work: `python -m bench replicas kill`.

The `batch` command runs on replicas three times: undisturbed; with a SIGKILL to a random replica's
process every few seconds; and with one to the command itself halfway, after which `--resume`
continues. Nothing may be lost or doubled, the outputs must be equal byte for byte, and no process
may be left. How many rollouts were run again, because they had not ended, is part of the rows.
"""

import json
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import mkdtemp

import torch

from bench.measure.origin import origin
from bench.replicas.batch_run import BatchRun, Files, journal_fault, tokens_of
from bench.replicas.engines import KV_TOKENS, MAX_RUNNING

WIDTH, MAX_TOKENS = 4, 128
ROLLOUTS = WIDTH + 1  # of a problem, its synthesis included


class KillEvery:
    """Kills a random replica every `seconds`, from the first rollout's end on."""

    def __init__(self, seconds: float, seed: int) -> None:
        self._seconds, self._draw = seconds, random.Random(seed)
        self._next: float | None = None

    def __call__(self, run: BatchRun) -> None:
        now = time.monotonic()
        if self._next is None:
            if run.files.rollouts():
                self._next = now + self._seconds
        elif now >= self._next:
            run.kill_replica(self._draw)
            self._next = now + self._seconds


class KillDriver:
    """Kills the command as soon as this many rollouts have ended."""

    def __init__(self, rollouts: int) -> None:
        self._rollouts = rollouts

    def __call__(self, run: BatchRun) -> None:
        if run.files.rollouts() >= self._rollouts:
            run.kill()


def batch_options(model: str, replicas: int) -> list[str]:
    """Options of `batch`."""
    options = {
        "--model": model,
        "--device": "cpu",
        "--threads": 1,
        "--widths": WIDTH,
        "--max-tokens": MAX_TOKENS,
        "--max-running": MAX_RUNNING,
        "--kv-tokens": KV_TOKENS,
        "--replicas": replicas,
    }
    return [str(word) for option in options.items() for word in option]


def run(
    model: str, problems: int, replicas: int, every: float, seed: int, *, migrate: bool
) -> Iterator[dict]:
    """A row per run. The files of a run with a fault are kept."""
    folder = Path(mkdtemp(prefix="replicas-kill-"))
    options = [*batch_options(model, replicas), "--migrate" if migrate else "--no-migrate"]
    study = Study(folder, problems, options)
    case = f"{model} {problems} x [{WIDTH}] on {replicas} replicas"
    failed = False
    for row in (
        study.undisturbed(),
        study.replicas_killed(KillEvery(every, seed)),
        study.driver_killed(),
    ):
        failed = failed or bool(row["failure"])
        if row["failure"]:
            row["failure"] += f" (files: {folder})"
        yield {"op": "replica_kill", "case": case, "dtype": "float32", **row} | origin(
            torch.device("cpu")
        )
    if not failed:
        shutil.rmtree(folder)


class Study:
    """The runs of one file of questions."""

    def __init__(self, folder: Path, problems: int, options: Sequence[str]) -> None:
        self._folder, self._options = folder, options
        self._questions = folder / "questions.jsonl"
        lines = [{"question": f"What is {n} times {n + 3}?"} for n in range(problems)]
        self._questions.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        self._rollouts = problems * ROLLOUTS
        self.expected = folder / "undisturbed.jsonl"  # the output of one that nothing disturbed

    def undisturbed(self) -> dict:
        run = BatchRun(Files(self._questions, self.expected), self._options)
        return self._row("undisturbed", run, run.watch())

    def replicas_killed(self, killing: "KillEvery") -> dict:
        files = Files(self._questions, self._folder / "replicas_killed.jsonl")
        run = BatchRun(files, self._options)
        row = self._row("replicas killed", run, run.watch(killing))
        return row | {"failure": row["failure"] or (None if run.kills else "it killed no replica")}

    def driver_killed(self) -> dict:
        """The row of the resumed run; its makespan does not include that of the first one."""
        files = Files(self._questions, self._folder / "driver_killed.jsonl")
        first = BatchRun(files, self._options)
        first.watch(KillDriver(self._rollouts // 2))
        saved = files.rollouts()
        run = BatchRun(files, [*self._options, "--resume"])
        report = run.watch()
        row = self._row("driver killed, resumed", run, report)
        fault = row["failure"] or first.left_running()
        if not fault and not report["resumed_rollouts"] == saved < self._rollouts:
            fault = f"{report['resumed_rollouts']} rollouts were resumed, {saved} had ended"
        if not fault and row["rollouts_again"]:
            fault = "rollouts that had ended were run again"
        return row | {"failure": fault}

    def _row(self, form: str, run: BatchRun, report: dict) -> dict:
        fault = run.fault() or run.left_running()
        fault = fault or journal_fault(run.files.journal, self._rollouts)
        if not fault and run.files.out.read_bytes() != self.expected.read_bytes():
            fault = "the output differs from that of the undisturbed run"
        return {"impl": form, "kills": run.kills, **_figures(report, run.files), "failure": fault}


def _figures(report: dict, files: Files) -> dict:
    """The figures of a run's report.

    rollouts_again, tokens_again: started or generated more than once, as far as the replicas had
        reported it when they were killed
    """
    if not report or not report["out"]:
        return {}
    resumed = report["resumed_rollouts"]
    again = report["tokens"] - tokens_of(files.out) if not resumed else None
    return {
        "makespan_s": report["seconds"],
        "tokens_per_second": report["tokens_per_second"],
        "rollouts": report["rollouts"],
        "resumed_rollouts": resumed,
        "rollouts_again": report["started_rollouts"] - (report["rollouts"] - resumed),
        "tokens_again": again,
    }
