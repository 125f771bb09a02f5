"""The supervisor: a task that hangs, crashes or poisons its process costs only its own result."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from profiles.runs import supervisor as supervisor_module
from profiles.runs.supervisor import Supervisor
from profiles.runs.task import OUT_OF_TIME, STOPPED, Result, Task

pytestmark = pytest.mark.cli

COMMAND = [sys.executable, "-m", "tests.support.fake_worker"]
ROOT = supervisor_module.ROOT


@pytest.fixture
def supervisor(monkeypatch: pytest.MonkeyPatch) -> Iterator[Supervisor]:
    monkeypatch.setattr(supervisor_module, "GRACE_S", 0.3)
    with Supervisor(COMMAND, end=time.monotonic() + 60) as supervisor:
        yield supervisor


def task(case: str, *forms: str, op: str = "op", limit_s: float = 20.0) -> Task:
    return Task("section", op, case, "float32", forms, limit_s)


def hide(folder: Path, packages: Sequence[str]) -> str:
    """A PYTHONPATH with which processes cannot import `packages`."""
    (folder / "sitecustomize.py").write_text(
        f"""if True:
        import sys

        class Absent:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in {list(packages)}:
                    raise ModuleNotFoundError(name)

        sys.meta_path.insert(0, Absent())
        """
    )
    return str(folder)


def run(supervisor: Supervisor, tasks: Sequence[Task], **options: object) -> list[Result]:
    return list(supervisor.run(tasks, **{"may_start": lambda task: True} | options))


def test_every_task_has_a_result(supervisor: Supervisor):
    """Guards the tasks after one that hangs, crashes, exits, raises, poisons its context or answers
    half a line: each has a result, in order, and only the misbehaving ones failed."""
    bad = ["hang", "crash", "exit", "raise", "poison", "half"]
    cases = [name for pair in zip(bad, "abcdef", strict=True) for name in pair]
    results = run(supervisor, [task(case, limit_s=1 if case == "hang" else 20) for case in cases])
    assert [result.task.case for result in results] == cases
    failures = {result.task.case: result.failure for result in results if result.failure}
    assert failures == {
        "hang": "no answer within 1 s: killed",
        "crash": "the worker died: SIGSEGV",
        "exit": "the worker died: exit code 3",
        "raise": "ValueError: two",
        "poison": "RuntimeError: CUDA error: an illegal memory access was encountered",
        "half": "the worker died: exit code 0",
    }
    codes = {result.task.case: result.exit_code for result in results if result.exit_code}
    assert codes == {"hang": -9, "crash": -11, "exit": 3, "poison": 86}


def test_stderr_is_kept(supervisor: Supervisor):
    """Guards the explanation: the stacks of a hung task, the stderr of a crashed one, only the end
    of a flood, and nothing of the previous task."""
    cases = ["hang", "captured", "crash", "raise", "flood", "fine"]
    hang, captured, crash, error, flood, fine = run(
        supervisor, [task(case, limit_s=1) for case in cases]
    )
    for result in (hang, captured):
        assert "Timeout" in result.stderr and "in misbehave" in result.stderr
    assert "Segmentation fault" in crash.stderr and "string_at" in crash.stderr
    assert "ValueError: two\nlines" in error.stderr
    assert flood.stderr.endswith("the end") and len(flood.stderr) == 4000
    assert fine.stderr == "this is not an answer\nstderr of fine\n"


def test_a_poisoned_worker_is_replaced(supervisor: Supervisor):
    """Guards the tasks after an illegal access: in the same process all would fail. A task that
    spoils its process without an error, as a failed capture may, ends it too."""
    cases = ("a", "b", "poison", "c", "spoils", "d")
    a, b, _, c, spoils, d = run(supervisor, [task(case) for case in cases])
    pids = [result.rows[0]["pid"] for result in (a, b, c, spoils, d)]
    assert pids[0] == pids[1] and pids[2] == pids[3] and len({*pids}) == 3
    assert spoils.failure is None and spoils.exit_code == 86


def test_the_form_at_fault_is_left_out(supervisor: Supervisor):
    """Guards the other forms of a case: they run again without the one that poisoned it."""
    first, again = run(supervisor, [task("poison", "good", "bad", "fine")])
    assert first.form == "bad" and [row["impl"] for row in first.as_rows({})] == ["bad"]
    assert [row["impl"] for row in again.rows] == ["good", "fine"]


@pytest.mark.parametrize("case", ["hang", "crash", "anonymous"])
def test_forms_run_one_by_one_if_the_faulty_one_is_unknown(supervisor: Supervisor, case: str):
    """Guards the other forms of a case when the process died before it could name one, or does not
    know. The attempt itself has a row without a form."""
    attempt, good, bad = run(supervisor, [task(case, "good", "bad", limit_s=1)])
    assert [row["impl"] for row in attempt.as_rows({})] == [None]
    assert good.rows[0]["impl"] == "good" and not good.failure
    assert bad.form == "bad" and bad.failure


def test_a_form_that_cost_three_workers_is_given_up(supervisor: Supervisor):
    """Guards the time: a kernel that hangs at every shape would use it all up. Forms of that name
    of other ops still run, and so do other forms of the op."""
    tasks = [task("crash", "bad") for _ in range(4)]
    tasks += [task("crash", "bad", "good"), task("crash", "bad", op="other")]
    *results, dropped, good, other = run(supervisor, tasks)
    assert [result.failure for result in results] == ["the worker died: SIGSEGV"] * 3 + [
        "not started: this form has lost 3 workers"
    ]
    assert dropped.task.forms == ("bad",) and dropped.failure.startswith("not started")
    assert good.rows[0]["impl"] == "good"
    assert other.failure == "the worker died: SIGSEGV"


def test_workers_share_the_tasks(supervisor: Supervisor):
    """Guards the parallel stages: no task runs twice or is lost when one crashes."""
    cases = [f"case {index}" for index in range(20)]
    results = run(supervisor, [task("crash"), *map(task, cases)], workers=3)
    assert sorted(result.task.case for result in results) == sorted(["crash", *cases])
    assert len({result.rows[0]["pid"] for result in results if result.rows}) > 1


def test_what_may_not_start(supervisor: Supervisor):
    """Guards the end of the time: tasks that may not start get a result, others still run."""
    tasks = [task("a"), task("late"), task("b")]
    results = run(supervisor, tasks, may_start=lambda task: task.case != "late")
    assert [result.failure for result in results] == [None, OUT_OF_TIME, None]


def test_nothing_outlasts_the_end(monkeypatch: pytest.MonkeyPatch):
    """Guards the caller's time limit: at its end, even a task within its own limit is killed."""
    monkeypatch.setattr(supervisor_module, "GRACE_S", 0.1)
    start = time.monotonic()
    with Supervisor(COMMAND, end=start + 1.5) as supervisor:
        (result,) = run(supervisor, [task("hang", limit_s=100)])
    assert time.monotonic() - start < 5
    assert "killed" in result.failure


