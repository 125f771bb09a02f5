"""Compiles kernels before they are launched, in separate processes, with a progress bar.

    warm_up(engine_sites(config, dtype), device)

Without this, the first answer or timing waits silently while Triton compiles one kernel after
another. A site calls ops on CPU tensors (`launch_sites.py` here and in bench/); what it would
launch on a GPU is recorded and compiled into Triton's cache on disk. The processes never use a GPU.
"""

import hashlib
import json
import os
import pickle
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Timer

import torch
import triton
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.runtime.cache import triton_key

from kernels.compile.cache import entry, is_compiled, source_hash
from kernels.compile.worker import CompileResult, Site
from kernels.runtime.configs import Gpu, gpu_of
from kernels.runtime.environment import variable
from model.terminal import track

ROOT = Path(__file__).resolve().parents[2]
MAX_WORKERS = 16  # each imports PyTorch: about 0.5 GB
LIMIT_S = 900.0  # time limit of a warm-up


@dataclass(frozen=True)
class Summary:
    """What all sites launch: keys in Triton's cache, in order, and the number compiled now."""

    keys: tuple[str, ...]
    compiled: int
    failures: tuple[str, ...]


def compile_ahead(
    sites: Sequence[Site],
    gpus: Sequence[Gpu],
    *,
    workers: int | None = None,
) -> Summary:
    """Compile what `sites` launch on `gpus` into Triton's cache, except what is there already."""
    items = [pickle.dumps((site, gpu)) for gpu in gpus for site in sites]
    count = min(workers or len(os.sched_getaffinity(0)), MAX_WORKERS, len(items))
    with (
        tempfile.TemporaryDirectory() as claims,
        _Pool(count, claims) as pool,
        ThreadPoolExecutor(max(1, count)) as threads,
    ):
        pending = threads.map(pool.compile, items)
        results = list(track(pending, "compiling kernels", total=len(items)))
    keys = dict.fromkeys(key for result in results for key in result.keys)
    failures = dict.fromkeys(failure for result in results for failure in result.failures)
    return Summary(tuple(keys), sum(result.compiled for result in results), tuple(failures))


def warm_up(sites: Sequence[Site], device: torch.device) -> None:
    """On CUDA, `compile_ahead` for the device's GPU; if that fails, one warning.

    Launches that an earlier run of the same code found compiled are not recorded again.
    PACORE_WARM_UP=0 in the environment leaves compilation to the first launches.
    """
    enabled = variable("PACORE_WARM_UP") == "1" and not triton.knobs.runtime.interpret
    if not (enabled and device.type == "cuda" and sites):
        return
    try:
        gpu = gpu_of(device)
        stamp = _stamp(sites, gpu)
        if _is_cached(stamp):
            return
        summary = compile_ahead(sites, [gpu])
        if summary.failures:
            raise RuntimeError(summary.failures[0])
        stamp.parent.mkdir(parents=True, exist_ok=True)
        stamp.write_text(json.dumps([str(entry(key)) for key in summary.keys]))
    except Exception as error:  # not fatal: launches compile what is missing
        text = f"kernels are compiled at first use, not ahead of time: {error}"
        warnings.warn(text, stacklevel=2)


def _stamp(sites: Sequence[Site], gpu: Gpu) -> Path:
    """A file named after everything that the launches of `sites` on `gpu` and their keys
    depend on."""
    digest = hashlib.sha256(pickle.dumps((sites, gpu)))
    env = {name: os.environ[name] for name in os.environ if name.startswith(("PACORE_", "TRITON_"))}
    triton_env = get_cache_invalidating_env_vars()
    text = source_hash("kernels", "model", "pacore_sched", "bench")
    parts = (text, triton_key(), torch.__version__, sorted(env.items()), triton_env)
    digest.update(str(parts).encode())
    return Path(triton.knobs.cache.dir) / "warm_up" / f"{digest.hexdigest()}.json"


def _is_cached(stamp: Path) -> bool:
    return stamp.exists() and all(is_compiled(Path(path)) for path in json.loads(stamp.read_text()))


class _Pool:
    """Worker processes; one that dies is replaced, until the time limit ends them all."""

    def __init__(self, count: int, claims: str) -> None:
        paths = os.pathsep.join(dict.fromkeys([str(ROOT), *filter(None, sys.path)]))
        hidden = {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        self._environment = os.environ | hidden
        self._environment.pop("TRITON_INTERPRET", None)
        self._command = [sys.executable, "-m", "kernels.compile.worker", claims]
        self._processes: list[subprocess.Popen] = []
        self._idle: SimpleQueue[subprocess.Popen] = SimpleQueue()
        self._closed = False
        self._limit = Timer(LIMIT_S, self._end)
        for _ in range(count):
            self._idle.put(self._start())

    def compile(self, item: bytes) -> CompileResult:
        """A worker's result for an item; waits until a worker is free."""
        worker = self._idle.get()
        assert worker.stdin and worker.stdout  # pipes, as _start has them
        try:
            pickle.dump(item, worker.stdin)
            worker.stdin.flush()
            result = pickle.load(worker.stdout)
        except (EOFError, OSError, pickle.UnpicklingError):
            why = f"not done in {LIMIT_S:.0f} s" if self._closed else f"exit code {worker.wait()}"
            result = CompileResult((), failures=(f"a process that compiles kernels ended: {why}",))
            worker = worker if self._closed else self._start()
        self._idle.put(worker)
        return result

    def __enter__(self) -> "_Pool":
        self._limit.daemon = True
        self._limit.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._limit.cancel()
        self._end()
        for process in self._processes:
            process.wait()
            assert process.stdin and process.stdout
            with suppress(OSError):  # closing flushes what a dead process did not read
                process.stdin.close()
            process.stdout.close()

    def _start(self) -> subprocess.Popen:
        process = subprocess.Popen(
            self._command,
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self._processes.append(process)
        return process

    def _end(self) -> None:
        self._closed = True
        for process in self._processes:
            process.kill()
