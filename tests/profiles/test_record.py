"""`python -m profiles record`: its tasks, their order, and the rows that it keeps."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bench.rows import jsonl
from bench.suite import OPS
from model.errors import InputError
from profiles import __main__ as command
from profiles.runs import supervisor as supervisor_module
from profiles.runs.record import RecordResult, record
from profiles.runs.supervisor import ROOT, Supervisor
from profiles.runs.task import Row, Task, outstanding, select
from profiles.runs.task_lists import record as planned_tasks
from tests.profiles.test_supervisor import COMMAND, hide
from tests.support.fake_worker import ENVIRONMENT

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ORIGIN = {name: ENVIRONMENT[name] for name in ("device", "commit")}
ABSENT = ["rich", "PIL", "jinja2", "tokenizers", "safetensors", "gguf", "transformers", "skimage"]


@pytest.fixture
def supervisor(monkeypatch: pytest.MonkeyPatch) -> Iterator[Supervisor]:
    monkeypatch.setattr(supervisor_module, "GRACE_S", 0.3)
    with Supervisor(COMMAND, end=time.monotonic() + 60) as supervisor:
        yield supervisor


def planned(name: str, section: str = "ops") -> Task:
    """A task for fake workers, with one row."""
    return Task(section, "op", name, "float32", ("bad",), 5.0)


def run(
    out: Path, work: list[Task], supervisor: Supervisor, tasks_in_time: int = 100
) -> RecordResult:
    left = iter(range(tasks_in_time))
    return record(out, work, supervisor, ORIGIN, lambda: next(left, None) is not None)


def row_of(name: str, **other: object) -> Row:
    row = {"section": "ops", "op": "op", "case": name, "impl": "bad", "dtype": "float32"}
    return row | {"failure": None, "time": "2026-01-01T00:00:05Z"} | ORIGIN | other


def test_everything_is_listed():
    """Guards against an op, dtype or batch size that is never measured, and against an engine that
    spoils the process before the ops were timed."""
    for device, dtype in ((CPU, "float32"), (CUDA, "bfloat16")):
        work = planned_tasks(device)
        assert [*dict.fromkeys(task.section for task in work)] == [
            *(["compile"] if device is CUDA else []),
            "roofline",
            "numerics",
            "ops",
            "decode",
            "engine",
            "vision",
        ]
        keys = [(task.section, task.key) for task in work]
        assert len(set(keys)) == len(keys), "tasks with one key: the second would never be redone"
        checked = {(task.op, task.dtype) for task in work if task.section == "numerics"}
        assert checked == {(op, name) for op in OPS for name in ("float32", "float16", "bfloat16")}
        timed = {(task.op, task.dtype) for task in work if task.section == "ops"}
        assert timed == {(op, dtype) for op in OPS}
    steps = {task.case for task in work if task.section == "decode"}
    assert steps == {f"step3-vl-10b B{batch} P2048 S512" for batch in (1, 16, 64)}
    steps = {task.case for task in work if task.section == "engine"}
    assert steps == {f"step3-vl-10b B{batch} P2048 S128" for batch in (16, 32, 64)}


def test_forms():
    """Guards eight minutes on a GPU: by default no form that compiles for every case; on request
    only the named forms and peers, no breakdown, or wrong forms too."""

    def forms(**options: object) -> dict[str, set[str]]:
        by_section: dict[str, set[str]] = {}
        for task in planned_tasks(CUDA, **options):
            by_section.setdefault(task.section, set()).update(task.forms)
        return by_section

    ours = {"eager", "portable", "triton", "triton-invariant", "triton-separate", "triton-fused"}
    quick = {"sdpa", "sdpa-flash", "sdpa-cudnn", "cudnn", "cudnn-folded"}
    steps = {"eager", "default", "default, FP8 KV"}
    assert forms() == {
        "compile": set(),
        "roofline": set(),
        "numerics": ours,
        "ops": ours | quick,
        "decode": steps,
        "engine": steps - {"eager"},
        "vision": {"eager", "default", "portable"},
    }
    assert forms(peers=False)["ops"] == ours
    selected = forms(forms=("triton", "flex", "default"))
    assert selected["ops"] == {"triton", "flex"} and selected["numerics"] == {"triton"}
    assert selected["decode"] == selected["engine"] == {"default"}
    with pytest.raises(InputError, match="unknown form 'tritn'; choose from: eager, portable"):
        planned_tasks(CUDA, forms=("tritn",))
    for breakdown in (True, False):
        tasks = planned_tasks(CUDA, breakdown=breakdown, anyway=not breakdown)
        of = {task.section: task.arguments for task in tasks}
        assert of["decode"]["breakdown"] == breakdown and of["ops"]["anyway"] != breakdown


@pytest.mark.cli
def test_budget(tmp_path, supervisor):
    """Guards a machine's time limit: nothing starts after it, and the remaining tasks are named."""
    result = run(tmp_path, [planned(name) for name in "abcd"], supervisor, tasks_in_time=2)
    assert [task.case for task in result.left_out] == ["c", "d"]
    assert [row["case"] for row in jsonl.read(tmp_path / "ops.jsonl")] == ["a", "b"]