def test_a_worker_that_cannot_start(supervisor: Supervisor):
    """Guards a machine on which torch cannot be imported: the result has the reason, and no form is
    given up because of it."""
    supervisor._command = [sys.executable, "-c", "import no_such_module"]
    results = run(supervisor, [task("a", "x")] * 3 + [task("a", "x", "y")])
    for result in results:
        assert result.failure == "the worker died: exit code 1"
        assert "No module named 'no_such_module'" in result.stderr
    assert [row["impl"] for row in results[-1].as_rows({})] == ["x", "y"]
    supervisor._command = COMMAND
    assert [result.failure for result in run(supervisor, [task("a", "x")])] == [None]


def test_a_spare_worker_is_ready(monkeypatch: pytest.MonkeyPatch):
    """Guards ten seconds of a GPU's time per replaced worker: the spare has already imported torch.
    No spare outlives the supervisor, and none is used for another environment."""
    started: list[Mapping[str, str]] = []

    class Counted(supervisor_module.Worker):
        def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
            super().__init__(command, environment)
            started.append(environment)

    monkeypatch.setattr(supervisor_module, "Worker", Counted)
    with Supervisor(COMMAND, end=time.monotonic() + 60, spare=True) as supervisor:
        results = run(supervisor, [task("a")], environment={"CHECKED": "1"})
        assert started == [{"CHECKED": "1"}, {}]
        results += run(supervisor, [task(case) for case in ("b", "poison", "c")])
        assert started == [{"CHECKED": "1"}, {}, {}, {}]
        spare = supervisor._spare
        results += run(supervisor, [task("d")])
    pids = [result.rows[0]["pid"] for result in results if result.rows]
    assert len({*pids}) == 4 and pids[-1] == spare._process.pid
    assert supervisor._spare._process.wait(5) == -signal.SIGKILL


def test_stop(supervisor: Supervisor):
    """Guards an interrupted run: the running task is given up at once, and no other starts."""
    tasks = [task("a"), task("hang"), task("b")]
    results = []
    for result in supervisor.run(tasks, may_start=lambda task: True):
        results.append(result)
        supervisor.stop()
    assert [result.failure for result in results] in ([None], [None, "stopped"])


def test_stopped_before_it_began(supervisor: Supervisor):
    """Guards against a signal before the first task: it still gets a result."""
    supervisor.stop()
    assert supervisor.run_one(task("a")).failure == STOPPED


def test_workers_end_with_their_parent(tmp_path):
    """Guards the GPU's memory: a busy worker must not outlive a killed supervisor."""
    code = """if True:
        import os, sys, time
        from profiles.runs.supervisor import Supervisor
        from tests.profiles.test_supervisor import COMMAND, task
        supervisor = Supervisor(COMMAND, end=time.monotonic() + 60)
        tasks = [task("a"), task("hang")]
        for result in supervisor.run(tasks, may_start=lambda task: True):
            print(result.rows[0]["pid"], flush=True)
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    worker = int(parent.stdout.readline())
    os.kill(worker, 0)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    for _ in range(100):
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail(f"the worker {worker} outlived its supervisor")


def test_supervisor_imports_no_torch():
    """Guards the supervisor's start-up time and its survival: neither command imports torch."""
    code = "import sys, profiles.first_light.command, profiles.runs.record;"
    code += "print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def test_rows_of_a_failure_name_every_form():
    """Guards the rows: no form may vanish with its process, and every row fits into JSON."""
    result = Result(task("a", "x", "y"), failure=OUT_OF_TIME, seconds=0.12345, stderr="why")
    rows = result.as_rows({"device": "d", "commit": "c"})
    assert [(row["impl"], row["failure"]) for row in rows] == [
        ("x", OUT_OF_TIME),
        ("y", OUT_OF_TIME),
    ]
    assert rows[0]["job"] == {
        "seconds": 0.123,
        "exit_code": None,
        "cache_misses": 0,
        "stderr": "why",
    }
    assert "job" not in rows[1] and rows[1]["device"] == "d"
    json.dumps(rows)
