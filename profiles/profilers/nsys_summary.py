"""Summary of an nsys report: kernels, gaps between them, time by NVTX span.

It is read from the CSV of `nsys stats`. Its reports `cuda_gpu_trace`, `nvtx_sum` and
`nvtx_gpu_proj_trace` had other names up to version 2022. The formats follow real exports of 2022.4,
and for later versions what others published of theirs: a column GreenCtx and "(MB/s)" for "(MBps)"
in the trace (2023 to 2026), the row without a name in the projection (2023.2, 2023.3).

That row has the GPU activities that were launched outside of every range, from the first to the
last: nsys joins activities to ranges and groups them by range (reports/nvtx_gpu_proj_trace.py).
"""

from collections import defaultdict
from collections.abc import Iterable

from kernels.runtime.spans import DOMAIN, family
from model.errors import InputError
from model.terminal import table
from profiles.profilers.exports import Export, Row, Table
from profiles.profilers.numbers import COUNT, DURATION, TIME

REPORTS = {
    "cuda_gpu_trace": "gputrace",
    "nvtx_sum": "nvtxsum",
    "nvtx_gpu_proj_trace": "nvtxgpuproj",
}
KINDS = {  # columns that only the header of a report has
    "trace": ("GrdX", "Strm"),
    "ranges": ("Range", "Style", "Total Time"),
    "projection": ("Projected Start",),
}
AGAIN = "export again with `LC_ALL=C nsys stats --format csv`, with --c-locale"
NAMELESS = "(no name)"
NOT_SEEN = "nsys 2022 does not see ranges of the library nvtx 0.2.13 and later"


def summarise(text: str, source: str, c_locale: bool = False) -> dict:
    """The summary of an export; times are in microseconds.

    kernels: by name, longest first: instances, total_us, mean_us, share of all kernels' time
    copies: copies and memsets, with the same fields
    gpu: span_us from first to last activity, busy_us, gaps (their number), gap_us, gap_share (of
        span_us), largest_gap_us; None without a trace
    spans: by name without its number: instances, host_us, and on a GPU gpu_us (from a range's first
        activity to its last, including gaps) and gpu_ops

    A span's times include those of nested spans. Without nvtx_sum, instances and host times are
    those of the ranges in the projection. Rows that lack a number are left out, with a warning.

    Raises InputError for a text without any of the reports, with two different ones of a kind, or
    if a column is missing or has no possible numbers.
    """
    export = Export(text, source, KINDS, AGAIN, c_locale=c_locale)
    trace, ranges, projection = (_only(export, kind) for kind in KINDS)
    if not trace and not ranges and not projection:
        raise InputError(
            f"{source} has neither GPU activity nor NVTX ranges ({NOT_SEEN}); a CSV must be"
            f" `nsys stats --format csv` of {', '.join(REPORTS)}"
        )
    events = _events(trace) if trace else []
    kernels = [event for event in events if not _is_copy(event)]
    summary = {
        "kernels": _by_name(kernels),
        "copies": _by_name(filter(_is_copy, events)),
        "gpu": _gaps(events) if events else None,
        "spans": _spans(ranges, projection),
    }
    export.warn()
    return summary


def display(summary: dict, source: str, top: int = 15) -> None:
    """Print the summary as tables of at most `top` lines."""
    for kind in ("kernels", "copies"):
        if summary[kind]:
            header = (kind, " instances", " total us", " mean us", " share")
            lines = [_kernel_line(row) for row in summary[kind][:top]]
            table(f"{kind} in {source}", header, lines)
    if gpu := summary["gpu"]:
        print(
            f"\nGPU: busy {gpu['busy_us']:,.1f} of {gpu['span_us']:,.1f} us;"
            f" {gpu['gaps']:,} gaps, {gpu['gap_us']:,.1f} us ({gpu['gap_share']:.1%}),"
            f" the largest {gpu['largest_gap_us']:,.1f} us"
        )
    else:
        print("\nno GPU activity in this report")
    if summary["spans"]:
        header = ("span, including nested ones", " instances", " host us", " GPU us", " GPU ops")
        table("time by span", header, [_span_line(row) for row in summary["spans"]])
    else:
        print(f"no NVTX ranges ({NOT_SEEN})")


