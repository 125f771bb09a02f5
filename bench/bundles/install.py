"""Installs a bundle into the running Python, without internet access or changes to torch."""

import shlex
import shutil
import sys
from collections.abc import Sequence
from importlib import invalidate_caches
from importlib.util import find_spec
from pathlib import Path

import torch

from bench.bundles.bundle import BUILT, Bundle
from bench.bundles.prepare import PIP, ItemError, run_tool
from model.errors import InputError
from model.terminal import track
from model.text.files import check_target

INSTALLED = "installed"  # in the bundle's folder: the unpacked items, with their shared objects


def install(folder: Path, names: Sequence[str], target: Path | None = None) -> list[dict]:
    """Unpack and install the bundle's items (all if none are named); returns a row for each.

    With `target`, packages are installed into that folder, for PYTHONPATH. Writes env.sh, which
    sets environment variables. Raises InputError without a bundle, or for another Python's.
    """
    bundle = Bundle(folder)
    check_target(folder / "env.sh")
    if bundle.made_for is None:
        raise InputError(f"{folder} contains no bundle; create one with `bench peers prepare`")
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    if bundle.made_for["python"] != here:
        raise InputError(f"{folder} is for Python {bundle.made_for['python']}, this is {here}")
    unknown = [name for name in names if name not in bundle.items]
    if unknown:
        known = ", ".join(bundle.items)
        raise InputError(f"{folder} contains no {unknown[0]!r}; choose one of {known}")
    # Modules last: they are copied into FlashInfer's package.
    order = sorted(names or bundle.items, key=BUILT.__eq__)
    rows = [_row(bundle, name, target) for name in track(order, "install")]
    (folder / "env.sh").write_text(environment(folder), encoding="utf-8")
    return rows


def environment(folder: Path) -> str:
    """Shell lines that set the shared objects' paths, and what FlashInfer needs to compile more."""
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
    except (ItemError, InputError) as reason:
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
        package, *dependencies = bundle.items[name]["wanted"]
        # A dependency that is already installed is left unchanged, in any version.
        names = (dependency.partition("==")[0] for dependency in dependencies)
        run_tool([*command, package, *names])


def _flashinfer(target: Path | None) -> Path:
    if target:
        return target / "flashinfer"
    invalidate_caches()
    spec = find_spec("flashinfer")
    if spec is None:
        raise ItemError(
            "FlashInfer, which these modules belong to, is not installed; install the item"
            " flashinfer first"
        )
    return Path(spec.origin).parent
