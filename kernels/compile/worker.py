"""Compiles ahead of time what sites launch; run as a process that sees no GPU.

    python -m kernels.compile.worker CLAIMS

Answers each (site, gpu) that it reads with `Found`. Workers that share the folder CLAIMS compile
every kernel once between them.
"""

import os
import pickle
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from kernels.compile.cache import compilations, entry, is_compiled
from kernels.compile.launches import Launch, compiler, launches_recorded
from kernels.compile.unfilled import unfilled
from kernels.errors import ImplError, one_line
from kernels.runtime.configs import Gpu

Site = Callable[[], object]  # calls ops on CPU tensors; can be pickled


@dataclass(frozen=True)
class Found:
    """What a site launches: its keys in Triton's cache, and how many of them were compiled now."""

    keys: tuple[str, ...]
    compiled: int = 0
    failures: tuple[str, ...] = ()


def launches_of(site: Site, gpu: Gpu) -> list[Launch]:
    """What `site` would launch on `gpu`: nothing for an op that has no Triton form."""
    with (
        launches_recorded(gpu) as launches,
        unfilled(),
        torch.inference_mode(),
        suppress(ImplError),
    ):
        site()
    return launches


def compile_site(site: Site, gpu: Gpu, claims: Path) -> Found:
    """Compile what `site` launches on `gpu`, unless it is in the cache or another worker's."""
    found, compiled, failures = compilations(launches_of(site, gpu), gpu), 0, []
    for key, compile_now in found.items():
        folder = entry(key)
        if is_compiled(folder) or not _claim(claims / folder.name):
            continue
        try:
            with compiler(gpu):
                compile_now()
            compiled += 1
        except Exception as error:  # one kernel must not cost the others
            failures.append(one_line(error))
    return Found(tuple(found), compiled, tuple(failures))


def main() -> None:
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # Triton prints there what ptxas refuses
    torch.set_num_threads(1)
    while True:
        try:
            item = pickle.load(sys.stdin.buffer)
        except (EOFError, KeyboardInterrupt):
            return
        pickle.dump(_answer(item, Path(sys.argv[1])), replies)
        replies.flush()


def _answer(item: bytes, claims: Path) -> Found:
    try:
        site, gpu = pickle.loads(item)
        return compile_site(site, gpu, claims)
    except Exception as error:
        return Found((), failures=(one_line(error),))


def _claim(path: Path) -> bool:
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


if __name__ == "__main__":
    from kernels.compile import worker  # `Found` under the name by which it is unpickled

    worker.main()
