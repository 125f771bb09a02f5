"""Rows as JSON Lines, one object per line. Imports no torch.

An incomplete last line, as a killed process may leave it, is ignored by `read` and removed by the
next `append`. A last line that lacks only its newline is a row.
"""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import BufferedRandom
from pathlib import Path

from model.errors import InputError, shown
from model.text.files import MAX_BYTES, check_target
from model.text.rows import FileRow, parse_row, read_rows

# Fields that rows of several kinds have.
TEXTS = (
    *("op", "case", "impl", "dtype", "policy", "part", "failure", "skipped", "timer", "version"),
    *("device", "driver", "torch", "triton", "commit", "time", "section", "pair", "settings"),
)
TIMES = ("p20_us", "median_us", "p80_us")
NUMBERS = ("bytes", "flops", "roofline_pct", "speedup", "max_err", "copy_gb_s", "gemm_tflop_s")
RATES = ("tokens_per_second",)  # in some rows only
SCHEMA = 1  # version of the rows; incremented whenever a field changes its meaning


def append(path: Path, rows: Iterable[dict]) -> None:
    """Append `rows` to a JSONL file, creating the file and its folders if necessary.

    First cuts off an incomplete last line, which an interrupted write left. Raises InputError, and
    leaves the file unchanged, if it is no file of rows or cannot be written.
    """
    check_target(path)
    with _write_errors(path), path.open("a+b") as file:
        _end_last_row(file, path)
        file.writelines(json.dumps(row).encode() + b"\n" for row in rows)


def _end_last_row(file: BufferedRandom, path: Path) -> None:
    """Add a missing newline to a file of rows, or cut off its last line if that is incomplete.

    Raises InputError for another file, recognised by its first line.
    """
    file.seek(0)
    first = file.readline(MAX_BYTES)
    if not first:
        return
    if not _is_row(first):
        raise InputError(f"{path} is no file of rows: choose another file")
    file.seek(-1, os.SEEK_END)
    if file.read() == b"\n":
        return
    file.seek(0)
    text = file.read()
    start = text.rfind(b"\n") + 1
    if _is_row(text[start:]):
        file.write(b"\n")
    else:
        file.truncate(start)  # in place: a process killed now loses no row


def _is_row(line: bytes) -> bool:
    return parse_row(line.decode("utf-8-sig", "replace")) is not None


def write_json(path: Path, document: dict) -> None:
    """Write one indented JSON document. Raises InputError if the file cannot be written."""
    check_target(path)
    with _write_errors(path):
        path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def read(path: Path) -> list[FileRow]:
    """The rows of a JSONL file; none if the file does not exist.

    Raises InputError as `read_rows` does, and for rows of another schema (a row without `schema`
    has schema 1).
    """
    rows = read_rows(path)
    for row in rows:
        if (schema := row.get("schema", 1)) != SCHEMA:
            reader = f"; commit {row['commit']} can read it" if row.get("commit") else ""
            raise InputError(
                f"{row.where}: the row has schema {shown(schema)}, not {SCHEMA}{reader}"
            )
    return rows


def read_measured(path: Path) -> list[FileRow]:
    """As `read`, and raises InputError for a field of an invalid value too."""
    rows = read(path)
    for row in rows:
        if problem := invalid_field(row):
            raise InputError(f"{row.where}: {problem}")
    return rows


def invalid_field(row: dict) -> str | None:
    """What is wrong with the first field of an invalid value; None if all are valid. Any field may
    be missing or None."""
    for names, valid, kind in (
        (TEXTS, lambda value: isinstance(value, str), "a text"),
        (TIMES, lambda value: is_number(value) and 1e-6 <= value <= 1e15, "from 1e-6 to 1e15"),
        ((*NUMBERS, *RATES), is_number, "a number, at least 0"),
    ):
        for name in names:
            value = row.get(name)
            if value is not None and not valid(value):
                return f"{name} is {shown(value)}; it must be {kind}"
    return None


def is_number(value: object) -> bool:
    """Whether the value is a number from 0 to 1e30, beyond which floats overflow; not NaN."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return 0 <= value < 1e30


@contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from None
