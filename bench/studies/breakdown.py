"""A call's time by part: a breakdown by the spans inside it (kernels/runtime/spans.py)."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from kernels.runtime.spans import Ranges, use

WHOLE = "breakdown"  # the span around one call
REPEATS = 3


def parts(call: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Microseconds of one call by part (the first word of a span's name: "linear" of "linear
    down"): medians of REPEATS.

    A span's time excludes the spans inside it; "other" is everything outside ops and products, so
    that the parts add up to the call. On a CPU these are wall-clock times; on a GPU they are the
    times of the kernels that a span launches, without the gaps between kernels.
    """
    call()
    breakdown = _by_kernels if device.type == "cuda" else _by_clock
    times: dict[str, list[float]] = defaultdict(list)
    for _ in range(REPEATS):
        for kind, us in breakdown(call).items():
            times[kind].append(us)
    return {kind: median(samples) for kind, samples in times.items()}


def _by_clock(call: Callable[[], object]) -> dict[str, float]:
    """Wall-clock times on this thread: a profiler would cost small ops more than they take."""
    self_us: dict[str, float] = defaultdict(float)
    nested = [0.0]  # for each open span, the seconds of the spans directly inside it

    @contextmanager
    def span(name: str) -> Iterator[None]:
        nested.append(0.0)
        start = time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - start
            self_us[_part(name)] += 1e6 * (elapsed - nested.pop())
            nested[-1] += elapsed

    with use(Ranges(span, lambda name: lambda: None)), span(WHOLE):
        call()
    return self_us


def _by_kernels(call: Callable[[], object]) -> dict[str, float]:
    with use("torch"), profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        with record_function(WHOLE):
            call()
        torch.cuda.synchronize()
    self_us: dict[str, float] = defaultdict(float)
    for event in trace.events():
        if event.name == WHOLE and _on_host(event):
            for inner in _walk(event):
                self_us[_part(inner.name)] += _self_us(inner)
    return self_us


def _part(name: str) -> str:
    """A span's part: its first word; "other" for a layer's time outside ops."""
    first, _, rest = name.partition(" ")
    return "other" if name == WHOLE or rest.startswith("layer") else first


def _on_host(event: FunctionEvent) -> bool:
    return bool(event.is_user_annotation) and event.device_type == torch.autograd.DeviceType.CPU


def _self_us(event: FunctionEvent) -> float:
    """Time of a span's kernels minus that of the spans directly inside it."""
    nested = sum(child.device_time_total for child in _child_spans(event))
    return event.device_time_total - nested


def _child_spans(event: FunctionEvent) -> Iterator[FunctionEvent]:
    """The outermost spans inside a span."""
    for child in event.cpu_children:
        if _on_host(child):
            yield child
        else:
            yield from _child_spans(child)


def _walk(event: FunctionEvent) -> Iterator[FunctionEvent]:
    yield event
    for inner in _child_spans(event):
        yield from _walk(inner)
