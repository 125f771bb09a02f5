"""The tables of a report, with the same cells as in the terminal."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from bench.report.rows import Measurements, group_by, kind_of
from bench.rows.schema import is_number
from bench.rows.show import TIMES, error, skipped, time_line, worst

Column = tuple[str, str, Callable[[float], str]]  # heading, field, how a value is written


class Table(NamedTuple):
    """Text cells; a column whose heading begins with a space is right-aligned."""

    title: str
    header: Sequence[str]
    lines: Sequence[Sequence[str]]


def number(digits: int, unit: str = "", per: float = 1.0) -> Callable[[float], str]:
    return lambda value: f"{value / per:,.{digits}f}{unit}"


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


ORIGIN = ("device", "driver", "torch", "triton", "commit", "time", "schema")
MAX_ROWS, MAX_LENGTH = 40, 200  # rows of an unknown kind; characters of a value
NUMBER, SECONDS = number(0), number(2, per=1e6)
NAMES = tuple((name, name, str) for name in ("case", "impl", "dtype"))
COMPARED = ((" % roofline", "roofline_pct", number(1)), (" x eager", "speedup", number(2)))
RATES = (
    (" tokens/s", "tokens_per_second", number(1)),
    (" decode tokens/s", "decode_tokens_per_second", number(1)),
)
MAKESPAN = (" makespan s", "makespan_s", number(1))
TO_ANSWER = (" time to answer s", "tta_mean_s", number(1))
ERROR = (" max error", "max_err", error)
SPREAD = tuple((f" {p} us", f"{p}_us", NUMBER) for p in ("median", "p20", "p80"))
MILLISECONDS = tuple((f" {p} ms", f"{p}_us", number(2, per=1e3)) for p in ("median", "p20", "p80"))
JOB_COLUMNS: dict[str, tuple[Column, ...]] = {
    "pacore": (
        *NAMES,
        (" seconds", "median_us", SECONDS),
        *RATES,
        *COMPARED,
        ERROR,
        ("settings", "settings", str),
    ),
    "photo": (*NAMES, *MILLISECONDS, *COMPARED, ERROR),
    "vision": (
        *NAMES,
        (" views", "views", NUMBER),
        (" tokens", "tokens", NUMBER),
        *MILLISECONDS,
        (" TFLOP/s", "tflop_s", number(3)),
        (" % of GEMM", "gemm_pct", number(1)),
        (" x eager", "speedup", number(2)),
        ERROR,
    ),
    "engine_step": (
        *NAMES,
        *SPREAD,
        *COMPARED,
        RATES[0],
        (" host us", "host_us", NUMBER),
        (" idle %", "idle_pct", number(1)),
        (" padding %", "padding_pct", number(1)),
        (" same tokens as eager", "same_tokens", percent),
    ),
    "packing": (
        *NAMES,
        MAKESPAN,
        TO_ANSWER,
        RATES[0],
        (" steps", "steps", NUMBER),
        (" preemptions", "preemptions", NUMBER),
        (" drafted", "drafted", NUMBER),
        (" accepted", "accepted", NUMBER),
        (" same texts", "same_texts", percent),
    ),
    "replay": (
        *NAMES,
        MAKESPAN,
        (" simulated", "makespan_simulated_s", number(1)),
        (" error", "makespan_error", percent),
        TO_ANSWER,
        (" simulated", "tta_mean_simulated_s", number(1)),
        (" error", "tta_error", percent),
        (" steps", "steps", NUMBER),
        (" simulated", "steps_simulated", NUMBER),
    ),
    "scheduler_step": (
        ("case", "case", str),
        ("policy", "policy", str),
        *((f" {p} us", f"{p}_us", number(1)) for p in ("median", "p20", "p80", "p99", "mean")),
        (" per rollout us", "per_rollout_us", number(3)),
        (" preemptions per step", "preemptions_per_step", number(2)),
    ),
}


def op_tables(measurements: Measurements) -> list[Table]:
    """A table per op with the rows that were timed or failed."""
    lines: dict[str, list[list[str]]] = {}
    for row in measurements.of("op"):
        if row["failure"] or row["median_us"]:
            lines.setdefault(row["op"], []).append(time_line(row)[1:])
    return [_without_notes(Table(op, TIMES[1:], op_lines)) for op, op_lines in lines.items()]


def error_table(measurements: Measurements) -> Table | None:
    """The worst error of each op's forms over the cases that were checked but not timed."""
    checked = [row for row in measurements.of("op") if not row["median_us"]]
    return Table("errors", *worst(checked)) if checked else None


