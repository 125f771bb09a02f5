"""The one timer of ops and model steps: `measure`. (Runs of many steps use a wall clock.)

Candidates run interleaved, in alternating order, so that drift of the machine affects all of them
alike; the result is a median with the 20th and 80th percentiles. A candidate receives the index of
an input set, and every call gets the next one, so that no candidate finds its inputs in the cache.

On a GPU a repeat is one replay of a CUDA graph that holds a call for every input set, after a read
that empties the L2. A candidate that waits for the GPU cannot be captured: it runs one call at a
time between two events, its launches included, and its timing says "events".
"""

import ctypes
import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from itertools import cycle
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from bench.measure.clocks import Clocks
from bench.measure.poison import check_poison
from kernels.errors import one_line
from kernels.runtime.arithmetic import cdiv
from model.cuda_graph import CudaGraph

Candidate = Callable[[int], object]

COLD = 5  # size of all input sets together, in last-level caches
MAX_SETS = 64
MIN_REPEATS = 5
MAX_REPEATS = 1000
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # from glibc's malloc.h


class CandidateError(Exception):
    """An error that a candidate raised while it was timed."""

    def __init__(self, candidate: str, error: Exception) -> None:
        super().__init__(f"{candidate}: {one_line(error)}")
        self.candidate, self.error = candidate, error


@dataclass(frozen=True)
class Timing:
    """Duration of one call in microseconds, over `repeats` repeats."""

    p20_us: float
    median_us: float
    p80_us: float
    repeats: int
    timer: str  # "graph", "events" or "clock"
    sm_mhz: tuple[int, int] | None = None  # lowest and highest clock of a GPU during the repeats
    slowed: str | None = None  # why the GPU slowed down: the times do not count


class Audited(Protocol):
    """What a measurement does besides timing."""

    def refresh(self, index: int) -> None:
        """Give an input set new values."""

    def check(self, name: str, repeat: "Repeat") -> None:
        """Raise an error if a candidate did not do its work while it was timed."""


@dataclass(frozen=True)
class Repeat:
    """`run` takes one sample and returns the microseconds of one call; `result` runs the same work
    and returns what the call of an input set returned."""

    run: Callable[[], float]
    timer: str
    result: Callable[[int], object]


def measure(
    candidates: Mapping[str, Candidate],
    *,
    device: torch.device | str,
    sets: int = 1,
    budget_s: float = 1.0,
    min_repeats: int | None = None,
    audit: Audited | None = None,
) -> dict[str, Timing]:
    """Time `candidates`, each called with an index below `sets`, for about `budget_s` seconds.

    Warm-up is not counted. Every candidate gets at least `min_repeats` repeats (by default
    MIN_REPEATS), however long they take. With `audit`, each candidate is checked at the end,
    and on a GPU input sets get new values between repeats. Raises CandidateError if a candidate
    fails, PoisonedError if that poisons the process.
    """
    with torch.inference_mode(), _garbage_collection_off():
        refresh = audit.refresh if audit else lambda index: None
        repeats = prepare(candidates, device=device, sets=sets, refresh=refresh)
        samples: dict[str, list[float]] = {name: [] for name in candidates}
        order = list(candidates)
        least = MIN_REPEATS if min_repeats is None else min_repeats
        clocks = Clocks(device)
        end = time.perf_counter() + budget_s
        for count in range(MAX_REPEATS):
            if count >= least and time.perf_counter() > end:
                break
            for name in order:
                with _attributed_to(name):
                    samples[name].append(repeats[name].run())
            order.reverse()
            clocks.sample()
        if audit:
            for name in candidates:
                with _attributed_to(name):
                    audit.check(name, repeats[name])
    return {name: _summary(samples[name], repeats[name].timer, clocks) for name in candidates}


def prepare(
    candidates: Mapping[str, Candidate],
    *,
    device: torch.device | str,
    sets: int = 1,
    refresh: Callable[[int], None] = lambda index: None,
) -> dict[str, Repeat]:
    """Warm up `candidates`, capture them on a GPU, and return how to sample each. On a GPU,
    `refresh` is called with the index of each input set before a sample of it, outside the time."""
    device = torch.device(device)
    repeats_on_device = _cuda_repeats if device.type == "cuda" else _cpu_repeats
    return repeats_on_device(candidates, sets, device, refresh)


