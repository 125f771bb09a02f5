"""Rows as JSON Lines: one object a line, written whole or not at all. Imports no torch."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from model.errors import InputError

SCHEMA = 1  # of rows; one more whenever a field changes its meaning


def append(path: Path, rows: Iterable[dict]) -> None:
    """Add `rows` to a JSONL file, which is made with its folders if need be.

    What an interrupted write left of a line is cut off first. Raises InputError if the file cannot
    be written.
    """
    with _written(path):
        text = path.read_bytes() if path.exists() else b""
        if not text.endswith(b"\n"):
            path.write_bytes(text[: text.rfind(b"\n") + 1])
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def write_json(path: Path, document: dict) -> None:
    """Write one indented JSON document. Raises InputError if the file cannot be written."""
    with _written(path):
        path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def read(path: Path) -> list[dict]:
    """The rows of a JSONL file; none if there is no such file.

    A last line without an end, the trace of an interrupted write, is left out. Raises InputError
    naming any other line that is not a JSON object, and rows of another schema (a row that names
    none is of the first).
    """
    if not path.exists():
        return []
    *lines, _ = path.read_text(encoding="utf-8").split("\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if not isinstance(row, dict):
            raise InputError(f"{path}:{number}: not a JSON object")
        if (schema := row.get("schema", 1)) != SCHEMA:
            by = f"; commit {row['commit']} can read it" if row.get("commit") else ""
            raise InputError(f"{path}:{number}: rows of schema {schema}, not {SCHEMA}{by}")
        rows.append(row)
    return rows


@contextmanager
def _written(path: Path) -> Iterator[None]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from None
