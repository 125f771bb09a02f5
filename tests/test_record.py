"""`python -m profiles record`: what it would do, in which order, and what it keeps."""

import json
import subprocess
import sys

import pytest
import torch

from bench import roofline, rows, timing
from bench.cases import OPS
from model.terminal import InputError
from profiles import __main__ as command
from profiles import record as record_module
from profiles.record import Task, record, select, tasks

CPU = torch.device("cpu")
ROOT = rows.ROOT
ABSENT = ["rich", "PIL", "jinja2", "tokenizers", "safetensors", "gguf", "transformers", "skimage"]
ON_A_BARE_MACHINE = f"""
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {ABSENT}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
import torch
torch.set_num_threads(2)
import bench.__main__
from profiles.__main__ import main
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Few repeats and a small roofline, measured anew; a clean commit."""
    monkeypatch.setattr(timing, "MAX_REPEATS", timing.MIN_REPEATS)
    monkeypatch.setitem(roofline.GEMM_SIZE, "cpu", 64)
    monkeypatch.setitem(roofline.COPY_CACHES, "cpu", 1)
    monkeypatch.setattr(rows, "commit", lambda: "abc")
    rows.machine.cache_clear()
    yield
    rows.machine.cache_clear()
    roofline.roofline.cache_clear()
    roofline._copy_gb_s.cache_clear()


def planned(log, name, section="ops", fail=None):
    """A task that notes its run and makes one row."""

    def run():
        log.append(name)
        if fail:
            raise fail
        row = {"op": "op", "case": name, "impl": "eager", "dtype": "float32", "failure": None}
        return [row | rows.origin(CPU)]

    return Task(section, "op", name, torch.float32, run)


def test_everything_is_planned():
    """Guards against an op, a dtype or a batch size that is never measured."""
    for kind, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        work = list(tasks(torch.device(kind)))
        assert [*dict.fromkeys(task.section for task in work)] == [
            "roofline",
            "numerics",
            "decode",
            "engine",
            "vision",
            "ops",
        ]
        keys = [(task.section, task.key) for task in work]
        assert len(set(keys)) == len(keys), "tasks with one key: the second would never be redone"
        checked = {(task.op, task.dtype) for task in work if task.section == "numerics"}
        assert checked == {
            (op, dtype) for op in OPS for dtype in (torch.float32, torch.float16, torch.bfloat16)
        }
        timed = {(task.op, task.dtype) for task in work if task.section == "ops"}
        assert timed == {(op, dtype) for op in OPS}
    steps = {task.case for task in work if task.section == "decode"}
    assert steps == {f"step3-vl-10b B{batch} P2048 S512" for batch in (1, 16, 64)}
    steps = {task.case for task in work if task.section == "engine"}
    assert steps == {f"step3-vl-10b B{batch} P2048 S128" for batch in (16, 32, 64)}


def test_budget(tmp_path):
    """Guards the time limit of a machine: nothing new is started, and what is left is named."""
    log, now = [], iter([0.0, 0.0, 5.0, 10.0, 15.0])
    work = [planned(log, name) for name in "abcd"]
    outcome = record(tmp_path, CPU, work, budget_s=10, clock=lambda: next(now))
    assert log == ["a", "b"]
    assert [task.case for task in outcome.left_out] == ["c", "d"]
    assert [row["case"] for row in rows.read(tmp_path / "ops.jsonl")] == ["a", "b"]


def test_resumes(tmp_path):
    """Guards against measuring twice, and against leaving out what failed the first time."""
    log = []
    first = [planned(log, "a"), planned(log, "b", fail=RuntimeError("out of memory\ntrace"))]
    outcome = record(tmp_path, CPU, first, budget_s=60)
    assert outcome.rows[1]["failure"] == "RuntimeError: out of memory"
    again = [planned(log, name) for name in "abc"]
    outcome = record(tmp_path, CPU, again, budget_s=60)
    assert log == ["a", "b", "c", "b"]
    assert outcome.kept == 1
    record(tmp_path, CPU, again, budget_s=60)
    assert log == ["a", "b", "c", "b"]


def test_missing_rows_come_first_and_then_the_oldest(tmp_path, monkeypatch):
    """Guards short runs after every commit: each would measure the first sections anew and never
    come to the others. Rows of another machine are none, and rows without a time are the oldest."""
    row = {"op": "op", "impl": "eager", "dtype": "float32", "failure": None} | rows.origin(CPU)
    untimed = {name: value for name, value in row.items() if name != "time"}

    def taken(name, second, **other):
        return row | {"case": name, "time": f"2026-01-01T00:00:0{second}Z"} | other

    old = [taken("late", 9), taken("early", 1), untimed | {"case": "untimed"}]
    old += [taken("elsewhere", 1, device="another machine"), taken("renewed", 1)]
    rows.append(tmp_path / "ops.jsonl", [*old, taken("renewed", 8)])
    rows.append(tmp_path / "numerics.jsonl", [taken("middle", 5)])
    monkeypatch.setattr(rows, "commit", lambda: "def")
    rows.machine.cache_clear()
    log = []
    work = [planned(log, "middle", "numerics")]
    names = ("late", "renewed", "early", "untimed", "elsewhere", "never")
    record(tmp_path, CPU, [*work, *(planned(log, name) for name in names)], budget_s=60)
    assert log == ["elsewhere", "never", "untimed", "early", "middle", "renewed", "late"]


