"""Fills a bundle on a machine with a package registry and compiler, for a GPU machine without."""

import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from bench.bundles.bundle import BUILT, ITEMS, Bundle, Item, pack
from bench.measure.origin import ROOT
from model.errors import InputError
from model.terminal import track

WORK = ".work"  # in the bundle's folder: files that were fetched but are not packed yet


class ItemError(Exception):
    """Why an item could not be prepared or installed, in one line; other items are not affected."""


@dataclass(frozen=True)
class Target:
    """The machine that a bundle is for, and which FlashInfer modules are compiled for it."""

    python: str = "3.12"
    platform: str = "manylinux_2_28_x86_64"
    arch: str = "9.0a"
    modules: Sequence[str] = field(default=())  # empty: nothing is compiled


def prepare(folder: Path, names: Sequence[str], target: Target) -> list[dict]:
    """Fetch, build and pack the items that the bundle lacks; returns a row for each of `names`.

    A row's `failure` says why its item, or a part of it, is missing. Raises InputError for a folder
    that was prepared for another Python or platform.
    """
    folder.mkdir(parents=True, exist_ok=True)
    bundle, made_for = Bundle(folder), {"python": target.python, "platform": target.platform}
    if bundle.made_for not in (None, made_for):
        other = " on ".join(bundle.made_for.values())
        raise InputError(
            f"{folder} is for Python {other}; choose another --dir, or pass --python and --platform"
            " of that bundle"
        )
    bundle.made_for = made_for
    rows = [_row(bundle, name, target) for name in track(names, "prepare")]
    if not any(row["failure"] for row in rows):
        shutil.rmtree(folder / WORK, ignore_errors=True)
    return rows


def run_tool(command: Sequence[str], env: dict[str, str] | None = None) -> str:
    """Run a tool and return its stdout. Raises ItemError with the most informative error line."""
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT)
    except OSError as error:
        raise ItemError(f"{command[0]}: {error.strerror}") from None
    if done.returncode:
        lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        errors = [
            line for mark in ("fatal error:", "error:") for line in lines if mark in line.lower()
        ]
        raise ItemError((errors or lines or [f"{command[0]} failed"])[0])
    return done.stdout


def _row(bundle: Bundle, name: str, target: Target) -> dict:
    start, failure = time.monotonic(), None
    wanted = _wanted(bundle, name, target)
    kept = bundle.holds(name, wanted)
    if not kept:
        try:
            failure = _prepare_item(bundle, name, wanted, target)
        except (ItemError, InputError) as reason:
            failure = str(reason)
    pieces = bundle.items[name]["pieces"] if name in bundle.items else []
    return {
        "item": name,
        "files": [piece["file"] for piece in pieces],
        "bytes": sum(piece["bytes"] for piece in pieces),
        "seconds": time.monotonic() - start,
        "kept": kept,
        "failure": failure,
    }


def _wanted(bundle: Bundle, name: str, target: Target) -> list[str]:
    """The parts of an item: its wheels; or for modules the architecture, those that the bundle has
    and those of `target`."""
    if name in ITEMS:
        return list(ITEMS[name].wheels)
    arch, *present = bundle.items.get(name, {}).get("wanted", [None])
    if arch != target.arch or bundle.damaged(name):
        present = []
    return [target.arch, *dict.fromkeys((*present, *target.modules))]


def _prepare_item(bundle: Bundle, name: str, wanted: list[str], target: Target) -> str | None:
    """Fetch or build one item and pack it; returns why some modules are missing, or None."""
    work = bundle.folder / WORK
    staged, failures = work / name, {}
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    if name == BUILT:
        present = bundle.items.get(name, {}).get("wanted", [])
        if present[:1] == wanted[:1] and not bundle.damaged(name):
            bundle.unpack(name, staged)
        else:
            present = []
        failures = _build([part for part in wanted if part not in present], staged, work, target)
        wanted = [part for part in wanted if part not in failures]
    else:
        _fetch(ITEMS[name], staged, work / "wheels", target)
    if any(staged.iterdir()):
        bundle.add(name, wanted, pack(staged, bundle.folder / name))
    shutil.rmtree(staged)
    return "; ".join(f"{part}: {reason}" for part, reason in failures.items()) or None


