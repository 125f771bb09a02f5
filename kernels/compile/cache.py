"""Triton's cache of compiled kernels on disk: which entry a launch has, and whether it is there.

An entry is a folder, named by the hash of `triton_key-source-backend-options-environment` (Triton
3.6). A key here is that text without its first part, which differs between wheels of one version.
"""

import base64
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import triton
from triton.runtime import cache

from kernels.compile.launches import Launch, compiler
from kernels.runtime.configs import Gpu


def compilations(launches: Iterable[Launch], gpu: Gpu) -> dict[str, Callable[[], object]]:
    """The keys that `launches` look up on `gpu`, and the call that compiles each."""
    with compiler(gpu), _Collector() as collector:
        for launch in launches:
            launch.compile()
    return collector.found


def entry(key: str) -> Path:
    """The entry of `key` in the cache, for the Triton that is installed."""
    digest = hashlib.sha256(f"{cache.triton_key()}-{key}".encode()).digest()
    return Path(triton.knobs.cache.dir) / base64.b32encode(digest).decode().rstrip("=")


def is_compiled(folder: Path) -> bool:
    """Whether an entry is whole: its group lists files by their absolute paths."""
    for group in folder.glob("__grp__*.json"):
        return all(map(os.path.exists, json.loads(group.read_text())["child_paths"].values()))
    return False


def sources(*packages: str) -> str:
    """A hash of packages of this project: keys depend on kernels' text, down to line numbers."""
    digest = hashlib.sha256()
    for package in packages:
        folder = Path(__file__).resolve().parents[2] / package
        for path in sorted([*folder.rglob("*.py"), *folder.rglob("*.json")]):
            digest.update(path.read_bytes())
    return digest.hexdigest()


class _Collector(triton.AsyncCompileMode):
    """Takes what Triton would compile in the background, and compiles nothing."""

    def __init__(self) -> None:
        super().__init__(executor=None)
        self.found: dict[str, Callable[[], object]] = {}

    def submit(self, key: str, compile_fn: Callable, *_: Callable) -> None:
        self.found.setdefault(key.removeprefix(f"{cache.triton_key()}-"), compile_fn)