def job_tables(measurements: Measurements) -> list[Table]:
    """A table per kind of end-to-end, engine and scheduler rows."""
    return [
        _filled(job, columns, measurements.of(job))
        for job, columns in JOB_COLUMNS.items()
        if measurements.of(job)
    ]


def skipped_lines(measurements: Measurements) -> list[str]:
    """A line for each skipped form and reason."""
    kinds = ("op", "no numbers")
    return skipped([row for row in measurements.latest if kind_of(row) in kinds and row["case"]])


def part_table(parts: Sequence[dict]) -> Table:
    """Microseconds and share of each part of decode steps."""
    lines = []
    for step_parts in group_by(parts, "case", "impl", "dtype").values():
        total = sum(row["median_us"] for row in step_parts)
        for row in step_parts:
            share = percent(row["median_us"] / total)
            names = [row["case"], row["impl"], row["dtype"], row["part"]]
            lines.append([*(name or "" for name in names), f"{row['median_us']:,.0f}", share])
    header = ("case", "impl", "dtype", "part", " median us", " share")
    return Table("Parts of decode steps", header, lines)


def other_tables(measurements: Measurements) -> list[Table]:
    """A table per kind with the values of rows that no other section shows."""
    kinds: dict[str, list[dict]] = {}
    for row in measurements.latest:
        if kind_of(row) == "other":
            kinds.setdefault(str(row.get("op", "no op")), []).append(row)
    return [_values(kind, rows) for kind, rows in kinds.items()]


def _values(kind: str, rows: Sequence[dict]) -> Table:
    """The first rows of a kind, with all fields except their origin."""
    names = dict.fromkeys(name for row in rows for name in row if row[name] is not None)
    shown = [name for name in names if name not in ("op", *ORIGIN)]
    lines = [[_text(row.get(name)) for name in shown] for row in rows[:MAX_ROWS]]
    note = f": the first {MAX_ROWS} of {len(rows)} rows" if len(rows) > MAX_ROWS else ""
    return Table(kind + note, shown, lines)


def _text(value: object) -> str:
    """A value of unknown meaning as text, cut to MAX_LENGTH characters."""
    if isinstance(value, float):
        return f"{value:.4g}"
    text = "" if value is None else str(value)
    return text if len(text) <= MAX_LENGTH else text[: MAX_LENGTH - 1] + "…"


def _without_notes(table: Table) -> Table:
    """The table without its last column if it is empty."""
    if any(line[-1] for line in table.lines):
        return table
    return Table(table.title, table.header[:-1], [line[:-1] for line in table.lines])


def _filled(title: str, columns: Sequence[Column], rows: Sequence[dict]) -> Table:
    """A table of the columns for which some row has a value, and of failures."""
    used = [column for column in columns if any(row.get(column[1]) is not None for row in rows)]
    failed = any(row["failure"] for row in rows)
    lines = [
        [
            *(_cell(row.get(field), write) for _, field, write in used),
            *([f"FAILED: {row['failure']}" if row["failure"] else ""] if failed else []),
        ]
        for row in rows
    ]
    return Table(title, [*(name for name, _, _ in used), *(["note"] if failed else [])], lines)


def _cell(value: object, write: Callable) -> str:
    """A value in its column's format, or unformatted if it is no number as rows have them."""
    if value is None:
        return ""
    return write(value) if is_number(value) or write is str else str(value)
