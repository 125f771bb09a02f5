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

from bench.rows.schema import SCHEMA, invalid_field
from model.errors import InputError, shown
from model.text.files import MAX_BYTES, check_target
from model.text.rows import FileRow, parse_row, read_rows


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


@contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from None
