"""Look-ups in Triton's disk cache: the entry of a launch, and whether it is compiled.

An entry is a folder named by the hash of `triton_key-source-backend-options-environment` (Triton
3.6). A key here is that text without `triton_key`, which differs between wheels of one version.
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
    """{key: the call that compiles it} for every kernel that `launches` need on `gpu`."""
    with compiler(gpu), _Collector() as collector:
        for launch in launches:
            launch.compile()
    return collector.compile_calls


def entry(key: str) -> Path:
    """The cache folder of `key`, for the installed Triton."""
    digest = hashlib.sha256(f"{cache.triton_key()}-{key}".encode()).digest()
    return Path(triton.knobs.cache.dir) / base64.b32encode(digest).decode().rstrip("=")


def is_compiled(folder: Path) -> bool:
    """Whether an entry is complete: all files in its group file, by absolute path, exist."""
    for group in folder.glob("__grp__*.json"):
        return all(map(os.path.exists, json.loads(group.read_text())["child_paths"].values()))
    return False


def source_hash(*packages: str) -> str:
    """A hash of these packages' files: keys depend on the kernels' text, even line numbers."""
    digest = hashlib.sha256()
    for package in packages:
        folder = Path(__file__).resolve().parents[2] / package
        for path in sorted([*folder.rglob("*.py"), *folder.rglob("*.json")]):
            digest.update(path.read_bytes())
    return digest.hexdigest()


class _Collector(triton.AsyncCompileMode):
    """Collects what Triton would compile in the background, without compiling it."""

    def __init__(self) -> None:
        super().__init__(executor=None)
        self.compile_calls: dict[str, Callable[[], object]] = {}

    def submit(self, key: str, compile_fn: Callable, *_: Callable) -> None:
        self.compile_calls.setdefault(key.removeprefix(f"{cache.triton_key()}-"), compile_fn)
