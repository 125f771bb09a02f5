"""The origin of a row: device, versions, commit and time."""

import os
import platform
import subprocess
import time
from dataclasses import asdict
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import kernels
from bench.rows.schema import Origin
from kernels.compile.cache import source_hash

ROOT = Path(__file__).resolve().parents[2]
# Benchmarks use it as a long prompt. In a wheel it is in the metadata, next to the packages.
LICENCE = next(ROOT.glob("step3vl_pacore-*.dist-info/licenses/LICENSE"), ROOT / "LICENSE")


def origin(device: torch.device) -> dict:
    """The fields of Origin: where a row is measured, and when."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return asdict(Origin(time=now, **machine(device)))


@cache
def machine(device: torch.device) -> dict:
    """The fields of Origin without the time."""
    return {
        "device": device_name(device),
        "commit": commit(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "driver": nvidia_smi("driver_version") if device.type == "cuda" else None,
    }


@cache
def device_name(device: torch.device) -> str:
    """The GPU's name; or the CPU's, which may say little, with the instruction set that torch uses
    and the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    instructions = torch.backends.cpu.get_cpu_capability()
    return f"{name}, {instructions}, {torch.get_num_threads()} threads"


@cache
def commit() -> str:
    """The checkout's commit, with "+dirty" for tracked changes other than to recorded rows: the
    rows that a run adds must not change its commit.

    Outside a checkout, the environment variable GIT_COMMIT, or else the version with a hash of the
    code: "0.1.0+0123456789ab".
    """
    head = git("rev-parse", "--short=12", "HEAD")
    if head is None:
        code = source_hash("kernels", "model", "pacore_sched", "bench")
        return os.environ.get("GIT_COMMIT") or f"{kernels.__version__}+{code[:12]}"
    status = ("status", "--porcelain", "--untracked-files=no")
    changes = git(*status, "--", ".", ":(exclude)profiles/results")
    return head + ("+dirty" if changes else "")


def git(*arguments: str) -> str | None:
    """The output of git in this project's own checkout; None if it fails, and in a wheel, which may
    be inside another project's repository."""
    return _output("git", "-C", str(ROOT), *arguments) if (ROOT / ".git").exists() else None


def nvidia_smi(fields: str) -> str | None:
    """The first GPU's `fields` from nvidia-smi, comma-separated; None if it is missing."""
    text = _output("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader")
    return text.splitlines()[0] if text else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """The output of a command; None if it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
