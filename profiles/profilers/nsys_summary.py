"""What an nsys report says of a run: kernels, gaps between them, time by NVTX span.

Read from the CSV of `nsys stats`, whose reports have one name up to version 2022 and another since:
`cuda_gpu_trace`, `nvtx_sum` and `nvtx_gpu_proj_trace`. The formats are those of real exports of
2022.4; of 2023 and later only headings were at hand, in excerpts that others have published: they
have a column more (GreenCtx).
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
NOT_SEEN = "nsys 2022 sees none of the library nvtx 0.2.13 and later"


def summarise(text: str, source: str) -> dict:
    """The summary of an export, times in microseconds.

    kernels: by name, longest first: instances, total_us, mean_us, share of all kernels' time
    copies: copies and memsets, likewise
    gpu: span_us from first to last activity, busy_us of it, gaps (their number, gap_us, gap_share
        of span_us, largest_gap_us); None without a trace
    spans: by name without its number: instances, host_us, and on a GPU gpu_us (from a range's first
        activity to its last, gaps included) and gpu_ops

    A span's times include those of spans within. Raises InputError for a text without any of the
    reports, and for one that lacks a column.
    """
    found = tables(text, source)
    traces = [t for t in found if t.has("GrdX", "Strm")]
    ranges = [t for t in found if t.has("Range", "Style")]
    projected = [t for t in found if t.has("Projected Start")]
    if not traces and not ranges and not projected:
        raise InputError(
            f"{source} has neither GPU activity nor NVTX ranges ({NOT_SEEN}); of a CSV, it must"
            f" hold {', '.join(REPORTS)} as `nsys stats --format csv` prints them"
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
    """The summary as tables, `top` lines of each."""
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
        header = ("span, those within included", " instances", " host us", " GPU us", " GPU ops")
        table("time by span", header, [_span_line(row) for row in summary["spans"]])
    else:
        print(f"no NVTX ranges ({NOT_SEEN})")


def _events(trace: Table) -> list[tuple[str, float, float]]:
    """Name, start and end of every activity."""
    names, starts = trace.texts("Name"), trace.microseconds("Start")
    ends = [a + b for a, b in zip(starts, trace.microseconds("Duration"), strict=True)]
    return list(zip(names, starts, ends, strict=True))


def _is_copy(event: tuple[str, float, float]) -> bool:
    return event[0].startswith("[CUDA ")


def _by_name(events: Iterable[tuple[str, float, float]]) -> list[dict]:
    times = defaultdict(list)
    for name, start, end in events:
        times[name].append(end - start)
    whole = sum(map(sum, times.values()))
    rows = [
        {
            "name": name,
            "instances": len(of),
            "total_us": sum(of),
            "mean_us": sum(of) / len(of),
            "share": sum(of) / whole if whole else 0.0,
        }
        for name, of in times.items()
    ]
    return sorted(rows, key=lambda row: -row["total_us"])


def _gaps(events: Iterable[tuple[str, float, float]]) -> dict:
    """Times in which no stream of the GPU had anything to do."""
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
        return rows.setdefault(_own(name), {"name": _own(name)} | new)

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
            of = row(name)
            of["gpu_us"] = (of["gpu_us"] or 0.0) + time
            of["gpu_ops"] = (of["gpu_ops"] or 0) + int(operations)
    return sorted(rows.values(), key=lambda of: (-(of["gpu_us"] or 0.0), -of["host_us"]))


def _own(name: str) -> str:
    """Of our own ranges the name without domain and number."""
    domain = f"{DOMAIN}:"
    return family(name.removeprefix(domain)) if name.startswith(domain) else name


def _kernel_line(row: dict) -> list[str]:
    figures = (f"{row['total_us']:,.1f}", f"{row['mean_us']:,.2f}", f"{row['share']:.1%}")
    return [row["name"][:80], f"{row['instances']:,}", *figures]


def _span_line(row: dict) -> list[str]:
    gpu = "" if row["gpu_us"] is None else f"{row['gpu_us']:,.1f}"
    operations = "" if row["gpu_ops"] is None else f"{row['gpu_ops']:,}"
    return [row["name"], f"{row['instances']:,}", f"{row['host_us']:,.1f}", gpu, operations]
