"""A fake worker without torch, for the supervisor's tests: a task's case says how it fails."""

import ctypes
import os
import sys
import time

from bench.measure.poison import PoisonedError
from profiles.runs.task import Row, Task
from profiles.runs.worker import serve

ENVIRONMENT = {
    "device": "fake",
    "commit": os.environ.get("FAKE_COMMIT", "abc"),
    "torch": "2",
    "triton": "3",
    "driver": None,
    "schema": 1,
}


def carry_out(task: Task) -> list[Row]:
    if task.section in ("probe", "task_list"):
        if task.case == "broken":
            raise RuntimeError("no kernel image is available")
        tasks = task.arguments["tasks"]
        return [{"failure": None, "tasks": tasks, "environment": ENVIRONMENT}]
    print("this is not an answer", flush=True)
    print(f"stderr of {task.case}", file=sys.stderr)
    for form in task.forms or (None,):
        misbehave(task.case, form)
    if task.case == "spoils":  # as a failed capture in the engine: no error, but a spoiled process
        spoiled.append(True)
    return [
        {"op": task.op, "case": task.case, "impl": form, "dtype": task.dtype, "failure": None}
        | {"pid": os.getpid()}
        | ENVIRONMENT
        for form in task.forms or (None,)
    ]


spoiled: list[bool] = []


def misbehave(case: str, form: str | None) -> None:
    """Fail as the case says, if the form is "bad" or None."""
    if form not in (None, "bad"):
        return
    if case == "hang":
        time.sleep(1000)
    if case == "captured":  # as under pytest
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        time.sleep(1000)
    if case == "crash":
        ctypes.string_at(0)
    if case == "exit":
        os._exit(3)
    if case == "poison":
        error = RuntimeError("CUDA error: an illegal memory access was encountered")
        raise PoisonedError(form, error) if form else error
    if case == "anonymous":
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    if case == "raise":
        raise ValueError("two\nlines")
    if case == "half":
        os.write(answers(), b'{"rows": [')
        os._exit(0)
    if case == "flood":
        sys.stderr.write("x" * 100_000 + "the end")


def answers() -> int:
    """The descriptor of the pipe for answers: the highest, after stdin, stdout and stderr."""
    return max(int(name) for name in os.listdir("/proc/self/fd") if _is_pipe(name))


def _is_pipe(name: str) -> bool:
    try:
        return "pipe" in os.readlink(f"/proc/self/fd/{name}")
    except OSError:
        return False


if __name__ == "__main__":
    serve(carry_out, lambda: bool(spoiled))
