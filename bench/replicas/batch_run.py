"""A `batch` command in a process of its own: watched, disturbed, and judged by its files."""

import json
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.replicas.processes import POLL_S, Process, descendants, outlive

REPLICA = "ray::ReplicaActor.advance"  # the title of a replica that runs
ROLLOUT = b'"kind": "rollout"'
GONE_S = 120.0  # two idle agents of Ray's end within about a minute after a killed driver


@dataclass(frozen=True)
class Files:
    """A run's questions and its output; the journal is next to it."""

    questions: Path
    out: Path

    @property
    def journal(self) -> Path:
        return self.out.with_suffix(".journal.jsonl")

    def rollouts(self) -> int:
        """How many rollouts are in the journal."""
        return self.journal.read_bytes().count(ROLLOUT) if self.journal.exists() else 0


class BatchRun:
    """The command, from its start on. `seen` are all processes that it has had."""

    def __init__(self, files: Files, options: Sequence[str]) -> None:
        self.files = files
        paths = [str(files.questions), "--out", str(files.out)]
        command = [sys.executable, "-m", "pacore_sched", "batch", *paths, *options, "--json"]
        self.seen: set[Process] = set()
        self.kills = 0  # of replicas
        self._errors = files.out.with_suffix(".stderr").open("w+")
        self._process = subprocess.Popen(
            command, text=True, stdout=subprocess.PIPE, stderr=self._errors
        )

    @property
    def runs(self) -> bool:
        self.seen |= descendants(self._process.pid)
        return self._process.poll() is None

    def kill_replica(self, draw: random.Random) -> None:
        """SIGKILL to a random replica that has work, if there is one."""
        mine = sorted(descendants(self._process.pid))
        if running := [process for process in mine if process.title.startswith(REPLICA)]:
            draw.choice(running).kill()
            self.kills += 1

    def kill(self) -> None:
        """SIGKILL to the command itself."""
        self.seen |= descendants(self._process.pid)
        self._process.kill()

    def watch(self, on_turn: Callable[["BatchRun"], None] = lambda run: None) -> dict:
        """Wait for the end, calling `on_turn` several times a second; returns the command's report,
        {} if there is none."""
        while self.runs:
            on_turn(self)
            time.sleep(POLL_S)
        out, _ = self._process.communicate()
        return json.loads(out) if out else {}

    def fault(self) -> str | None:
        """What is wrong with the end of the command."""
        if self._process.returncode:
            self._errors.seek(0)
            last = self._errors.read().strip().rpartition("\n")[2]
            return f"exit code {self._process.returncode}: {last}"
        return None

    def left_running(self) -> str | None:
        """The processes that are still there, long after the end."""
        left = outlive(self.seen, GONE_S)
        return f"left running: {', '.join(process.title for process in left)}" if left else None


def journal_fault(journal: Path, expected: int) -> str | None:
    """What is wrong with a journal that must have this many rollouts, each once."""
    lines = [json.loads(line) for line in journal.read_bytes().splitlines()]
    keys = Counter(
        (line["problem"], line["round"], line["index"])
        for line in lines
        if line["kind"] == "rollout"
    )
    if doubled := [key for key, count in keys.items() if count > 1]:
        return f"{len(doubled)} rollouts are in the journal twice, such as {doubled[0]}"
    return f"{expected - len(keys)} rollouts are lost" if len(keys) < expected else None


def tokens_of(out: Path) -> int:
    """The tokens of all rollouts in an output."""
    problems = [json.loads(line) for line in out.read_text().splitlines()]
    rounds = [round_ for problem in problems for round_ in problem["rounds"]]
    return sum(rollout["tokens"] for round_ in rounds for rollout in round_["rollouts"])