@cache
def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees, as a GPU's allocator does, if its libc is
    glibc.

    By default glibc returns large blocks to the system at once, and smaller ones depending on the
    state of the heap. The same call takes several times as long when it must get its pages again.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1)):
            mallopt(option, value)


def sets_for(set_bytes: int, device: torch.device | str) -> int:
    """The number of input sets of `set_bytes` each that exceed the cache: at least one, at most
    MAX_SETS."""
    return max(1, min(MAX_SETS, cdiv(COLD * cache_bytes(torch.device(device)), max(1, set_bytes))))


@cache
def cache_bytes(device: torch.device) -> int:
    """Size of the device's last-level cache; 32 MiB for a CPU that does not report it."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    levels = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"))
    sizes = [path.read_text().strip() for path in levels]
    return max((int(size[:-1]) << 10 for size in sizes if size.endswith("K")), default=32 << 20)


def _cpu_repeats(
    candidates: Mapping[str, Candidate],
    sets: int,
    device: torch.device,
    refresh: Callable[[int], None],  # not called: its writes would disturb the cache
) -> dict[str, Repeat]:
    keep_freed_memory()
    indices = cycle(range(sets))  # shared, or a candidate would warm up the next one's inputs

    def repeat(call: Candidate) -> float:
        index = next(indices)
        start = time.perf_counter_ns()
        call(index)
        return (time.perf_counter_ns() - start) / 1e3

    for name, call in candidates.items():
        with _attributed_to(name):
            for index in range(sets):  # what a call keeps for its inputs, such as a plan's layout
                call(index)
    return {name: Repeat(partial(repeat, call), "clock", call) for name, call in candidates.items()}


def _cuda_repeats(
    candidates: Mapping[str, Candidate],
    sets: int,
    device: torch.device,
    refresh: Callable[[int], None],
) -> dict[str, Repeat]:
    evict = torch.ones(COLD * cache_bytes(device) // 4, device=device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def repeat(work: Callable[[], object], indices: Sequence[int]) -> float:
        for index in indices:
            refresh(index)
        evict.sum()  # reads only: a write would leave dirty lines for the candidate to write back
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3 / len(indices)

    def prepared(call: Candidate) -> Repeat:
        graph = _capture(call, sets, device)
        if graph is not None:
            every = range(sets)
            return Repeat(
                partial(repeat, graph.replay, every), "graph", lambda index: graph.replay()[index]
            )
        indices = cycle(range(sets))

        def one() -> float:
            index = next(indices)
            return repeat(partial(call, index), (index,))

        return Repeat(one, "events", call)

    repeats = {}
    for name, call in candidates.items():
        with _attributed_to(name):
            repeats[name] = prepared(call)
            repeats[name].run()
    return repeats


def _capture(call: Candidate, sets: int, device: torch.device) -> CudaGraph[list[object]] | None:
    """A graph of one call per input set, or None if the candidate waits for the GPU.

    A failed capture poisons the process, so waiting is detected before. Anything else that cannot
    be captured is an error.
    """
    for index in range(min(sets, 2)):  # compiles kernels, creates library handles
        call(index)
    torch.cuda.synchronize()
    if _waits(call):
        return None

    # Results are kept, so that their memory is not reused and an audit can read them.
    return CudaGraph(lambda: [call(index) for index in range(sets)], device)


def _waits(call: Candidate) -> bool:
    """Whether a call makes the host wait for the GPU."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(0)
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode(before)
        torch.cuda.synchronize()
    return False


def _summary(samples: list[float], timer: str, clocks: Clocks) -> Timing:
    p20, median, p80 = (float(value) for value in np.percentile(samples, [20, 50, 80]))
    return Timing(p20, median, p80, len(samples), timer, clocks.sm_mhz, clocks.slowed)


@contextmanager
def _attributed_to(candidate: str) -> Iterator[None]:
    """Attribute an exception raised inside to the candidate."""
    try:
        yield
    except Exception as error:
        check_poison(candidate, error)
        raise CandidateError(candidate, error) from error


@contextmanager
def _garbage_collection_off() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
