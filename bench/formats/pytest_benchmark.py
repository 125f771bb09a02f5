"""Rows as a JSON file of pytest-benchmark, and such files as rows.

The format is that of pytest-benchmark 5.3.1 (plugin.py: `pytest_benchmark_generate_json`; stats.py:
`Metadata.as_dict`). Times are in seconds there.

Export. A row with a time becomes a benchmark with the name that `pytest bench/test_ops.py` gives
it, so that `pytest-benchmark compare` puts both next to each other; `extra_info` is the row itself.
The samples of a row are not recorded: `data` is its p20, median and p80, and all statistics are
those of these three values, so `min` is p20 and `max` is p80 (all three are the median if a row has
no percentiles). Of rows with the same op, case, impl and dtype only the latest is written, because
names are unique; failed and skipped rows, and rows without a time, are left out, because the format
has only times. A file is of one machine: rows of several devices are refused.

Import. A benchmark whose `extra_info` is a row, as `pytest bench/test_ops.py` writes it, is that
row. Otherwise `op` is the test function, `case` its parameters, `impl` and `dtype` are "unknown",
`device` is the CPU's name, `median_us` the median, p20 and p80 those of `data` if the file has it,
and a row's `extra_info` is the benchmark's. Not imported: the other statistics, the single samples,
options, profiles, and of `machine_info` and `commit_info` all but the CPU's name and the commit.
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, quantiles, stdev
from typing import Any

from bench.formats.members import (
    UNKNOWN,
    Written,
    case_of,
    check_new,
    complete,
    member,
    number,
    of_type,
    valid_row,
)
from bench.rows import jsonl
from bench.rows.schema import SCHEMA, TIMES
from model.errors import InputError, shown
from model.text.files import read_json

VERSION = "5.3.1"
MODULE = "bench/test_ops.py"
ROW = {"op", "case", "impl", "dtype", "median_us"}  # an `extra_info` with these fields is a row


def write(rows: Sequence[dict[str, Any]], out: Path) -> Written:
    """Write the new file `out`. Raises InputError if it exists, no row has a time, or rows are of
    several devices."""
    check_new(out)
    written = Written()
    timed: dict[str, dict[str, Any]] = {}
    for row in sorted(complete(rows, written.left_out), key=lambda row: row.get("time") or ""):
        if row.get("failure"):
            written.left_out["failed"] += 1
            continue
        if _name(row) in timed:
            written.left_out["replaced by a later row"] += 1
        timed[_name(row)] = row
    if not timed:
        raise InputError("none of the rows has op, case, impl, dtype and a time")
    devices = sorted({row.get("device") or UNKNOWN for row in timed.values()})
    if len(devices) > 1:
        raise InputError(
            f"the rows are of {len(devices)} devices ({'; '.join(devices)}); a file of"
            " pytest-benchmark is of one: give the rows of one device"
        )
    jsonl.write_json(out, _document(list(timed.values())))
    written.rows = len(timed)
    return written


def read(path: Path) -> list[dict[str, Any]]:
    """The benchmarks of a file as rows. Raises InputError for an unreadable or invalid file, and
    for one without benchmarks."""
    document = read_json(path)
    if document is None:
        raise InputError(f"{path}: no such file")
    benchmarks = member(document, "benchmarks", list, str(path))
    if not benchmarks:
        raise InputError(f"{path} has no benchmarks")
    origin = _origin(document, str(path))
    return [
        _row(of_type(benchmark, "the benchmark", dict, where), origin, where)
        for index, benchmark in enumerate(benchmarks)
        for where in [f"{path}: benchmarks[{index}]"]
    ]


def _document(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The file of rows in order of time."""
    latest = rows[-1]
    commit = latest.get("commit") or UNKNOWN
    return {
        "machine_info": {
            name: latest.get(name) for name in ("device", "driver", "torch", "triton")
        },
        "commit_info": {
            "id": commit.removesuffix("+dirty"),
            "time": None,
            "author_time": None,
            "dirty": commit.endswith("+dirty"),
            "project": "step3vl-pacore",
            "branch": UNKNOWN,
        },
        "benchmarks": list(map(_benchmark, rows)),
        "datetime": latest.get("time") or UNKNOWN,
        "version": VERSION,
    }


