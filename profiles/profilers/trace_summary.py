"""Time by span, and the kernels, of a Chrome trace that PyTorch's profiler wrote.

A span's own time is what it has beyond the spans within. On a GPU that is the time of the kernels
that were launched in it and in no span within: a launch and its kernels share a correlation id. On
a CPU it is the time on the clock, and operators of PyTorch stand in for kernels.
"""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from kernels.runtime.spans import family
from model.errors import InputError
from model.terminal import table

LAUNCHES = ("cuda_runtime", "cuda_driver")
ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
CROSSING = "round"  # spans that nest in nothing
OUTSIDE = "outside of spans"


@dataclass(eq=False)
class Range:
    """A span or operator as it happened, in microseconds."""

    name: str
    start: float
    end: float
    within: float = 0.0  # of it in ranges right inside
    children: list["Range"] = field(default_factory=list)


def summarise(trace: dict, source: str) -> dict:
    """The summary of a trace, times in microseconds, largest first.

    spans: by name without its number: instances, total_us, own_us on the host's clock, gpu_us (own)
        and share: of all own time, the GPU's if it had anything to do
    kernels: by name: instances, total_us, share; of a CPU the operators with their own time
    gpu: whether the kernels are a GPU's

    Raises InputError for a file that is no trace.
    """
    events = trace.get("traceEvents") if isinstance(trace, dict) else None
    if not events:
        raise InputError(f"{source}: no events: it is no Chrome trace, or an empty one")
    events = [event for event in events if event.get("ph") == "X" and "dur" in event]
    threads = _threads(event for event in events if event.get("cat") == "user_annotation")
    kernels = [event for event in events if event.get("cat") in ON_GPU]
    if kernels:
        counted = [(event["name"], event["dur"]) for event in kernels]
    else:
        operators = _threads(event for event in events if event.get("cat") == "cpu_op")
        every = (one for roots in operators.values() for one in _walk(roots))
        counted = [(one.name, one.end - one.start - one.within) for one in every]
    spans = _spans(threads, _by_span(threads, events, kernels))
    return {"spans": spans, "kernels": _by_name(counted), "gpu": bool(kernels)}


def display(summary: dict, source: str, top: int = 15) -> None:
    """The summary as two tables."""
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
    what = "kernel" if summary["gpu"] else "operator"
    lines = [
        [
            row["name"][:80],
            f"{row['instances']:,}",
            f"{row['total_us']:,.1f}",
            f"{row['share']:.1%}",
        ]
        for row in summary["kernels"][:top]
    ]
    table(f"top {what}s", (what, " instances", " us", " share"), lines)


TIMES = ("total_us", "own_us", "gpu_us")


def _threads(events: Iterable[dict]) -> dict[tuple, list[Range]]:
    """Ranges of every thread as trees: those that lie in no other, in order."""
    found: dict[tuple, list[Range]] = {}
    ordered = sorted(events, key=lambda e: (str(e["pid"]), str(e["tid"]), e["ts"], -e["dur"]))
    for thread, group in groupby(ordered, key=lambda e: (e["pid"], e["tid"])):
        roots: list[Range] = []
        open_: list[Range] = []
        for event in group:
            if family(event["name"]) == CROSSING:
                continue
            one = Range(event["name"], event["ts"], event["ts"] + event["dur"])
            while open_ and open_[-1].end <= one.start:
                open_.pop()
            if open_:
                open_[-1].within += one.end - one.start
            (open_[-1].children if open_ else roots).append(one)
            open_.append(one)
        found[thread] = roots
    return found


def _walk(ranges: Iterable[Range]) -> Iterable[Range]:
    for one in ranges:
        yield one
        yield from _walk(one.children)


def _by_span(
    threads: dict[tuple, list[Range]], events: Sequence[dict], kernels: Sequence[dict]
) -> dict[str, float]:
    """Time of kernels by the innermost span that launched them."""
    launches = {
        event["args"]["correlation"]: event
        for event in events
        if event.get("cat") in LAUNCHES and "correlation" in event.get("args", {})
    }
    found: dict[str, float] = defaultdict(float)
    for kernel in kernels:
        launch = launches.get(kernel.get("args", {}).get("correlation"))
        roots = threads.get((launch["pid"], launch["tid"]), []) if launch else []
        found[_innermost(roots, launch["ts"]) if launch else OUTSIDE] += kernel["dur"]
    return found


def _innermost(ranges: Sequence[Range], time: float) -> str:
    name = OUTSIDE
    while ranges:
        place = bisect_right(ranges, time, key=lambda one: one.start) - 1
        if place < 0 or ranges[place].end < time:
            break
        name, ranges = family(ranges[place].name), ranges[place].children
    return name


def _spans(threads: dict[tuple, list[Range]], gpu: dict[str, float]) -> list[dict]:
    rows: dict[str, dict] = {}

    def row(name: str) -> dict:
        new = {"instances": 0, "total_us": 0.0, "own_us": 0.0}
        return rows.setdefault(name, {"name": name} | new | {"gpu_us": gpu.get(name)})

    for one in (one for roots in threads.values() for one in _walk(roots)):
        of = row(family(one.name))
        of["instances"] += 1
        of["total_us"] += one.end - one.start
        of["own_us"] += one.end - one.start - one.within
    for name in gpu:
        row(name)
    return _with_shares(rows.values(), lambda of: (of["gpu_us"] or 0.0) if gpu else of["own_us"])


def _by_name(times: Iterable[tuple[str, float]]) -> list[dict]:
    rows: dict[str, dict] = {}
    for name, time in times:
        row = rows.setdefault(name, {"name": name, "instances": 0, "total_us": 0.0})
        row["instances"] += 1
        row["total_us"] += time
    return _with_shares(rows.values(), lambda of: of["total_us"])


def _with_shares(rows: Iterable[dict], time: Callable[[dict], float]) -> list[dict]:
    ordered = sorted(rows, key=time, reverse=True)
    whole = sum(map(time, ordered))
    return [row | {"share": time(row) / whole if whole else 0.0} for row in ordered]
