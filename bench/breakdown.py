"""What a piece of work is made of: its time by the spans inside it (kernels/_spans.py)."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from statistics import median

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from kernels._spans import use

WHOLE = "breakdown"  # the span round one call
REPEATS = 5


def parts(call: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Microseconds of one call by kind of span, the first word of its name; medians of REPEATS.

    A span's time is without that of the spans inside it; "other" is what no op or product has, so
    that the parts add up to the call. On a CPU these are times on the clock, the profiler's own
    cost among them; on a GPU those of the kernels, without the gaps between them.
    """
    gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * gpu]
    call()
    with use("torch"), profile(activities=activities) as profiler:
        for _ in range(REPEATS):
            with record_function(WHOLE):
                call()
            if gpu:
                torch.cuda.synchronize()
    calls = [event for event in profiler.events() if event.name == WHOLE and _on_host(event)]
    found: dict[str, list[float]] = defaultdict(list)
    for event in calls:
        once: dict[str, float] = defaultdict(float)
        for inner in _walk(event):
            once[_kind(inner.name)] += _own_us(inner, gpu)
        for kind, us in once.items():
            found[kind].append(us)
    return {kind: median(times) for kind, times in found.items()}


def _kind(name: str) -> str:
    """The first word, as of "linear down"; what a layer does beside ops and products is "other"."""
    first, _, rest = name.partition(" ")
    return "other" if name == WHOLE or rest.startswith("layer") else first


def _on_host(event: FunctionEvent) -> bool:
    return event.is_user_annotation and event.device_type == torch.autograd.DeviceType.CPU


def _own_us(event: FunctionEvent, gpu: bool) -> float:
    """Time of a span less that of the spans right inside it."""

    def total(one: FunctionEvent) -> float:
        return one.device_time_total if gpu else one.cpu_time_total

    return total(event) - sum(total(inner) for inner in _inside(event))


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
