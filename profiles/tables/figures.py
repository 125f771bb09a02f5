"""What all generated tables share: reading rows, and the formats of figures."""

import re
from collections.abc import Iterable
from pathlib import Path

from bench.rows import jsonl
from model.errors import InputError

Row = dict


def folder(path: Path) -> list[Row]:
    """The rows of all JSONL files of a folder, the latest last."""
    rows = [row for file in sorted(path.glob("*.jsonl")) for row in jsonl.read(file)]
    return sorted(rows, key=lambda row: str(row.get("time") or ""))


def latest_row(rows: Iterable[Row], **wanted: object) -> Row:
    """The latest row without a failure whose fields are as `wanted`. Raises InputError if none."""
    matches = [
        row
        for row in rows
        if not row.get("failure") and all(row.get(name) == wanted[name] for name in wanted)
    ]
    if not matches:
        text = ", ".join(f"{name} {value!r}" for name, value in wanted.items())
        raise InputError(f"a generated table needs a row with {text}, but there is none")
    return matches[-1]


def milliseconds(microseconds: float) -> str:
    """Three figures or one decimal: "1,234", "140", "51.4", "0.3"."""
    ms = microseconds / 1e3
    return f"{ms:,.0f}" if ms >= 99.95 else f"{ms:.1f}"


def spread(row: Row) -> str:
    """The median and its percentiles, in milliseconds: "9.7 (9.6..11.2)"."""
    p20, median, p80 = (milliseconds(row[f"{name}_us"]) for name in ("p20", "median", "p80"))
    return f"{median} ({p20}..{p80})"


def small(value: float) -> str:
    """An error: "2.46e-3"."""
    return re.sub(r"e([+-])0", r"e\1", f"{value:.2e}")
