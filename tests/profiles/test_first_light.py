"""`python -m profiles first-light`: the files that it writes, even if workers hang or crash."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from bench.rows import jsonl
from model.errors import InputError
from profiles import __main__ as command
from profiles.first_light import command as first_light
from profiles.first_light.command import STAGES, _stage_of
from profiles.first_light.summary import LINES, summary
from profiles.runs import supervisor
from profiles.runs.task import Row, Task
from tests.profiles.test_supervisor import COMMAND, hide
from tests.support import ROOT
from tests.support.fake_worker import ENVIRONMENT

pytestmark = pytest.mark.cli

PLANTED = ("hang", "crash", "poison")
WITH_FAKES = """if True:
    import json, sys
    from profiles import __main__
    from profiles.first_light import command as first_light
    from profiles.runs import supervisor
    first_light.MIN_SECONDS, first_light.REFERENCE_SECONDS = 0, 1
    first_light.worker_command = lambda device: {command!r}
    plain = first_light._probe_task
    first_light._probe_task = lambda options: first_light.replace(
        plain(options), arguments={{"tasks": json.loads({tasks!r})}}
    )
    sys.exit(__main__.main({arguments!r}))
"""


def planted(section: str, case: str, limit_s: float = 2.0) -> Task:
    return Task(section, f"op of {case}", case, "float32", ("bad",), limit_s)


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> list[Task]:
    """The tasks that fake workers list; tests fill it."""
    tasks: list[Task] = []
    plain = first_light._probe_task

    def probe(options: object) -> Task:
        as_data = [asdict(task) for task in tasks]
        return first_light.replace(plain(options), arguments={"tasks": as_data})

    monkeypatch.setattr(first_light, "worker_command", lambda device: COMMAND)
    monkeypatch.setattr(first_light, "_probe_task", probe)
    monkeypatch.setattr(first_light, "MIN_SECONDS", 0)
    monkeypatch.setattr(first_light, "REFERENCE_SECONDS", 1)
    monkeypatch.setattr(supervisor, "GRACE_S", 0.3)
    return tasks


def first_light_code(out: Path, *more: str) -> int:
    arguments = ["first-light", "--device", "cpu", "--workers", "2", "--out", str(out)]
    return command.main([*arguments, *more])


def failure_by_case(rows: list[Row]) -> dict[str, str | None]:
    return {row["case"]: row["failure"] for row in rows}


def test_names_exactly_what_was_planted(fakes, tmp_path, capsys):
    """Guards the report: exactly the hang, crash and poisoned context are named, every case has a
    row, stages keep their order, and there are at most eight files."""
    for stage in reversed(STAGES):
        fakes += [planted(stage, f"{stage} a"), planted(stage, f"{stage} b")]
    fakes += [planted("numerics", case, 1) for case in PLANTED]
    assert first_light_code(tmp_path, "--seconds", "60") == 1
    rows = jsonl.read(tmp_path / "rows.jsonl")
    assert {case for case, failure in failure_by_case(rows).items() if failure} == {*PLANTED}
    assert len(rows) == len(fakes)
    assert list(dict.fromkeys(row["section"] for row in rows)) == list(STAGES)
    assert all("job" in row for row in rows)
    text = capsys.readouterr().out
    assert all(f"first {case}" in text for case in PLANTED)
    assert text.count("FAILED numerics") == 3 and text.count("FAILED ") == 3
    assert (tmp_path / "summary.txt").read_text() == text
    assert len(text.splitlines()) <= LINES
    assert len(list(tmp_path.iterdir())) <= 8
    assert "in misbehave" in (tmp_path / "log.txt").read_text()
    assert json.loads((tmp_path / "environment.json").read_text()) == ENVIRONMENT


def test_goes_on_where_it_stopped(fakes, tmp_path, capsys):
    """Guards the second run: good cases are not repeated, failed ones are; rows of another commit
    do not count."""
    fakes += [planted("numerics", "good"), planted("numerics", "crash"), planted("ops", "late", 90)]
    arguments = ("--seconds", "30", "--json")
    assert first_light_code(tmp_path, *arguments) == 1
    assert failure_by_case(json.loads(capsys.readouterr().out)["rows"]) == {
        "good": None,
        "crash": "the worker died: SIGSEGV",
        "late": "not started: out of time",
    }
    fakes[2] = planted("ops", "late")
    first_light_code(tmp_path, *arguments)
    assert [*failure_by_case(json.loads(capsys.readouterr().out)["rows"])] == ["crash", "late"]
    fakes.pop(1)
    assert first_light_code(tmp_path, *arguments) == 0
    assert json.loads(capsys.readouterr().out) == {"rows": [], "signals": []}
    assert "wrong numbers or hangs: none ->" in (tmp_path / "summary.txt").read_text()
    os.environ["FAKE_COMMIT"] = "def"
    try:
        assert first_light_code(tmp_path, *arguments) == 0
    finally:
        del os.environ["FAKE_COMMIT"]
    assert [*failure_by_case(json.loads(capsys.readouterr().out)["rows"])] == ["good", "late"]


def test_what_a_stage_leaves_comes_last(fakes, tmp_path, monkeypatch):
    """Guards the later stages against an earlier one that takes too long; its remaining tasks run
    at the end."""
    monkeypatch.setattr(first_light, "STAGES", {"numerics": 0.0, "tests": 0.5, "ops": 0.6})
    fakes += [planted(stage, stage) for stage in ("numerics", "tests", "ops")]
    assert first_light_code(tmp_path, "--seconds", "30") == 0
    rows = jsonl.read(tmp_path / "rows.jsonl")
    assert [row["section"] for row in rows] == ["tests", "ops", "numerics"]


def test_a_probe_that_fails_ends_it(fakes, tmp_path, monkeypatch, capsys):
    """Guards the first seconds: if no kernel runs at all, the whole error is shown at once."""
    broken = Task("probe", "silu_mul", "broken", None, ("triton",), 20)
    monkeypatch.setattr(first_light, "_probe_task", lambda options: broken)
    assert first_light_code(tmp_path, "--seconds", "60") == 1
    (row,) = jsonl.read(tmp_path / "rows.jsonl")
    assert row["failure"] == "RuntimeError: no kernel image is available"
    assert "Traceback" in row["job"]["stderr"]
    captured = capsys.readouterr()
    assert "no kernel image is available" in captured.out and "Traceback" in captured.err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_whole_lines(tmp_path, number: int):
    """Guards the results when the command is killed: whole lines, the summary, a row for each case,
    and the exit code of the signal."""
    tasks = [planted("numerics", f"a{i}") for i in range(5)] + [planted("numerics", "hang", 50)]
    tasks += [planted("ops", "b")]
    arguments = ["first-light", "--out", str(tmp_path), "--seconds", "100", "--workers", "1"]
    code = WITH_FAKES.format(
        command=COMMAND,
        tasks=json.dumps([asdict(task) for task in tasks]),
        arguments=[*arguments, "--device", "cpu", "--json"],
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    path = tmp_path / "rows.jsonl"
    for _ in range(200):
        if path.exists() and path.read_text().count("\n") == 5:
            break
        time.sleep(0.1)
    process.send_signal(number)
    document = json.loads(process.communicate(timeout=20)[0])
    assert process.returncode == 128 + number and document["signals"] == [number]
    assert path.read_text().endswith("\n")
    stopped = {"hang": "stopped", "b": "not started: stopped"}
    assert failure_by_case(jsonl.read(path)) == {f"a{i}": None for i in range(5)} | stopped
    assert "not started" in (tmp_path / "summary.txt").read_text()


def test_summary_is_short():
    """Guards the summary's length: 300 different failures fit a page, with times and decisions."""
    rows = [
        {"section": "numerics", "op": f"op{i}", "case": "c", "impl": "triton", "dtype": "x"}
        | {"failure": f"E{i}: no"}
        for i in range(300)
    ]
    step = {"section": "engine", "op": "engine_step", "case": "B16", "impl": "default"}
    step |= {"failure": None, "median_us": 7000.0, "roofline_pct": 75.4, "graphs": True}
    slow = step | {"section": "ops", "op": "sample", "impl": "triton", "median_us": 9.0}
    launch = step | {"section": "launches", "op": "launch", "median_us": 1.5}
    found = [*rows, slow, step]
    lines = summary(found, [*found, launch], ENVIRONMENT, 10.0, 0).splitlines()
    assert len(lines) == LINES
    assert "  launch in a graph: 1.50 us -> launches are cheap: attention comes first" in lines
    assert "  vision attention: not measured" in lines
    assert lines[-1].strip() == "engine_step B16, default: 7.00 ms, 75 % of roofline, CUDA graphs"
    assert lines[-2].startswith("... and ") and "rows.jsonl" in lines[-2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seconds", "30"], "'30' is not a number from 60 to 86,400"),
        (["--kernels", "none.tar"], "--kernels none.tar cannot be read: No such file"),
        (["--kernels", "/dev/null"], "--kernels /dev/null is a pipe, socket or device"),
        (["--stage", "opps"], "invalid choice: 'opps'"),
    ],
)
def test_mistakes(tmp_path, arguments: list[str], message: str):
    """Guards the one-line message for a user's mistake."""
    with pytest.raises(InputError, match=message):
        first_light_code(tmp_path, *arguments)


