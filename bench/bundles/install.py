"""Installs a bundle where there is no internet, into the Python that runs this; torch stays."""

import shlex
import shutil
import sys
from collections.abc import Sequence
from importlib import invalidate_caches
from importlib.util import find_spec
from pathlib import Path

import torch

from bench.bundles.bundle import BUILT, Bundle
from bench.bundles.prepare import PIP, Failed, run_tool
from model.errors import InputError
from model.terminal import track

INSTALLED = "installed"  # in the bundle's folder: what was unpacked, shared objects among it


def install(folder: Path, names: Sequence[str], target: Path | None = None) -> list[dict]:
    """Unpack and install the bundle's items (all if none are named); a row for each.

    With `target` packages go into that folder, for PYTHONPATH. Writes env.sh with what has to be
    in the environment. Raises InputError for no bundle, or one for another Python.
    """
    bundle = Bundle(folder)
    if bundle.made_for is None:
        raise InputError(f"{folder} holds no bundle: make one with `bench peers prepare`")
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    if bundle.made_for["python"] != here:
        raise InputError(f"{folder} is for Python {bundle.made_for['python']}, this is {here}")
    unknown = [name for name in names if name not in bundle.items]
    if unknown:
        raise InputError(f"{folder} holds no {unknown[0]!r}; choose of {', '.join(bundle.items)}")
    # Modules go into the package that they are of.
    order = sorted(names or bundle.items, key=BUILT.__eq__)
    rows = [_row(bundle, name, target) for name in track(order, "install")]
    (folder / "env.sh").write_text(environment(folder), encoding="utf-8")
    return rows


def environment(folder: Path) -> str:
    """Shell lines: where the shared objects are, and what FlashInfer needs to compile more."""
    lines = ["export FLASHINFER_USE_CUDA_NORM=1"]
    for number in (2, 3):
        for path in (folder / INSTALLED / f"fa{number}").glob("*.so"):
            lines.append(f"export FA{number}_LIBRARY={shlex.quote(str(path.resolve()))}")
    headers = Path(torch.__file__).parents[1] / "nvidia/cu13/include"
    if headers.exists():
        lines.append(f"export CPATH={shlex.quote(str(headers))}${{CPATH:+:$CPATH}}")
    return "\n".join(lines) + "\n"


def _row(bundle: Bundle, name: str, target: Path | None) -> dict:
    failure = None
    try:
        _install(bundle, name, target)
    except (Failed, InputError) as reason:
        failure = str(reason)
    return {"item": name, "failure": failure}


def _install(bundle: Bundle, name: str, target: Path | None) -> None:
    folder = bundle.folder / INSTALLED / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    files = bundle.unpack(name, folder)
    if name == BUILT:
        shutil.copytree(folder, _flashinfer(target) / "data/aot", dirs_exist_ok=True)
    if any(path.suffix == ".whl" for path in files):
        into = ["--target", str(target), "--upgrade"] if target else []
        command = [*PIP, "install", "--no-index", "--no-deps", "--find-links", str(folder), *into]
        head, *needs = bundle.items[name]["wanted"]
        # What it needs is left as it is where it is there already, in whatever version.
        run_tool([*command, head, *(need.partition("==")[0] for need in needs)])


def _flashinfer(target: Path | None) -> Path:
    if target:
        return target / "flashinfer"
    invalidate_caches()
    spec = find_spec("flashinfer")
    if spec is None:
        raise Failed("FlashInfer is not installed, and these are modules of it")
    return Path(spec.origin).parent
