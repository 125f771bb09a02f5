"""Worker process that compiles the kernels of launch sites ahead of time, without a GPU.

    python -m kernels.compile.worker CLAIMS

Reads pickled requests from stdin, each the bytes of a pickled (site, gpu) pair, and answers each
with a pickled `CompileResult`. Workers that share the folder CLAIMS compile each kernel once
between them.
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

Site = Callable[[], object]  # a picklable function that calls ops on CPU tensors


@dataclass(frozen=True)
class CompileResult:
    """The result for one site."""

    keys: tuple[str, ...]  # in Triton's cache, of every kernel that the site launches
    compiled: int = 0  # how many of them this worker compiled
    failures: tuple[str, ...] = ()  # one line for each kernel that did not compile


def launches_of(site: Site, gpu: Gpu) -> list[Launch]:
    """The launches of `site` on `gpu`; none for an op without a Triton form."""
    with (
        launches_recorded(gpu) as launches,
        unfilled(),
        torch.inference_mode(),
        suppress(ImplError),
    ):
        site()
    return launches


def compile_site(site: Site, gpu: Gpu, claims: Path) -> CompileResult:
    """Compile what `site` launches on `gpu`, unless cached or claimed by another worker."""
    pending, compiled, failures = compilations(launches_of(site, gpu), gpu), 0, []
    for key, compile_now in pending.items():
        folder = entry(key)
        if is_compiled(folder) or not _claim(claims / folder.name):
            continue
        try:
            with compiler(gpu):
                compile_now()
            compiled += 1
        except Exception as error:  # one kernel's failure must not stop the others
            failures.append(one_line(error))
    return CompileResult(tuple(pending), compiled, tuple(failures))


def main() -> None:
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # stdout is for replies, but Triton prints there code that ptxas rejects
    torch.set_num_threads(1)
    while True:
        try:
            request = pickle.load(sys.stdin.buffer)
        except (EOFError, KeyboardInterrupt):
            return
        pickle.dump(_answer(request, Path(sys.argv[1])), replies)
        replies.flush()


def _answer(request: bytes, claims: Path) -> CompileResult:
    try:
        site, gpu = pickle.loads(request)
        return compile_site(site, gpu, claims)
    except Exception as error:
        return CompileResult((), failures=(one_line(error),))


def _claim(path: Path) -> bool:
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


if __name__ == "__main__":
    # Results are pickled under an importable name, not __main__.
    from kernels.compile import worker

    worker.main()