def _fetch(item: Item, staged: Path, wheels: Path, target: Target) -> None:
    """Put the item's files into `staged`; wheels that are already in `wheels` are not fetched."""
    for requirement in item.wheels:
        folder = wheels / requirement  # one per wheel, so that the file can be identified
        folder.mkdir(parents=True, exist_ok=True)
        if not any(folder.glob("*.whl")):
            run_tool([*PIP, "download", *_pip_options(target), "--dest", str(folder), requirement])
        (wheel,) = folder.glob("*.whl")
        if item.pattern is None:
            shutil.copy(wheel, staged)
            continue
        with zipfile.ZipFile(wheel) as archive:
            matches = [info for info in archive.infolist() if fnmatch(info.filename, item.pattern)]
            if not matches:
                raise ItemError(f"{wheel.name} contains no {item.pattern}")
            for info in matches:
                info.filename = Path(info.filename).name
                archive.extract(info, staged)


PIP = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")


def _pip_options(target: Target) -> list[str]:
    """pip's options: only wheels, for the target's platform and compatible older ones."""
    match = re.fullmatch(r"manylinux_2_(\d+)_(\w+)", target.platform)
    names = [target.platform]
    if match:
        minor, machine = int(match[1]), match[2]
        names = [f"manylinux_2_{m}_{machine}" for m in range(minor, 4, -1)]
        names += [f"manylinux{year}_{machine}" for year in ("2014", "2010", "1")]
    platforms = [option for name in names for option in ("--platform", name)]
    return ["--no-deps", "--only-binary=:all:", "--python-version", target.python, *platforms]


def _build(names: Sequence[str], staged: Path, work: Path, target: Target) -> dict[str, str]:
    """Build FlashInfer modules, each as STEM/STEM.so. Returns the reasons of failed ones."""
    env, failures = _build_environment(work, target.arch), {}
    for name in track([name for name in names if name != target.arch], "modules"):
        try:
            command = [sys.executable, "-m", "bench.bundles.flashinfer_modules", name]
            built = Path(run_tool(command, env).splitlines()[-1])
        except ItemError as reason:
            failures[name] = str(reason)
            continue
        folder = staged / built.stem
        folder.mkdir(exist_ok=True)
        shutil.copy(built, folder)
    return failures


def _build_environment(work: Path, arch: str) -> dict[str, str]:
    """The environment for building: FlashInfer for this Python, CUDA's compiler, a libcuda stub."""
    home, site, stubs = _cuda_home(), work / "site", work / "stubs"
    if not (site / "flashinfer").exists():
        wheels = ["--no-deps", "--only-binary=:all:", *ITEMS["flashinfer"].wheels]
        run_tool([*PIP, "install", "--target", str(site), *wheels])
    stubs.mkdir(parents=True, exist_ok=True)
    # A machine without a GPU lacks the driver's library; linking needs only its name.
    source, soname = stubs / "empty.cpp", "-Wl,-soname,libcuda.so.1"
    source.write_text("")
    compiler = os.environ.get("CXX", "c++")
    run_tool([compiler, "-shared", "-fPIC", soname, str(source), "-o", str(stubs / "libcuda.so")])
    return os.environ | {
        "FLASHINFER_CUDA_ARCH_LIST": arch,
        "FLASHINFER_WORKSPACE_BASE": str(work.resolve()),
        "FLASHINFER_EXTRA_LDFLAGS": f"-L{stubs.resolve()}",
        "FLASHINFER_USE_CUDA_NORM": "1",
        "CUDA_HOME": str(home),
        "PYTHONPATH": str(site.resolve()),
        "PATH": f"{site.resolve() / 'bin'}{os.pathsep}{os.environ['PATH']}",  # ninja
    }


def _cuda_home() -> Path:
    nvcc = shutil.which("nvcc")
    from_nvcc = [Path(nvcc).resolve().parents[1]] if nvcc else []  # wrong if nvcc is a wrapper
    from_env = [Path(os.environ["CUDA_HOME"])] if os.environ.get("CUDA_HOME") else []
    for home in (*from_env, *from_nvcc, Path("/usr/local/cuda")):
        if (home / "bin/nvcc").exists() and (home / "include/cuda_runtime.h").exists():
            return home
    raise ItemError("building needs nvcc and CUDA's headers; set CUDA_HOME to their folder")
