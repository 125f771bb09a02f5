"""Summary of an nsys report: kernels, gaps between them, time by NVTX span.

It is read from the CSV of `nsys stats`. Its reports `cuda_gpu_trace`, `nvtx_sum` and
`nvtx_gpu_proj_trace` had other names up to version 2022. The formats follow real exports of 2022.4;
for 2023 and later only published excerpts of headings were available: they have one more column
(GreenCtx).
"""

from collections import defaultdict
from collections.abc import Iterable

from kernels.runtime.spans import DOMAIN, family
from model.errors import InputError
from model.terminal import table
from profiles.profilers.exports import Table, tables

REPORTS = {
    "cuda_gpu_trace": "gputrace",
    "nvtx_sum": "nvtxsum",
    "nvtx_gpu_proj_trace": "nvtxgpuproj",
}
NOT_SEEN = "nsys 2022 does not see ranges of the library nvtx 0.2.13 and later"


def summarise(text: str, source: str) -> dict:
    """The summary of an export; times are in microseconds.

    kernels: by name, longest first: instances, total_us, mean_us, share of all kernels' time
    copies: copies and memsets, with the same fields
    gpu: span_us from first to last activity, busy_us, gaps (their number), gap_us, gap_share (of
        span_us), largest_gap_us; None without a trace
    spans: by name without its number: instances, host_us, and on a GPU gpu_us (from a range's first
        activity to its last, including gaps) and gpu_ops

    A span's times include those of nested spans. Raises InputError for a text without any of the
    reports, or if a column is missing.
    """
    reports = tables(text, source)
    traces = [t for t in reports if t.has("GrdX", "Strm")]
    ranges = [t for t in reports if t.has("Range", "Style")]
    projected = [t for t in reports if t.has("Projected Start")]
    if not traces and not ranges and not projected:
        raise InputError(
            f"{source} has neither GPU activity nor NVTX ranges ({NOT_SEEN}); a CSV must be"
            f" `nsys stats --format csv` of {', '.join(REPORTS)}"
        )
    events = [event for trace in traces for event in _events(trace)]
    kernels = [event for event in events if not _is_copy(event)]
    return {
        "kernels": _by_name(kernels),
        "copies": _by_name(filter(_is_copy, events)),
        "gpu": _gaps(events) if events else None,
        "spans": _spans(ranges, projected),
    }


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


def _events(trace: Table) -> list[tuple[str, float, float]]:
    """The name, start and end of every activity."""
    names, starts = trace.texts("Name"), trace.microseconds("Start")
    ends = [a + b for a, b in zip(starts, trace.microseconds("Duration"), strict=True)]
    return list(zip(names, starts, ends, strict=True))


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


def _spans(ranges: list[Table], projected: list[Table]) -> list[dict]:
    rows: dict[str, dict] = {}

    def row(name: str) -> dict:
        new = {"instances": 0, "host_us": 0.0, "gpu_us": None, "gpu_ops": None}
        return rows.setdefault(_span_name(name), {"name": _span_name(name)} | new)

    for table_ in ranges:
        columns = table_.texts("Range"), table_.numbers("Instances")
        times = table_.microseconds("Total Time")
        for name, instances, time in zip(*columns, times, strict=True):
            row(name)["instances"] += int(instances)
            row(name)["host_us"] += time
    for table_ in projected:
        columns = table_.texts("Name"), table_.numbers("NumGPUOps")
        times = table_.microseconds("Projected Duration")
        for name, operations, time in zip(*columns, times, strict=True):
            span = row(name)
            span["gpu_us"] = (span["gpu_us"] or 0.0) + time
            span["gpu_ops"] = (span["gpu_ops"] or 0) + int(operations)
    return sorted(rows.values(), key=lambda span: (-(span["gpu_us"] or 0.0), -span["host_us"]))


def _span_name(name: str) -> str:
    """The name of a range; for our own ranges, without domain and number."""
    domain = f"{DOMAIN}:"
    return family(name.removeprefix(domain)) if name.startswith(domain) else name


def _kernel_line(row: dict) -> list[str]:
    figures = (f"{row['total_us']:,.1f}", f"{row['mean_us']:,.2f}", f"{row['share']:.1%}")
    return [row["name"][:80], f"{row['instances']:,}", *figures]


def _span_line(row: dict) -> list[str]:
    gpu = "" if row["gpu_us"] is None else f"{row['gpu_us']:,.1f}"
    operations = "" if row["gpu_ops"] is None else f"{row['gpu_ops']:,}"
    return [row["name"], f"{row['instances']:,}", f"{row['host_us']:,.1f}", gpu, operations]
