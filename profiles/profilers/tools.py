"""Running external profilers (nsys, ncu): finding them, their reports and their exports."""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from kernels.runtime.spans import VARIABLE
from model.errors import InputError
from model.text.files import check_target

INSTEAD = "`python -m profiles torch` needs only PyTorch"
# The tools write numbers as the locale says. LC_ALL overrides LANG and all LC_*, for C's functions
# as for Qt and ICU, and "C" exists everywhere. Python reads and writes UTF-8 in it all the same.
LOCALE = {"LC_ALL": "C"}
PACKAGES = {"nsys": "Nsight Systems", "ncu": "Nsight Compute"}


def tool(name: str) -> str:
    """The path of nsys or ncu. Raises InputError if it is not installed."""
    path = shutil.which(name)
    if path is None:
        raise InputError(
            f"{name} is not on the PATH: install NVIDIA {PACKAGES[name]} (part of the CUDA"
            f" toolkit). Without it, {INSTEAD}"
        )
    return path


def check_gpu(name: str) -> None:
    """Raise InputError on a machine without a GPU."""
    if not torch.cuda.is_available():
        raise InputError(f"{name} needs a GPU, and this machine has none; {INSTEAD}")


def spans_in_nvtx() -> dict[str, str]:
    """The variable of a child process whose spans are NVTX ranges."""
    if find_spec("nvtx") is None:
        raise InputError("spans need the package `nvtx`: install it, or use --no-spans")
    return {VARIABLE: "nvtx"}


def c_locale_argument(parser: argparse.ArgumentParser) -> None:
    """The option of a CSV whose numbers are in C's notation."""
    parser.add_argument(
        "--c-locale",
        action="store_true",
        help="the CSV to summarise was exported with LC_ALL=C: in it, 1,234 is a thousand and more",
    )


def show(command: Sequence[str], variables: Mapping[str, str] | None = None) -> str:
    """A command line for a shell, with its variables and the locale."""
    variables = {**LOCALE, **(variables or {})}
    return " ".join(
        [*(f"{name}={value}" for name, value in variables.items()), shlex.join(command)]
    )


def run_visibly(command: Sequence[str], variables: Mapping[str, str] | None = None) -> int:
    """Run a command with these variables, its output on the terminal, and return its exit code.

    Its stdout goes to our stderr, so that our stdout has only the summary.
    """
    print(show(command, variables), file=sys.stderr, flush=True)
    environment = {**os.environ, **LOCALE, **(variables or {})}
    return subprocess.run(command, env=environment, stdout=sys.stderr.fileno()).returncode


def run_profiler(
    command: Sequence[str], report: Path, variables: Mapping[str, str] | None = None
) -> int:
    """Run a profiler that writes `report`; its exit code. Raises InputError without a report."""
    report.parent.mkdir(parents=True, exist_ok=True)
    check_target(report)
    report.unlink(missing_ok=True)
    code = run_visibly(command, variables)
    if not report.exists():
        raise InputError(f"{Path(command[0]).name} did not write {report}; its messages are above")
    print(f"report: {report}", file=sys.stderr)
    return code


def run_and_capture(command: Sequence[str], may_fail: bool = False) -> str:
    """The stdout of a command. Raises InputError with the last line of its message if it fails,
    unless it `may_fail`.
    """
    environment = {**os.environ, **LOCALE}
    done = subprocess.run(
        command, env=environment, capture_output=True, encoding="utf-8", errors="replace"
    )
    if done.returncode and not may_fail:
        message = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()
        raise InputError(f"`{show(command)}` failed: {message[-1]}")
    return done.stdout
