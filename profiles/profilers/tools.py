"""Running profilers that are programs of their own: whether they are there, what they export."""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from kernels.runtime.spans import VARIABLE
from model.errors import InputError

INSTEAD = "`python -m profiles torch` needs PyTorch alone"
PACKAGES = {"nsys": "Nsight Systems", "ncu": "Nsight Compute"}


def tool(name: str) -> str:
    """The path of nsys or ncu. Raises InputError if it is not installed."""
    path = shutil.which(name)
    if path is None:
        raise InputError(
            f"{name} is not on the PATH: install NVIDIA {PACKAGES[name]} (it comes with the CUDA"
            f" toolkit), or do without: {INSTEAD}"
        )
    return path


def check_gpu(name: str) -> None:
    """Raise InputError on a machine without a GPU."""
    if not torch.cuda.is_available():
        raise InputError(f"{name} needs a GPU, which this machine has not: {INSTEAD}")


def spans_in_nvtx() -> dict[str, str]:
    """The environment of a child whose spans are NVTX ranges."""
    if find_spec("nvtx") is None:
        raise InputError("spans need the package `nvtx`: install it, or leave them out: --no-spans")
    return {**os.environ, VARIABLE: "nvtx"}


def show(command: Sequence[str], environment: dict[str, str] | None = None) -> str:
    """A command line as a shell takes it, with what its environment has beyond ours."""
    extra = {name: value for name, value in (environment or {}).items() if name == VARIABLE}
    return " ".join([*(f"{name}={value}" for name, value in extra.items()), shlex.join(command)])


def watched(command: Sequence[str], environment: dict[str, str] | None = None) -> int:
    """Run a command whose output is for the person at the terminal; its exit code.

    Its stdout becomes our stderr, so that ours holds the summary alone.
    """
    print(show(command, environment), file=sys.stderr, flush=True)
    return subprocess.run(command, env=environment, stdout=sys.stderr.fileno()).returncode


def reported(
    command: Sequence[str], report: Path, environment: dict[str, str] | None = None
) -> int:
    """Run a profiler that is to write `report`; its exit code. Raises InputError without one."""
    report.parent.mkdir(parents=True, exist_ok=True)
    report.unlink(missing_ok=True)
    code = watched(command, environment)
    if not report.exists():
        raise InputError(f"{Path(command[0]).name} wrote no {report}: what it said is above")
    print(f"report: {report}", file=sys.stderr)
    return code


def exported(command: Sequence[str], fails: bool = False) -> str:
    """What a command prints. Raises InputError with the last line of its complaint if it fails,
    unless it `fails` by habit.
    """
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode and not fails:
        said = (done.stderr.strip() or done.stdout.strip() or "nothing said").splitlines()
        raise InputError(f"`{shlex.join(command)}` failed: {said[-1]}")
    return done.stdout