@pytest.mark.parametrize(
    ("first", "second"), [("abc", "def"), ("abc+dirty", "abc+dirty"), ("unknown", "unknown")]
)
def test_other_code_is_measured_anew(tmp_path, monkeypatch, first, second):
    """Guards against rows of other code, or of code that nobody can name, passing as this one's."""
    log = []
    for commit in (first, second):
        monkeypatch.setattr(rows, "commit", lambda commit=commit: commit)
        rows.machine.cache_clear()
        record(tmp_path, CPU, [planned(log, "a")], budget_s=60)
    assert log == ["a", "a"]


def test_rows_are_on_disk_at_once(tmp_path):
    """Guards what was measured before a run was ended in the middle."""
    work = [planned([], "a", "numerics"), planned([], "b", fail=KeyboardInterrupt())]
    with pytest.raises(KeyboardInterrupt):
        record(tmp_path, CPU, work, budget_s=60)
    assert [row["case"] for row in rows.read(tmp_path / "numerics.jsonl")] == ["a"]
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["commit"] == "abc"
    assert environment["torch"] == torch.__version__


def test_model_is_released_between_sections(tmp_path, monkeypatch):
    """Guards the memory of a small GPU: the 10B must not stay beside the op table."""
    held = []
    monkeypatch.setattr(record_module.Step3VL, "from_preset", lambda *a, **k: held.append(a) or a)
    record_module._model("tiny", CPU, torch.float32)
    record_module._model("tiny", CPU, torch.float32)
    assert len(held) == 1
    record(tmp_path, CPU, [planned([], "a")], budget_s=60)
    assert record_module._model.cache_info().currsize == 0


def test_command(tmp_path, capsys):
    """Guards the command from end to end on real, small cases, and its second run."""
    arguments = ["record", "--out", str(tmp_path), "--device", "cpu", "--json"]
    assert (
        command.main([*arguments, "--section", "numerics", "ops", "--shape", "rms_norm T1 "]) == 0
    )
    made = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert made["left_out"] == []
    assert {row["dtype"] for row in made["rows"]} == {"bfloat16", "float16", "float32"}
    assert (
        rows.read(tmp_path / "numerics.jsonl") + rows.read(tmp_path / "ops.jsonl") == made["rows"]
    )
    assert command.main([*arguments, "--section", "ops", "--shape", "rms_norm T1 "]) == 0
    assert json.loads(capsys.readouterr().out) == {"rows": [], "kept": 1, "left_out": []}


def test_decode_step_is_recorded(tmp_path, capsys):
    """Guards the path that a GPU takes with the 10B, here with `tiny`."""
    arguments = ["record", "--out", str(tmp_path), "--device", "cpu", "--section", "decode"]
    assert command.main([*arguments, "--shape", "B4"]) == 0
    eager, default, *parts = rows.read(tmp_path / "decode.jsonl")
    assert eager["case"] == default["case"] == "tiny B4 P256 S64"
    assert default["roofline_pct"] > 0
    assert {row["op"] for row in parts} == {"decode_part"}
    assert f"{2 + len(parts)} rows written" in capsys.readouterr().out


def test_images_are_recorded(tmp_path):
    """Guards the path that a GPU takes with the 10B's tower, here with that of `tiny`."""
    arguments = ["record", "--out", str(tmp_path), "--device", "cpu", "--section", "vision"]
    assert command.main([*arguments, "--shape", "728 x 728"]) == 0
    eager, default = rows.read(tmp_path / "vision.jsonl")
    assert eager["case"] == default["case"] == "tiny 728 x 728"
    assert default["views"] == 1 and default["gemm_pct"] > 0


def test_mistakes(tmp_path):
    """Guards the one clear line for a user's mistake."""
    with pytest.raises(InputError, match="unknown section 'opps'; choose of roofline, numerics"):
        select(list(tasks(CPU)), ["opps"], "")
    with pytest.raises(InputError, match="'softmax'"):
        select(list(tasks(CPU)), [], "softmax")
    with pytest.raises(InputError, match="--budget must be a positive"):
        command.main(["record", "--out", str(tmp_path), "--budget", "0"])
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write"):
        record(tmp_path / "file", CPU, [planned([], "a")], budget_s=60)


def test_bare_machine(tmp_path):
    """Guards a GPU node with torch, Triton and NumPy alone: no other package may be needed."""
    arguments = ["record", "--out", str(tmp_path), "--device", "cpu"]
    arguments += ["--section", "numerics", "--shape", "T1 C97"]
    script = f"{ON_A_BARE_MACHINE}sys.exit(main({arguments}))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(rows.read(tmp_path / "numerics.jsonl")) == 12


@pytest.mark.gpu
def test_gpu_environment(tmp_path):
    """Guards the record of the machine behind the rows."""
    record(tmp_path, torch.device("cuda"), [planned([], "a")], budget_s=60)
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["device"] == torch.cuda.get_device_name()
    assert environment["driver"]
    assert environment["state"]["clocks.max.sm"].endswith("MHz")


def test_engine_steps_are_recorded(tmp_path):
    """Guards the path that a GPU takes with the 10B's engine, on a machine without a tokenizer."""
    arguments = ["record", "--out", str(tmp_path), "--device", "cpu", "--section", "engine"]
    code = f"{ON_A_BARE_MACHINE}\nsys.exit(main({arguments}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    eager, default = rows.read(tmp_path / "engine.jsonl")
    assert eager["case"] == default["case"] == "tiny B4 P256 S16"
    assert eager["same_tokens"] == default["same_tokens"] == 1
    assert default["tokens_per_second"] > 0
