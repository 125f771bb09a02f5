"""Host and device time of steps, and how long the device idles between them."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass
class StepStats:
    """Totals over an executor's life; times in seconds.

    On a GPU, `device_s` and `idle_s` count collected steps, and `idle_s` includes the time in which
    the caller had nothing to launch. On a CPU, `device_s` is the time to compute, `host_s` the rest
    of `launch`, and `idle_s` is 0.
    """

    steps: int = 0
    rows: int = 0
    padding_rows: int = 0  # computed in addition, results unused
    plans: int = 0  # built by the host; the others advanced on the device
    host_s: float = 0.0  # in `launch`
    device_s: float = 0.0  # from a step's first kernel to its last
    idle_s: float = 0.0  # from a step's last kernel to the next one's first


@dataclass(frozen=True)
class StepEvents:
    """CUDA events around a step."""

    before: torch.cuda.Event | None  # the end of the step before it
    start: torch.cuda.Event
    end: torch.cuda.Event
    copied: torch.cuda.Event | None = None  # its results have reached the host


class StepTimer:
    """Adds to `stats`, and never makes the host wait for more than a step's results.

    On a CPU there are no `StepEvents`.
    """

    def __init__(self, stats: StepStats, device: torch.device) -> None:
        self._stats, self._cuda = stats, device.type == "cuda"
        self._last: torch.cuda.Event | None = None
        self._compute_s = 0.0

    @contextmanager
    def host(self) -> Iterator[None]:
        """Context around a whole launch."""
        start, self._compute_s = time.perf_counter(), 0.0
        yield
        self._stats.host_s += time.perf_counter() - start - self._compute_s

    def step(self, run: Callable[[], Tensor]) -> tuple[Tensor, StepEvents | None]:
        """Run the device's part of a step."""
        if not self._cuda:
            began = time.perf_counter()
            results = run()
            self._compute_s = time.perf_counter() - began
            self._stats.device_s += self._compute_s
            return results, None
        start = _event()
        results = run()
        before, self._last = self._last, _event()
        return results, StepEvents(before, start, self._last)

    def copied(self, events: StepEvents | None) -> StepEvents | None:
        """The events, with one after the copy of the results, which must have been launched."""
        return events and replace(events, copied=_event())

    def wait(self, events: StepEvents | None) -> None:
        """Wait for a step's results, and add its times."""
        if events is None:
            return
        assert events.copied is not None, (
            "call `copied` first: the copy of the results must have been launched"
        )
        events.copied.synchronize()
        self._stats.device_s += events.start.elapsed_time(events.end) / 1e3
        if events.before is not None:
            self._stats.idle_s += max(0.0, events.before.elapsed_time(events.start)) / 1e3


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