@pytest.mark.cli
def test_resumes(tmp_path, supervisor):
    """Guards against measuring twice, and against skipping what failed the first time."""
    result = run(tmp_path, [planned("a"), planned("raise")], supervisor)
    assert [row["failure"] for row in result.rows] == [None, "ValueError: two"]
    result = run(tmp_path, [planned(name) for name in ("a", "raise", "c")], supervisor)
    assert [row["case"] for row in result.rows] == ["c", "raise"]
    assert result.kept == 1
    assert run(tmp_path, [planned(name) for name in "ac"], supervisor).rows == []


def test_missing_rows_come_first_and_then_the_oldest():
    """Guards short runs after every commit: each would measure the first sections again and never
    reach the others. Rows of other machines do not count; rows without a time are the oldest."""
    untimed = row_of("untimed", commit="old")
    del untimed["time"]
    rows = [
        row_of("late", time="9", commit="old"),
        row_of("early", time="1", commit="old"),
        untimed,
        row_of("elsewhere", time="1", device="another"),
        row_of("renewed", time="1", commit="old"),
        row_of("renewed", time="8", commit="old"),
        row_of("middle", time="5", commit="old", section="numerics"),
    ]
    names = ("late", "renewed", "early", "untimed", "elsewhere", "never")
    work = [planned("middle", "numerics"), *map(planned, names)]
    order = [task.case for task in outstanding(work, rows, ORIGIN)]
    assert order == ["elsewhere", "never", "untimed", "early", "middle", "renewed", "late"]


@pytest.mark.parametrize(
    ("taken", "now", "done"),
    [
        ("abc", "abc", True),
        ("abc", "def", False),
        ("abc+dirty", "abc+dirty", False),
        ("unknown", "unknown", False),
    ],
)
def test_other_code_is_measured_again(taken: str, now: str, done: bool):
    """Guards against rows of other or unknown code that pass as this commit's."""
    rows = [row_of("a", commit=taken)]
    assert (outstanding([planned("a")], rows, ORIGIN | {"commit": now}) == []) == done


def test_done_means_every_form():
    """Guards a case whose peer was not measured, or one of whose forms failed last. A case that
    does not fit the memory has one row for all forms."""
    task = Task("ops", "op", "a", "float32", ("triton", "eager"))
    triton, eager = row_of("a", impl="triton"), row_of("a", impl="eager")
    attempt = row_of("a", impl=None, failure="killed")
    for rows, done in (
        ([triton], False),
        ([triton, eager], True),
        ([triton, eager | {"failure": "off"}], False),
        ([triton, eager | {"failure": "off"}, eager], True),
        ([triton, eager, attempt], False),
        ([attempt, triton, eager], True),
        ([row_of("a", impl="all", skipped="needs 900 GB")], True),
        ([row_of("a", impl="all", section="numerics")], False),
    ):
        assert (outstanding([task], rows, ORIGIN) == []) == done, rows


