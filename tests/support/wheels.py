"""Builder of wheels, and virtual environments to install them in, without network access."""

import base64
import hashlib
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# Environment variables that make Python see the checkout, or make Triton interpret.
HIDDEN = ("PYTHONPATH", "PYTHONHOME", "TRITON_INTERPRET")


@dataclass(frozen=True)
class Environment:
    """A virtual environment of this Python, and an empty folder in which its commands run."""

    folder: Path
    empty: Path

    @property
    def packages(self) -> Path:
        return next(self.folder.glob("lib/python*/site-packages"))

    def install(self, wheel: Path) -> None:
        """Install a wheel with pip, over anything installed."""
        self.pip("install", "--no-deps", "--no-index", "--force-reinstall", "--no-compile", wheel)

    def pip(self, *arguments: object) -> None:
        pip(self.empty, "--python", self.folder / "bin" / "python", *arguments)

    def run(self, *command: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
        """Run a program of the environment, by default in the empty folder."""
        program, *arguments = command
        return _run([self.folder / "bin" / program, *arguments], cwd or self.empty)


def environment(folder: Path) -> Environment:
    """A new environment in `folder`, with nothing installed, not even pip."""
    result = Environment(folder / "venv", folder / "empty")
    venv.create(result.folder, with_pip=False, symlinks=True)
    result.empty.mkdir()
    return result


def pip(cwd: Path, *arguments: object) -> None:
    """Run this Python's pip without the user's settings."""
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    done = _run(list(map(str, command)), cwd, PIP_CONFIG_FILE=os.devnull)
    assert done.returncode == 0, done.stderr


def build(root: Path, names: Sequence[str], folder: Path) -> Path:
    """Build the wheel of the project in `root` from a copy of `names`, its files and folders,
    because a build leaves files in its source. Needs setuptools."""
    source = folder / "source"
    source.mkdir()
    for name in names:
        copy = shutil.copytree if (root / name).is_dir() else shutil.copy
        copy(root / name, source / name)
    pip(folder, "wheel", "--no-deps", "--no-index", "--no-build-isolation", "-w", folder, source)
    return next(folder.glob("*.whl"))


def write(folder: Path, name: str, version: str, files: dict[str, str]) -> Path:
    """Write a wheel with these files (path -> text)."""
    info = f"{name}-{version}.dist-info"
    files = files | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    lines = [f"{path},sha256={_hash(text)},{len(text)}\n" for path, text in files.items()]
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for inside, text in files.items():
            archive.writestr(inside, text)
        archive.writestr(f"{info}/RECORD", "".join([*lines, f"{info}/RECORD,,\n"]))
    return path


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return base64.urlsafe_b64encode(digest).decode().rstrip("=")


def _run(command: Sequence[str | Path], cwd: Path, **extra: str) -> subprocess.CompletedProcess:
    env = {name: value for name, value in os.environ.items() if name not in HIDDEN} | extra
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
