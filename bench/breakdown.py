"""What a piece of work is made of: its time by the spans inside it (kernels/runtime/spans.py)."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from kernels.runtime.spans import Ranges, use

WHOLE = "breakdown"  # the span round one call
REPEATS = 3


def parts(call: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Microseconds of one call by kind of span, the first word of its name; medians of REPEATS.

    A span's time is without that of the spans inside it; "other" is what no op or product has, so
    that the parts add up to the call. On a CPU these are times on the clock; on a GPU those of the
    kernels that a span launches, without the gaps between them.
    """
    call()
    take = _by_kernels if device.type == "cuda" else _by_clock
    times: dict[str, list[float]] = defaultdict(list)
    for _ in range(REPEATS):
        for kind, us in take(call).items():
            times[kind].append(us)
    return {kind: median(of_kind) for kind, of_kind in times.items()}


def _by_clock(call: Callable[[], object]) -> dict[str, float]:
    """By this thread's clock: a profiler would cost small ops more than they take."""
    own: dict[str, float] = defaultdict(float)
    inside = [0.0]  # of each open span, the time of those right inside it

    @contextmanager
    def span(name: str) -> Iterator[None]:
        inside.append(0.0)
        start = time.perf_counter()
        try:
            yield
        finally:
            whole = time.perf_counter() - start
            own[_kind(name)] += 1e6 * (whole - inside.pop())
            inside[-1] += whole

    with use(Ranges(span, lambda name: lambda: None)), span(WHOLE):
        call()
    return own


def _by_kernels(call: Callable[[], object]) -> dict[str, float]:
    with use("torch"), profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        with record_function(WHOLE):
            call()
        torch.cuda.synchronize()
    own: dict[str, float] = defaultdict(float)
    for event in found.events():
        if event.name == WHOLE and _on_host(event):
            for inner in _walk(event):
                own[_kind(inner.name)] += _own_us(inner)
    return own


def _kind(name: str) -> str:
    """The first word, as of "linear down"; what a layer does beside ops and products is "other"."""
    first, _, rest = name.partition(" ")
    return "other" if name == WHOLE or rest.startswith("layer") else first


def _on_host(event: FunctionEvent) -> bool:
    return event.is_user_annotation and event.device_type == torch.autograd.DeviceType.CPU


def _own_us(event: FunctionEvent) -> float:
    """Time of a span's kernels less that of the spans right inside it."""
    inner = sum(inside.device_time_total for inside in _inside(event))
    return event.device_time_total - inner


def _inside(event: FunctionEvent) -> Iterator[FunctionEvent]:
    """The outermost spans within one."""
    for child in event.cpu_children:
        if _on_host(child):
            yield child
        else:
            yield from _inside(child)


def _walk(event: FunctionEvent) -> Iterator[FunctionEvent]:
    yield event
    for inner in _inside(event):
        yield from _walk(inner)