def test_real_work_on_a_bare_machine(tmp_path, monkeypatch):
    """Guards a GPU node with only torch, Triton and NumPy, and no .git; with real workers, for
    engine steps on a CPU."""
    absent = ["rich", "PIL", "jinja2", "tokenizers", "safetensors", "gguf", "pytest", "nvtx"]
    monkeypatch.setenv("PYTHONPATH", hide(tmp_path, absent))
    monkeypatch.setenv("GIT_DIR", "/nonexistent")
    monkeypatch.setenv("GIT_COMMIT", "abcdef")
    assert first_light_code(tmp_path / "out", "--stage", "engine", "--seconds", "90") == 0
    probe, step = jsonl.read(tmp_path / "out" / "rows.jsonl")
    assert (probe["op"], step["op"]) == ("silu_mul", "engine_step")
    assert step["commit"] == "abcdef" and step["median_us"] and step["graphs"] is False


def test_short_runs_have_short_limits(fakes, tmp_path, monkeypatch):
    """Guards short runs: a task starts only if its limit fits, so limits for five minutes would
    leave most of a short run unused."""
    monkeypatch.setattr(first_light, "REFERENCE_SECONDS", 300)
    fakes += [planted("ops", "fits", 200)]
    assert first_light_code(tmp_path, "--seconds", "60") == 0
    assert failure_by_case(jsonl.read(tmp_path / "rows.jsonl")) == {"fits": None}


def test_prerequisites_run_with_the_first_stage_that_needs_them():
    """Guards `--stage ops` and `--stage pairs`: each needs compiled kernels and the roofline, once.
    A stage that needs neither does not wait for them."""
    for section in ("compile", "roofline"):
        task = planted(section, "a")
        assert _stage_of(task, [*STAGES]) == _stage_of(task, ["pairs", "ops"]) == "pairs"
        assert _stage_of(task, ["ops", "vision"]) == "ops"
        assert _stage_of(task, ["vision"]) is None
    assert _stage_of(planted("linears", "a"), [*STAGES]) == "pairs"
    assert _stage_of(planted("linears", "a"), ["ops"]) is None
    assert [*STAGES].index("pairs") < [*STAGES].index("ops")
