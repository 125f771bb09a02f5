"""Fills a bundle on a machine with package registry and compiler, for a GPU machine without."""

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
from bench.rows import ROOT
from model.errors import InputError
from model.terminal import track

WORK = ".work"  # in the bundle's folder: what was fetched and not packed yet


class Failed(Exception):
    """Why an item could not be made, in one line; the others are not affected."""


@dataclass(frozen=True)
class Target:
    """The machine that the bundle is for, and how FlashInfer's modules are compiled for it."""

    python: str = "3.12"
    platform: str = "manylinux_2_28_x86_64"
    arch: str = "9.0a"
    modules: Sequence[str] = field(default=())  # none: build nothing


def prepare(folder: Path, names: Sequence[str], target: Target) -> list[dict]:
    """Fetch, build and pack the items that are not there yet; a row for each of them.

    A row's `failure` says why its item is missing, or what of it is. Raises InputError for a folder
    that was made for another Python or platform.
    """
    folder.mkdir(parents=True, exist_ok=True)
    bundle, made_for = Bundle(folder), {"python": target.python, "platform": target.platform}
    if bundle.made_for not in (None, made_for):
        there = " on ".join(bundle.made_for.values())
        raise InputError(f"{folder} is for Python {there}: give another --dir, or these")
    bundle.made_for = made_for
    rows = [_row(bundle, name, target) for name in track(names, "prepare")]
    if not any(row["failure"] for row in rows):
        shutil.rmtree(folder / WORK, ignore_errors=True)
    return rows


def run_tool(command: Sequence[str], env: dict[str, str] | None = None) -> str:
    """What a tool prints. Raises Failed with the line of its complaint that tells most."""
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT)
    except OSError as error:
        raise Failed(f"{command[0]}: {error.strerror}") from None
    if done.returncode:
        lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        told = [
            line for mark in ("fatal error:", "error:") for line in lines if mark in line.lower()
        ]
        raise Failed((told or lines or [f"{command[0]} failed"])[0])
    return done.stdout


def _row(bundle: Bundle, name: str, target: Target) -> dict:
    start, failure = time.monotonic(), None
    wanted = _wanted(bundle, name, target)
    kept = bundle.holds(name, wanted)
    if not kept:
        try:
            failure = _make(bundle, name, wanted, target)
        except (Failed, InputError) as reason:
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
    """An item's wheels; of modules the architecture, those that are there and those asked for."""
    if name in ITEMS:
        return list(ITEMS[name].wheels)
    arch, *there = bundle.items.get(name, {}).get("wanted", [None])
    if arch != target.arch or bundle.damaged(name):
        there = []
    return [target.arch, *dict.fromkeys((*there, *target.modules))]


def _make(bundle: Bundle, name: str, wanted: list[str], target: Target) -> str | None:
    """Fill and pack one item. Of modules those that were built; returns what the others lack."""
    work = bundle.folder / WORK
    staged, failures = work / name, {}
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    if name == BUILT:
        there = bundle.items.get(name, {}).get("wanted", [])
        if there[:1] == wanted[:1] and not bundle.damaged(name):
            bundle.unpack(name, staged)
        else:
            there = []
        failures = _build([part for part in wanted if part not in there], staged, work, target)
        wanted = [part for part in wanted if part not in failures]
    else:
        _fetch(ITEMS[name], staged, work / "wheels", target)
    if any(staged.iterdir()):
        bundle.add(name, wanted, pack(staged, bundle.folder / name))
    shutil.rmtree(staged)
    return "; ".join(f"{part}: {reason}" for part, reason in failures.items()) or None


def _fetch(item: Item, staged: Path, wheels: Path, target: Target) -> None:
    """The item's files into `staged`; pip takes a wheel that is in `wheels` already from there."""
    for requirement in item.wheels:
        into = wheels / requirement  # of its own, so that its wheel is known
        into.mkdir(parents=True, exist_ok=True)
        if not any(into.glob("*.whl")):
            run_tool([*PIP, "download", *_for(target), "--dest", str(into), requirement])
        (wheel,) = into.glob("*.whl")
        if item.takes is None:
            shutil.copy(wheel, staged)
            continue
        with zipfile.ZipFile(wheel) as archive:
            found = [info for info in archive.infolist() if fnmatch(info.filename, item.takes)]
            if not found:
                raise Failed(f"{wheel.name} holds no {item.takes}")
            for info in found:
                info.filename = Path(info.filename).name
                archive.extract(info, staged)


PIP = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")


def _for(target: Target) -> list[str]:
    """pip's options: wheels alone, of any platform that the target's has room for."""
    match = re.fullmatch(r"manylinux_2_(\d+)_(\w+)", target.platform)
    names = [target.platform]
    if match:
        minor, machine = int(match[1]), match[2]
        names = [f"manylinux_2_{m}_{machine}" for m in range(minor, 4, -1)]
        names += [f"manylinux{year}_{machine}" for year in ("2014", "2010", "1")]
    platforms = [option for name in names for option in ("--platform", name)]
    return ["--no-deps", "--only-binary=:all:", "--python-version", target.python, *platforms]


def _build(names: Sequence[str], staged: Path, work: Path, target: Target) -> dict[str, str]:
    """FlashInfer's modules, each as STEM/STEM.so. Returns why those that failed did."""
    env, failures = _build_environment(work, target.arch), {}
    for name in track([name for name in names if name != target.arch], "modules"):
        try:
            command = [sys.executable, "-m", "bench.bundles.flashinfer_modules", name]
            built = Path(run_tool(command, env).splitlines()[-1])
        except Failed as reason:
            failures[name] = str(reason)
            continue
        into = staged / built.stem
        into.mkdir(exist_ok=True)
        shutil.copy(built, into)
    return failures


def _build_environment(work: Path, arch: str) -> dict[str, str]:
    """Where FlashInfer for this Python, CUDA's compiler and libcuda to link with are found."""
    home, site, stubs = _cuda_home(), work / "site", work / "stubs"
    if not (site / "flashinfer").exists():
        wheels = ["--no-deps", "--only-binary=:all:", *ITEMS["flashinfer"].wheels]
        run_tool([*PIP, "install", "--target", str(site), *wheels])
    stubs.mkdir(parents=True, exist_ok=True)
    # The driver's library is not on a machine without a GPU; its name is all that linking needs.
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
    beside = [Path(nvcc).resolve().parents[1]] if nvcc else []  # or a wrapper in /usr/local/bin
    named = [Path(os.environ["CUDA_HOME"])] if os.environ.get("CUDA_HOME") else []
    for home in (*named, *beside, Path("/usr/local/cuda")):
        if (home / "bin/nvcc").exists() and (home / "include/cuda_runtime.h").exists():
            return home
    raise Failed("needs nvcc and CUDA's headers (CUDA_HOME names their folder)")