@pytest.mark.cli
def test_rows_are_on_disk_at_once(tmp_path):
    """Guards the rows that were measured before a run was killed."""
    code = f"""if True:
        import time
        from pathlib import Path
        from profiles.runs.supervisor import Supervisor, stops_on_signals
        from tests.profiles.test_record import COMMAND, planned, run
        work = [planned("a", "numerics"), planned("hang")]
        supervisor = Supervisor(COMMAND, end=time.monotonic() + 60)
        with supervisor, stops_on_signals(supervisor):
            result = run(Path({str(tmp_path)!r}), work, supervisor)
        print([row["failure"] for row in result.rows])
    """
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    for _ in range(300):
        if (tmp_path / "numerics.jsonl").exists():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=20)[0] in ("[None, 'stopped']\n", "[None]\n")
    assert [row["case"] for row in jsonl.read(tmp_path / "numerics.jsonl")] == ["a"]


@pytest.mark.cli
def test_command_on_a_bare_machine(tmp_path, monkeypatch, capsys):
    """Guards the whole command and its second run on small, real cases, on a node with only torch,
    Triton and NumPy, and no .git."""
    monkeypatch.setenv("GIT_DIR", "/nonexistent")
    monkeypatch.setenv("GIT_COMMIT", "abc")
    monkeypatch.setenv("PYTHONPATH", hide(tmp_path, ABSENT))
    out = tmp_path / "out"
    arguments = ["record", "--out", str(out), "--device", "cpu", "--json"]
    arguments += ["--section", "numerics", "ops", "--shape", "rms_norm T1 "]
    assert command.main(arguments) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["left_out"] == []
    assert {row["dtype"] for row in document["rows"]} == {"bfloat16", "float16", "float32"}
    timed = jsonl.read(out / "ops.jsonl")
    assert jsonl.read(out / "numerics.jsonl") + timed == document["rows"]
    assert [row["impl"] for row in timed] == ["eager", "portable"]
    assert all(row["median_us"] > 0 for row in timed)
    environment = json.loads((out / "environment.json").read_text())
    assert environment["commit"] == "abc" and environment["torch"] == torch.__version__
    assert command.main(arguments) == 0
    kept = len({(row["op"], row["case"], row["dtype"], row["section"]) for row in document["rows"]})
    assert json.loads(capsys.readouterr().out) == {"rows": [], "kept": kept, "left_out": []}


@pytest.mark.cli
def test_mistakes(tmp_path, monkeypatch, supervisor):
    """Guards the one-line message for a user's mistake, also if a worker finds it."""
    work = planned_tasks(CPU)
    with pytest.raises(InputError, match="unknown section 'opps'; choose from: roofline, numerics"):
        select(work, ["opps"], "")
    with pytest.raises(InputError, match="'softmax'"):
        select(work, [], "softmax")
    with pytest.raises(InputError, match="--budget: '0' is not a number above 0"):
        command.main(["record", "--out", str(tmp_path), "--budget", "0"])
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write"):
        run(tmp_path / "file", [planned("a")], supervisor)
    with pytest.raises(InputError, match="unknown form 'tritn'"):
        command.main(["record", "--out", str(tmp_path), "--device", "cpu", "--forms", "tritn"])


@pytest.mark.cli
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(tmp_path):
    """Guards the message of both commands on a machine without a GPU."""
    for name in ("record", "first-light"):
        with pytest.raises(InputError, match="^device 'cuda': this machine has no GPU"):
            command.main([name, "--out", str(tmp_path), "--device", "cuda"])
