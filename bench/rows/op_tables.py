"""The tables of ops: times, errors, parts of a decode step, and what is derived from them."""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from statistics import median

from bench.rows.columns import Column, Kind, Row
from bench.rows.formats import (
    CASE,
    DTYPE,
    ERROR,
    FORM,
    IMPL,
    MEASURED,
    OP,
    ROOFLINE,
    SPEEDUP,
    config_text,
    error,
    megabytes,
    microseconds,
    number,
    percent,
    rate,
    spread,
    verdict,
    whole,
)


def _note(row: Row) -> str | None:
    """What is wrong with a time, or unusual about it."""
    if row.get("failure") and row.get("median_us") is None:
        return f"FAILED: {row['failure']}"
    notes = [f"WRONG: {row['failure']}"] if row.get("failure") else []
    notes += [row["settings"]] if row.get("settings") else []
    notes += ["launches included"] if row.get("timer") == "events" else []
    if (clock := row.get("sm_mhz")) and clock[0] < 0.9 * clock[1]:
        notes.append(f"SM clock {clock[0]:,}..{clock[1]:,} MHz")
    if row.get("tokens_per_second"):
        notes.append(f"{number(',.1f')(row['tokens_per_second'])} tokens/s")
    return ", ".join(notes)


OPS = Kind(
    f"times{MEASURED}",
    (
        *(OP, CASE, IMPL, DTYPE),
        Column(" median us", "median_us", microseconds),
        Column(" p20..p80", spread()),
        Column(" GB/s", rate("bytes", 1e3), number(",.1f")),
        Column(" TFLOP/s", rate("flops", 1e6), number(",.3f")),
        ROOFLINE,
        Column(" % peak", "peak_fraction", percent(".1f", unit=""), optional=True),
        SPEEDUP,
        ERROR,
        Column("note", _note),
    ),
    lambda rows: (row for row in rows if not row.get("skipped")),
)


def errors(rows: Sequence[Row]) -> Kind:
    """The largest error of every op's forms over their cases, a column per dtype."""
    dtypes = dict.fromkeys(row["dtype"] for row in rows)
    columns = [Column(f" {dtype}", partial(_largest, dtype)) for dtype in dtypes]
    title = f"largest errors, relative to max(rms(reference), |reference|){MEASURED}"
    return Kind(title, (OP, IMPL, *columns), _by_form)


def _by_form(rows: Sequence[Row]) -> Iterator[Row]:
    """A line per op and form, with its rows."""
    forms: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if not row.get("skipped"):
            forms.setdefault((row["op"], row["impl"]), []).append(row)
    for (op, impl), form_rows in forms.items():
        yield {"op": op, "impl": impl, "rows": form_rows}


def _largest(dtype: str, form: Row) -> str | None:
    rows = [row for row in form["rows"] if row["dtype"] == dtype]
    if any(row["failure"] for row in rows):
        return "FAILED"
    found = [row["max_err"] for row in rows if row["max_err"] is not None]
    return error(max(found)) if found else None


CEILINGS = Kind(
    f"roofline{MEASURED}",
    (
        DTYPE,
        Column(" copy GB/s", "copy_gb_s", number(",.1f")),
        Column(" GEMM TFLOP/s", "gemm_tflop_s", number(",.3f")),
    ),
)


def _steps(parts: Sequence[Row]) -> Iterator[Row]:
    """A line per decode step, from the rows of its parts."""
    steps: dict[tuple[str, str, str], list[Row]] = {}
    for row in parts:
        steps.setdefault((row["case"], row["impl"], row["dtype"]), []).append(row)
    for (case, impl, dtype), rows in steps.items():
        total = sum(row["median_us"] for row in rows)
        shares = ", ".join(f"{row['part']} {row['median_us'] / total:.0%}" for row in rows)
        yield {"case": case, "impl": impl, "dtype": dtype, "median_us": total, "parts": shares}


DECODE_PARTS = Kind(
    f"decode steps by part{MEASURED}",
    (
        *(CASE, FORM, DTYPE),
        Column(" us, profiled", "median_us", whole),
        Column("time by part", "parts"),
    ),
    _steps,
)
CASES = (
    *(OP, CASE, DTYPE),
    Column(" MB", "bytes", megabytes),
    Column(" MFLOP", "flops", megabytes),
    Column("forms and peers", "impls", " ".join),
)


def _configs(sets: Sequence[Row]) -> Iterator[Row]:
    """A line per candidate of each tuning set."""
    for row in sets:
        for config in row["candidates"]:
            yield {**row, "tiles": config}


PART, KEY, CONFIG = (
    Column("op", "part"),
    Column("key", "key"),
    Column("config", "tiles", config_text),
)
CANDIDATES = Kind("candidates", (PART, KEY, CONFIG, Column("cases", "cases", "; ".join)), _configs)
TUNED = Kind(
    "kernel configs",
    (
        *(PART, KEY, CASE, CONFIG),
        Column(" median us", "median_us", number(".1f")),
        Column(" p20..p80", spread(number(".1f"))),
        Column("", verdict(lambda row: "chosen" * bool(row["chosen"]))),
    ),
)
GATE = Kind(
    f"speed-ups of the portable forms{MEASURED}",
    (
        *(OP, CASE),
        Column("compared with", "over"),
        Column(" speed-up", "ratio", number(".2f")),
        Column(" minimum", "floor", number("g")),
        Column(" recorded", "recorded", number("g")),
        Column(" seen", lambda row: "{:g}..{:g}".format(*row["seen"])),
        Column("", verdict(lambda row: "holds")),
    ),
)


def _agreement(row: Row) -> str | None:
    """How many pairs of runs agree with the verdict, where pairs were measured."""
    return None if row["agreeing"] is None else f"{row['agreeing']} of {row['pairs']}"


SLOWER = Kind(
    "slower in B",
    (
        *(OP, CASE, IMPL, DTYPE),
        Column(" A us", lambda row: median(row["a_us"]), number(",.1f")),
        Column(" B us", lambda row: median(row["b_us"]), number(",.1f")),
        Column(" B / A", "ratio", number(".2f")),
        Column(" margin", "margin", number(".2f")),
        Column(" pairs", _agreement),
    ),
)
FASTER = SLOWER._replace(title="faster in B")


def _worst_cases(rows: Sequence[Row]) -> Iterator[Row]:
    """The row with the largest error of each op, form, dtype and reference."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if row["result"]:
            key = (row["op"], row["impl"], row["dtype"], row["reference"])
            groups.setdefault(key, []).append(row)
    for group in groups.values():
        yield max(group, key=lambda row: math.inf if row["max_err"] is None else row["max_err"])


VALIDATION = Kind(
    f"errors relative to max(rms(reference), |reference|){MEASURED}",
    (
        *(OP, IMPL, DTYPE),
        Column("reference", "reference"),
        ERROR,
        Column(" allowed", "max_allowed", error),
        Column(" RMS error", "rms_err", error),
        Column(" allowed", "rms_allowed", error),
        Column(" > 1 roundoff", "beyond_roundoff", percent(".2g")),
        Column("worst element", lambda row: f"{row['case']}: {row['result']}{row['worst_index']}"),
        Column(" got", "worst_got", repr),
        Column(" expected", "worst_expected", repr),
    ),
    _worst_cases,
)
