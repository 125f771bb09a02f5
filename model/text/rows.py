"""Rows of a JSONL file: one JSON object per line. A field that a row lacks is an InputError."""

from pathlib import Path
from typing import Any

from model.errors import InputError
from model.text.files import parse_json, read_text


class FileRow(dict[str, Any]):
    """A row that was read from a file; `where` is its file and line.

    `row[name]` raises InputError for a missing field, so that code may rely on a row's fields and a
    user still learns which line has none.
    """

    def __init__(self, fields: dict[str, Any], where: str) -> None:
        super().__init__(fields)
        self.where = where

    def __missing__(self, name: str) -> Any:  # noqa: ANN401
        raise InputError(f"{self.where}: the row has no {name!r}")

    def __ror__(self, other: dict[str, Any]) -> "FileRow":  # type: ignore[override,misc]
        """`other | row`, which keeps `where`."""
        return FileRow({**other, **self}, self.where)


def read_rows(file: Path) -> list[FileRow]:
    """The rows of a JSONL file; none if there is no such file.

    Ignores a last line without a newline that is not a JSON object: an interrupted write left it.
    Raises InputError as `read_text` does, and for any other line that is not a JSON object.
    """
    *lines, last = (read_text(file) or "").split("\n")
    if parse_row(last) is not None:
        lines.append(last)
    rows = []
    for number, line in enumerate(lines, start=1):
        where = f"{file}:{number}"
        if (fields := parse_row(line)) is None:
            raise InputError(f"{where}: each line must be a JSON object")
        rows.append(FileRow(fields, where))
    return rows


def parse_row(line: str) -> dict[str, Any] | None:
    """The JSON object in a line, None if the line is anything else."""
    try:
        fields = parse_json(line)
    except ValueError:
        return None
    return fields if isinstance(fields, dict) else None