def _only(export: Export, kind: str) -> Table | None:
    """The table of a kind. Raises InputError if there are two: their sums would mix two runs."""
    tables = export.tables[kind]
    if len(tables) > 1:
        report = list(REPORTS)[list(KINDS).index(kind)]
        raise InputError(
            f"{export.source} has {len(tables)} different tables of {report}: keep one"
        )
    return tables[0] if tables else None


def _events(trace: Table) -> list[tuple[str, float, float]]:
    """The name, start and end of every activity."""
    rows = trace.read("Name", Start=TIME, Duration=DURATION)
    return [(name or NAMELESS, start, start + time) for name, start, time in rows]


def _is_copy(event: tuple[str, float, float]) -> bool:
    return event[0].startswith("[CUDA ")


def _by_name(events: Iterable[tuple[str, float, float]]) -> list[dict]:
    times = defaultdict(list)
    for name, start, end in events:
        times[name].append(end - start)
    total = sum(map(sum, times.values()))
    rows = [
        {
            "name": name,
            "instances": len(durations),
            "total_us": sum(durations),
            "mean_us": sum(durations) / len(durations),
            "share": sum(durations) / total if total else 0.0,
        }
        for name, durations in times.items()
    ]
    return sorted(rows, key=lambda row: -row["total_us"])


def _gaps(events: Iterable[tuple[str, float, float]]) -> dict:
    """Times in which all streams of the GPU were idle."""
    intervals = sorted((start, end) for _, start, end in events)
    first, until = intervals[0]
    gaps = []
    for start, end in intervals[1:]:
        if start > until:
            gaps.append(start - until)
        until = max(until, end)
    span = until - first
    return {
        "span_us": span,
        "busy_us": span - sum(gaps),
        "gaps": len(gaps),
        "gap_us": sum(gaps),
        "gap_share": sum(gaps) / span if span else 0.0,
        "largest_gap_us": max(gaps, default=0.0),
    }


def _spans(ranges: Table | None, projection: Table | None) -> list[dict]:
    rows: dict[str, dict] = {}

    def row(name: str) -> dict:
        new = {"instances": 0, "host_us": 0.0, "gpu_us": None, "gpu_ops": None}
        return rows.setdefault(_span_name(name), {"name": _span_name(name)} | new)

    for name, instances, time in _host(ranges, projection):
        row(name)["instances"] += int(instances)
        row(name)["host_us"] += time
    if projection:
        on_gpu = projection.select(
            lambda row: _is_range(projection, row) and projection.present(row, "Projected Duration")
        )
        columns = {"NumGPUOps": COUNT, "Projected_Duration": DURATION}
        for name, operations, time in on_gpu.read("Name", **columns):
            span = row(name)
            span["gpu_us"] = (span["gpu_us"] or 0.0) + time
            span["gpu_ops"] = (span["gpu_ops"] or 0) + int(operations)
    return sorted(rows.values(), key=lambda span: (-(span["gpu_us"] or 0.0), -span["host_us"]))


def _host(ranges: Table | None, projection: Table | None) -> Iterable[tuple[str, float, float]]:
    """Names of ranges with their instances and host times."""
    if ranges:
        return ranges.read("Range", Instances=COUNT, Total_Time=DURATION)
    if not projection:
        return []
    pushed = projection.select(lambda row: _is_range(projection, row))
    return ((name, 1, time) for name, time in pushed.read("Name", Orig_Duration=DURATION))


def _is_range(projection: Table, row: Row) -> bool:
    """Whether a row is a range, not the one of the activities outside of all ranges."""
    return projection.present(row, "Name") or projection.present(row, "Style")


def _span_name(name: str) -> str:
    """The name of a range; for our own ranges, without domain and number."""
    domain = f"{DOMAIN}:"
    return family(name.removeprefix(domain)) if name.startswith(domain) else name or NAMELESS


def _kernel_line(row: dict) -> list[str]:
    figures = (f"{row['total_us']:,.1f}", f"{row['mean_us']:,.2f}", f"{row['share']:.1%}")
    return [row["name"][:80], f"{row['instances']:,}", *figures]


def _span_line(row: dict) -> list[str]:
    gpu = "" if row["gpu_us"] is None else f"{row['gpu_us']:,.1f}"
    operations = "" if row["gpu_ops"] is None else f"{row['gpu_ops']:,}"
    return [row["name"], f"{row['instances']:,}", f"{row['host_us']:,.1f}", gpu, operations]
