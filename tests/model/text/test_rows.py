"""Rows of JSONL files: what is read, and how a missing field is reported."""

import os
from pathlib import Path

import pytest

from model.errors import InputError
from model.text.rows import FileRow, read_rows


def test_rows(tmp_path: Path):
    """Guards an interrupted write, whose last line has no newline, and a byte order mark."""
    file = tmp_path / "rows.jsonl"
    assert read_rows(file) == []
    file.write_bytes(b'\xef\xbb\xbf{"op": "a"}\n{"op": "b"}\n{"op": "')
    assert read_rows(file) == [{"op": "a"}, {"op": "b"}]


def test_a_last_row_without_a_newline(tmp_path: Path):
    """Guards against losing a row that an editor saved without a newline."""
    file = tmp_path / "rows.jsonl"
    file.write_text('{"op": "a"}\n{"op": "b"}')
    assert [row.where for row in read_rows(file)] == [f"{file}:1", f"{file}:2"]


def test_a_missing_field_names_the_line(tmp_path: Path):
    """A KeyError's traceback for a row of another kind, wherever the field is used."""
    file = tmp_path / "rows.jsonl"
    file.write_text('{"op": "a", "case": "x"}\n{"op": "b"}\n')
    rows = read_rows(file)
    with pytest.raises(InputError, match=r"rows\.jsonl:2: the row has no 'case'"):
        [row["case"] for row in rows]
    with pytest.raises(InputError, match=r"rows\.jsonl:2: the row has no 'case'"):
        [({"section": "s"} | row)["case"] for row in rows]
    assert rows[1].get("case") is None and "case" not in rows[1]
    assert {"op": "c", "n": 1} | FileRow({"op": "b"}, "x:1") == {"op": "b", "n": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{}\n\n", "rows.jsonl:2: each line must be a JSON object"),
        (b"[1]\n", "rows.jsonl:1: each line"),
        (b"[" * 100_000 + b"\n", "rows.jsonl:1: each line"),
        (b'{"a": ' + b"9" * 5000 + b"}\n", "rows.jsonl:1: each line"),
        (b'{"a": "\\ud800"}\n', "rows.jsonl:1: each line"),
        (b"\xff\n", "rows.jsonl is not UTF-8 text"),
    ],
)
def test_files_that_are_no_rows(tmp_path: Path, content: bytes, message: str):
    """A traceback, or a message without file and line."""
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content)
    with pytest.raises(InputError) as raised:
        read_rows(file)
    assert message in str(raised.value)


def test_only_regular_files_are_read(tmp_path: Path):
    """A wait without end for the writer of a FIFO."""
    os.mkfifo(tmp_path / "fifo")
    for file in (tmp_path, tmp_path / "fifo"):
        with pytest.raises(InputError, match="it must be a file"):
            read_rows(file)
