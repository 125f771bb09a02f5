"""The studies of replicas, without Ray: their rows, what they refuse, and how they judge a run."""

import json
import os
import random
import subprocess
import time
from pathlib import Path

import pytest
import torch

from bench import __main__ as command
from bench.measure.origin import origin
from bench.replicas import kill, overhead, replay, scale
from bench.replicas.batch_run import journal_fault, tokens_of
from bench.replicas.engines import (
    StepSample,
    _PinnedLengths,
    _StepRecorder,
    read_samples,
    take_core,
)
from bench.replicas.processes import Process, descendants, outlive
from bench.replicas.runs import Run, fault
from bench.rows import show
from model.config import TINY
from model.errors import InputError
from model.step3vl import Step3VL
from pacore_sched.answers.problem_run import Problem
from pacore_sched.sim.calibration import FittedCost
from pacore_sched.sim.cost_model import StepWork
from pacore_sched.sim.tail_moves import TailMoves
from pacore_sched.sim.workload import Workload
from tests.pacore_sched.answers.hashed_pacore import hashed

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["scale", "--every", "5"], "--every is an option of kill, not of scale"),
        (["overhead", "--model", "tiny"], "--model is an option of scale and kill and replay"),
        (["overhead", "--device", "cuda"], "on a CPU"),
        (["overhead", "--threads", "1"], "one thread"),
        (["scale", "--problems", "3"], "needs an even number"),
        (["scale", "--model", "gpt-5"], "invalid choice: 'gpt-5'"),
        (["speed"], "invalid choice: 'speed'"),
        ([], "study"),
    ],
)
def test_options(words: list[str], message: str, monkeypatch: pytest.MonkeyPatch):
    """One line for a mistake, also for an option that the study would ignore."""
    monkeypatch.setattr(scale, "usable_cpus", lambda: 2)
    monkeypatch.setattr("bench.measure.devices.torch.cuda.is_available", lambda: True)
    with pytest.raises(InputError, match=message):
        command.main(["replicas", *words])


@pytest.mark.parametrize("study", [scale.run, replay.run])
def test_one_core(study, monkeypatch: pytest.MonkeyPatch):
    for module in (scale, replay):
        monkeypatch.setattr(module, "usable_cpus", lambda: 1)
    options = {"migrate": True} if study is replay.run else {}
    with pytest.raises(InputError, match="needs (two|2) cores"):
        next(study("tiny", 2, 1, **options))


def test_scale_rows(capsys: pytest.CaptureFixture):
    """Gains are those within a repeat: here the machine is half as fast in the second one."""
    seconds = {"1 process": 8, "2 processes": 5, "1 replica": 10, "2 replicas": 6}
    runs = {
        form: [Run(0.0, {"0": 1.0, "1": slow * s}, 600) for slow in (1, 2, 1)]
        for form, s in seconds.items()
    }
    rows = {row["impl"]: row for row in scale.rows("case", runs, 600, {"ray_s": 3, "load_s": 4})}
    assert rows["2 replicas"]["gain"] == rows["2 replicas"]["gain_min"] == 10 / 6
    assert rows["2 replicas"]["over_plain"] == 5 / 6
    assert rows["2 processes"]["gain"] == 8 / 5
    assert rows["1 replica"]["tokens_per_second"] == 60
    assert "ray_s" in rows["1 replica"] and "ray_s" not in rows["1 process"]
    assert not any(row["failure"] for row in rows.values())
    show.replicas(list(rows.values()))
    assert "Ray started in 3.0 s, replicas in 4.0 s" in capsys.readouterr().out


def test_faults_of_runs():
    assert fault([Run(tokens=5)], 5) is None
    assert fault([Run(tokens=5), Run(tokens=4)], 5) == "a run generated 4 tokens instead of 5"
    assert fault([Run(tokens=5, error="no memory")], 5) == "no memory"


def test_replay_rows(capsys: pytest.CaptureFixture):
    """A simulator that is told the real costs has no error: its own times are taken as measured."""
    model = Step3VL.from_preset("tiny")
    judged = replay.pinned(model, Workload("w", 6, (8,), 50, (), 0, max_tokens=400), 0, 0)
    assert all(len(lengths) == 8 for lengths in judged.lengths.values())
    cost = FittedCost(StepWork(TINY.decoder), (1, 32), (1e-3, 4e-3), 0.0, 0.0, 0.0)
    for form, moves in replay.FORMS.items():
        simulated = replay.simulate_replicas(judged, cost, TINY, migrate=moves)
        real = Run(0.0, {str(n): t for n, t in enumerate(simulated.answered_s)}, judged.tokens)
        slower = Run(0.0, {n: 2 * t for n, t in real.answers.items()}, judged.tokens)
        row = replay.row("case", form, judged, [real], simulated)
        assert (row["makespan_error"], row["tta_error"], row["failure"]) == (0, 0, None)
        row = replay.row("case", form, judged, [slower], simulated)
        assert row["makespan_error"] == row["tta_error"] == -0.5
        row = replay.row("case", form, judged, [slower, real], simulated)
        assert row["makespan_max_s"] == 2 * row["makespan_min_s"] == 2 * real.seconds
        show.replicas([row | {"fitted_steps": 3, "fit_residual": 0.01} | origin(CPU)])
    assert "median error 1.0 %" in capsys.readouterr().out


