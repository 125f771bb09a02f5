"""Rows as JSON Lines, one object per line. Imports no torch.

An incomplete last line, as a killed process may leave it, is ignored by `read` and removed by the
next `append`.
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from model.errors import InputError

SCHEMA = 1  # version of the rows; incremented whenever a field changes its meaning


def append(path: Path, rows: Iterable[dict]) -> None:
    """Append `rows` to a JSONL file, creating the file and its folders if necessary.

    First cuts off an incomplete last line, which an interrupted write left. Raises InputError if
    the file cannot be written.
    """
    with _write_errors(path):
        text = path.read_bytes() if path.exists() else b""
        if not text.endswith(b"\n"):
            path.write_bytes(text[: text.rfind(b"\n") + 1])
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def write_json(path: Path, document: dict) -> None:
    """Write one indented JSON document. Raises InputError if the file cannot be written."""
    with _write_errors(path):
        path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def read(path: Path) -> list[dict]:
    """The rows of a JSONL file; none if the file does not exist.

    Ignores a last line without a newline, which an interrupted write left. Raises InputError for
    any other line that is not a JSON object, and for rows of another schema (a row without `schema`
    has schema 1).
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
            raise InputError(f"{path}:{number}: each line must be a JSON object")
        if (schema := row.get("schema", 1)) != SCHEMA:
            reader = f"; commit {row['commit']} can read it" if row.get("commit") else ""
            raise InputError(f"{path}:{number}: the row has schema {schema}, not {SCHEMA}{reader}")
        rows.append(row)
    return rows


@contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from None
