"""What steps cost the host and the device, and how long the device waits between them."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass
class StepStats:
    """Counts over an executor's life; times in seconds.

    On a GPU `device_s` and `idle_s` count steps that have been collected, and the next step's wait
    includes the caller's, if it had nothing to launch. On a CPU `device_s` is what computing took,
    `host_s` the rest of `launch`, and nothing idles.
    """

    steps: int = 0
    rows: int = 0
    padding_rows: int = 0  # computed beside them, for nobody
    plans: int = 0  # laid out by the host; the others advanced on the device
    host_s: float = 0.0  # in `launch`
    device_s: float = 0.0  # from a step's first kernel to its last
    idle_s: float = 0.0  # from a step's last kernel to the next one's first


@dataclass(frozen=True)
class StepEvents:
    """CUDA events around a step."""

    before: torch.cuda.Event | None  # the end of the step before it
    start: torch.cuda.Event
    end: torch.cuda.Event
    copied: torch.cuda.Event | None = None  # its results are on the host


class StepTimer:
    """Adds to `stats`, without ever making the host wait for more than a step's results.

    There are no `StepEvents` on a CPU.
    """

    def __init__(self, stats: StepStats, device: torch.device) -> None:
        self._stats, self._cuda = stats, device.type == "cuda"
        self._last: torch.cuda.Event | None = None
        self._computing = 0.0

    @contextmanager
    def host(self) -> Iterator[None]:
        """Around all that a launch does."""
        start, self._computing = time.perf_counter(), 0.0
        yield
        self._stats.host_s += time.perf_counter() - start - self._computing

    def step(self, run: Callable[[], Tensor]) -> tuple[Tensor, StepEvents | None]:
        """Run what the device does of a step."""
        if not self._cuda:
            began = time.perf_counter()
            results = run()
            self._computing = time.perf_counter() - began
            self._stats.device_s += self._computing
            return results, None
        start = _event()
        results = run()
        before, self._last = self._last, _event()
        return results, StepEvents(before, start, self._last)

    def copied(self, times: StepEvents | None) -> StepEvents | None:
        """The same, once the copy of the results has been launched."""
        return times and replace(times, copied=_event())

    def wait(self, times: StepEvents | None) -> None:
        """Wait for a step's results, and count its times."""
        if times is None:
            return
        assert times.copied is not None, "the copy of the results has been launched"
        times.copied.synchronize()
        self._stats.device_s += times.start.elapsed_time(times.end) / 1e3
        if times.before is not None:
            self._stats.idle_s += max(0.0, times.before.elapsed_time(times.start)) / 1e3


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