def test_lengths_are_pinned(tmp_path: Path):
    """Every rollout has the length that it was given, and every step is sampled, idle times
    excluded."""
    pacore = hashed((4,), synthesis=False)
    engine = pacore.engine
    lengths = {0: (1, 5, 3, 7), 1: (2, 2, 9, 1)}
    engine.stopping = _PinnedLengths(Step3VL.from_preset("tiny"), lengths)
    _StepRecorder(engine, tmp_path / "1")
    for number in lengths:  # two runs
        messages = [{"role": "user", "content": "?"}]
        problems = [Problem(messages)] if number == 0 else [Problem(messages), Problem(messages)]
        answers = list(pacore.answers(problems))
        tokens = [r.num_tokens for r in answers[-1].rounds[0].rollouts]
        assert tuple(tokens) == lengths[number]
        time.sleep(0.3)
    samples = read_samples(tmp_path)
    assert len(samples) == engine.stats.steps > 10
    assert all(isinstance(s, StepSample) and 0 < s.seconds < 0.3 for s in samples)


@pytest.mark.parametrize("moves", [False, True])
def test_overhead(moves: bool, capsys: pytest.CaptureFixture):
    """The played replicas end every rollout once, whatever moves."""
    cost = overhead.play(3, 0, TailMoves() if moves else None)
    row = overhead.row(3, moves, cost)
    assert row["failure"] is None
    assert bool(row["moved"]) == moves
    assert row["per_problem_us"] > row["per_report_us"] > 0
    cost.answers -= 1
    assert "23 of 24 answers" in overhead.row(3, moves, cost)["failure"]
    show.replicas([row])
    assert "us per problem" in capsys.readouterr().out


def test_cores(tmp_path: Path):
    """Two engines on one core: a core that is taken is not given again."""
    before = os.sched_getaffinity(0)
    try:
        first = take_core(str(tmp_path))
        assert os.sched_getaffinity(0) == {first}
        take_core.cache_clear()
        with pytest.raises(InputError, match="fewer cores than engines"):
            take_core(str(tmp_path))
    finally:
        take_core.cache_clear()
        os.sched_setaffinity(0, before)


def test_processes():
    """Descendants are found, and only ended ones are not alive."""
    with subprocess.Popen(["sh", "-c", "sleep 60 & wait"]) as shell:
        while len(below := descendants(shell.pid)) < 1:
            time.sleep(0.01)
        (sleep,) = below
        assert Process(sleep.pid, sleep.start + 1).alive is False
        assert outlive(below, 0.0) == [sleep]
        while "sleep 60" not in sleep.title:
            time.sleep(0.01)
        sleep.kill()
    assert outlive(below, 10.0) == []
    assert sleep.title == ""


def rollout(problem: str, index: int) -> str:
    return json.dumps({"kind": "rollout", "problem": problem, "round": 0, "index": index})


def test_faults_of_journals(tmp_path: Path):
    journal = tmp_path / "journal"
    lines = ['{"kind": "header"}', rollout("a", 0), rollout("a", 1), '{"kind": "answer"}']
    journal.write_text("\n".join(lines))
    assert journal_fault(journal, 2) is None
    assert journal_fault(journal, 3) == "1 rollouts are lost"
    journal.write_text("\n".join([*lines, rollout("a", 1)]))
    assert "1 rollouts are in the journal twice" in journal_fault(journal, 3)
    out = tmp_path / "out"
    out.write_text('{"rounds": [{"rollouts": [{"tokens": 3}, {"tokens": 4}]}]}\n{"rounds": []}\n')
    assert tokens_of(out) == 7


def test_kills_begin_with_the_first_rollout(monkeypatch: pytest.MonkeyPatch):
    """A replica that is killed before it has done anything would count as a failing one."""

    class FakeRun:
        ended, kills = 0, 0

        @property
        def files(self):
            return self

        def rollouts(self) -> int:
            return self.ended

        def kill_replica(self, draw: random.Random) -> None:
            self.kills += 1

    now = [0.0]
    monkeypatch.setattr(kill.time, "monotonic", lambda: now[0])
    run, killing = FakeRun(), kill.KillEvery(2.0, 0)
    kills = []
    for second in range(12):
        now[0], run.ended = float(second), int(second >= 5)
        killing(run)
        kills.append(run.kills)
    assert kills == [0] * 7 + [1, 1, 2, 2, 3]
