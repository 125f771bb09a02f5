"""Wheels, and virtual environments to install them into, without the network."""

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

# What makes Python see the checkout, or Triton interpret.
HIDDEN = ("PYTHONPATH", "PYTHONHOME", "TRITON_INTERPRET")


@dataclass(frozen=True)
class Environment:
    """A virtual environment of this Python, and an empty folder that its commands run in."""

    folder: Path
    empty: Path

    @property
    def packages(self) -> Path:
        return next(self.folder.glob("lib/python*/site-packages"))

    def install(self, wheel: Path) -> None:
        """Install a wheel as pip does, over whatever is there."""
        self.pip("install", "--no-deps", "--no-index", "--force-reinstall", "--no-compile", wheel)

    def pip(self, *arguments: object) -> None:
        pip(self.empty, "--python", self.folder / "bin" / "python", *arguments)

    def run(self, *command: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
        """A program of the environment, in the empty folder."""
        program, *arguments = command
        return _run([self.folder / "bin" / program, *arguments], cwd or self.empty)


def environment(folder: Path) -> Environment:
    """A new one in `folder`, with nothing installed, not even pip."""
    made = Environment(folder / "venv", folder / "empty")
    venv.create(made.folder, with_pip=False, symlinks=True)
    made.empty.mkdir()
    return made


def pip(cwd: Path, *arguments: object) -> None:
    """This Python's pip without anybody's settings."""
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    done = _run(list(map(str, command)), cwd, PIP_CONFIG_FILE=os.devnull)
    assert done.returncode == 0, done.stderr


def build(root: Path, names: Sequence[str], folder: Path) -> Path:
    """The wheel of the project in `root`, made from a copy of the files and folders it consists of:
    a build leaves some behind. Needs setuptools."""
    source = folder / "source"
    source.mkdir()
    for name in names:
        copy = shutil.copytree if (root / name).is_dir() else shutil.copy
        copy(root / name, source / name)
    pip(folder, "wheel", "--no-deps", "--no-index", "--no-build-isolation", "-w", folder, source)
    return next(folder.glob("*.whl"))


def write(folder: Path, name: str, version: str, files: dict[str, str]) -> Path:
    """A wheel of some files."""
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
