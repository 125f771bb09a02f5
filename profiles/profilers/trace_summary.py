"""Summary of a Chrome trace by PyTorch's profiler: time by span, and kernels.

A span's own time excludes nested spans. On a GPU it is the time of the kernels launched in the span
but in no nested one (a launch and its kernels share a correlation id). On a CPU it is wall-clock
time, and PyTorch's operators take the place of kernels.
"""

import warnings
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from math import inf, isfinite

from kernels.runtime.spans import family
from model.errors import InputError
from model.terminal import table

LAUNCHES = ("cuda_runtime", "cuda_driver")
ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
CROSSING = "round"  # spans that overlap others without nesting
OUTSIDE = "outside of spans"


@dataclass(eq=False)
class Range:
    """One execution of a span or operator, in microseconds."""

    name: str
    start: float
    end: float
    children_us: float = 0.0  # of it in its direct children
    children: list["Range"] = field(default_factory=list)


def summarise(trace: dict, source: str) -> dict:
    """The summary of a trace; times are in microseconds, largest first.

    spans: by name without its number: instances, total_us and own_us (host), gpu_us (own) and share
        (of all own time; the GPU's if there are kernels)
    kernels: by name: instances, total_us, share; on a CPU the operators with their own time
    gpu: whether the kernels are a GPU's

    Raises InputError for a file that is not a trace.
    """
    events = trace.get("traceEvents") if isinstance(trace, dict) else None
    if not events:
        raise InputError(f"{source}: no events: this is not a Chrome trace, or it is empty")
    events = [event for event in events if event.get("ph") == "X" and "dur" in event]
    possible = [event for event in events if isfinite(event["ts"]) and 0 <= event["dur"] < inf]
    if len(possible) < len(events):
        text = f"{source}: {len(events) - len(possible)} events without possible times are left out"
        warnings.warn(text, stacklevel=2)
    events = possible
    threads = _threads(event for event in events if event.get("cat") == "user_annotation")
    kernels = [event for event in events if event.get("cat") in ON_GPU]
    if kernels:
        counted = [(event["name"], event["dur"]) for event in kernels]
    else:
        operators = _threads(event for event in events if event.get("cat") == "cpu_op")
        ranges = (range_ for roots in operators.values() for range_ in _walk(roots))
        counted = [(range_.name, _own_us(range_)) for range_ in ranges]
    spans = _spans(threads, _by_span(threads, events, kernels))
    return {"spans": spans, "kernels": _by_name(counted), "gpu": bool(kernels)}


def display(summary: dict, source: str, top: int = 15) -> None:
    """Print the summary as two tables."""
    header = ("span", " instances", " host us", " own us", " GPU us", " share")
    lines = [
        [
            row["name"],
            f"{row['instances']:,}",
            *("" if row[name] is None else f"{row[name]:,.1f}" for name in TIMES),
            f"{row['share']:.1%}",
        ]
        for row in summary["spans"]
    ]
    table(f"time by span in {source}", header, lines)
    kind = "kernel" if summary["gpu"] else "operator"
    lines = [
        [
            row["name"][:80],
            f"{row['instances']:,}",
            f"{row['total_us']:,.1f}",
            f"{row['share']:.1%}",
        ]
        for row in summary["kernels"][:top]
    ]
    table(f"top {kind}s", (kind, " instances", " us", " share"), lines)


TIMES = ("total_us", "own_us", "gpu_us")


def _threads(events: Iterable[dict]) -> dict[tuple, list[Range]]:
    """The ranges of every thread as trees; the roots in order."""
    threads: dict[tuple, list[Range]] = {}
    ordered = sorted(events, key=lambda e: (str(e["pid"]), str(e["tid"]), e["ts"], -e["dur"]))
    for thread, group in groupby(ordered, key=lambda e: (e["pid"], e["tid"])):
        roots: list[Range] = []
        open_: list[Range] = []
        for event in group:
            if family(event["name"]) == CROSSING:
                continue
            range_ = Range(event["name"], event["ts"], event["ts"] + event["dur"])
            while open_ and open_[-1].end <= range_.start:
                open_.pop()
            if open_:
                open_[-1].children_us += range_.end - range_.start
            (open_[-1].children if open_ else roots).append(range_)
            open_.append(range_)
        threads[thread] = roots
    return threads


def _walk(ranges: Iterable[Range]) -> Iterable[Range]:
    for range_ in ranges:
        yield range_
        yield from _walk(range_.children)


def _own_us(range_: Range) -> float:
    return range_.end - range_.start - range_.children_us


def _by_span(
    threads: dict[tuple, list[Range]], events: Sequence[dict], kernels: Sequence[dict]
) -> dict[str, float]:
    """Time of kernels by the innermost span that launched them."""
    launches = {
        event["args"]["correlation"]: event
        for event in events
        if event.get("cat") in LAUNCHES and "correlation" in event.get("args", {})
    }
    times: dict[str, float] = defaultdict(float)
    for kernel in kernels:
        launch = launches.get(kernel.get("args", {}).get("correlation"))
        roots = threads.get((launch["pid"], launch["tid"]), []) if launch else []
        times[_innermost(roots, launch["ts"]) if launch else OUTSIDE] += kernel["dur"]
    return times


def _innermost(ranges: Sequence[Range], time: float) -> str:
    name = OUTSIDE
    while ranges:
        index = bisect_right(ranges, time, key=lambda range_: range_.start) - 1
        if index < 0 or ranges[index].end < time:
            break
        name, ranges = family(ranges[index].name), ranges[index].children
    return name


def _spans(threads: dict[tuple, list[Range]], gpu: dict[str, float]) -> list[dict]:
    rows: dict[str, dict] = {}

    def row(name: str) -> dict:
        new = {"instances": 0, "total_us": 0.0, "own_us": 0.0}
        return rows.setdefault(name, {"name": name} | new | {"gpu_us": gpu.get(name)})

    for range_ in (range_ for roots in threads.values() for range_ in _walk(roots)):
        span = row(family(range_.name))
        span["instances"] += 1
        span["total_us"] += range_.end - range_.start
        span["own_us"] += _own_us(range_)
    for name in gpu:
        row(name)
    return _with_shares(
        rows.values(), lambda span: (span["gpu_us"] or 0.0) if gpu else span["own_us"]
    )


def _by_name(times: Iterable[tuple[str, float]]) -> list[dict]:
    rows: dict[str, dict] = {}
    for name, time in times:
        row = rows.setdefault(name, {"name": name, "instances": 0, "total_us": 0.0})
        row["instances"] += 1
        row["total_us"] += time
    return _with_shares(rows.values(), lambda row: row["total_us"])


def _with_shares(rows: Iterable[dict], time: Callable[[dict], float]) -> list[dict]:
    ordered = sorted(rows, key=time, reverse=True)
    total = sum(map(time, ordered))
    return [row | {"share": time(row) / total if total else 0.0} for row in ordered]