def _benchmark(row: dict[str, Any]) -> dict[str, Any]:
    microseconds = (row.get(name) or row["median_us"] for name in TIMES)
    return {
        "group": f"{row['op']}: {case_of(row)}",
        "name": _name(row),
        "fullname": f"{MODULE}::{_name(row)}",
        "params": {name: row[name] for name in ("op", "case", "impl", "dtype")},
        "param": _parameters(row),
        "extra_info": dict(row),
        "options": {},
        "stats": _stats(sorted(value / 1e6 for value in microseconds)),
    }


def _stats(data: list[float]) -> dict[str, Any]:
    """What pytest-benchmark computes of three samples, in ascending order."""
    low, median, high = data
    centre, deviation = mean(data), stdev(data)
    q1, q3 = 0.75 * low + 0.25 * median, 0.25 * median + 0.75 * high
    outliers = sum(abs(value - centre) > deviation for value in data)
    return {
        "min": low,
        "max": high,
        "mean": centre,
        "stddev": deviation,
        "rounds": len(data),
        "median": median,
        "iqr": q3 - q1,
        "q1": q1,
        "q3": q3,
        "iqr_outliers": 0,  # three values are never beyond 1.5 times their quartiles' range
        "stddev_outliers": outliers,
        "outliers": f"{outliers};0",
        "ld15iqr": low,
        "hd15iqr": high,
        "ops": len(data) / sum(data),
        "total": sum(data),
        "data": data,
        "iterations": 1,
    }


def _row(benchmark: dict[str, Any], origin: dict[str, Any], where: str) -> dict[str, Any]:
    extra = of_type(benchmark.get("extra_info") or {}, "extra_info", dict, where)
    if extra.keys() >= ROW:
        return valid_row(extra, where)
    stats = member(benchmark, "stats", dict, where)
    row = {
        "op": member(benchmark, "fullname", str, where).split("[")[0],
        "case": of_type(benchmark.get("param") or "no parameters", "param", str, where),
        "impl": UNKNOWN,
        "dtype": UNKNOWN,
        **_times(stats, where),
        **origin,
        **({"extra_info": extra} if extra else {}),
    }
    return valid_row(row, where)


def _times(stats: dict[str, Any], where: str) -> dict[str, Any]:
    median = number(stats.get("median"), "stats.median", where)
    if not median:
        raise InputError(
            f"{where}: stats.median is {shown(stats.get('median'))}; it must be seconds above 0"
        )
    data = of_type(stats.get("data") or [], "stats.data", list, where)
    samples = [number(value, "a value of stats.data", where) or 0.0 for value in data]
    times = {"median_us": median * 1e6, "repeats": stats.get("rounds")}
    if len(samples) > 1:
        fifths = quantiles(samples, n=5, method="inclusive")
        times |= {"p20_us": fifths[0] * 1e6, "p80_us": fifths[-1] * 1e6}
    return times


def _origin(document: dict[str, Any], where: str) -> dict[str, Any]:
    machine = of_type(document.get("machine_info") or {}, "machine_info", dict, where)
    commit = of_type(document.get("commit_info") or {}, "commit_info", dict, where)
    cpu = of_type(machine.get("cpu") or {}, "machine_info.cpu", dict, where)
    names = (machine.get("device"), cpu.get("brand_raw"), machine.get("processor"))
    identity = of_type(commit.get("id") or UNKNOWN, "commit_info.id", str, where)
    return {
        "device": next(filter(None, names), UNKNOWN),
        "commit": identity[:12] + "+dirty" * bool(commit.get("dirty")),
        "time": document.get("datetime"),
        "schema": SCHEMA,
    }


def _name(row: dict[str, Any]) -> str:
    return f"test_op[{_parameters(row)}]"


def _parameters(row: dict[str, Any]) -> str:
    return ": ".join((row["op"], case_of(row), row["impl"], row["dtype"]))
