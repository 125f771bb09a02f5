"""Tests of reading a checkpoint's JSON files: only regular files are opened, and any content gets
one line."""

import os

import pytest

from model.errors import InputError
from model.text.files import check_regular, check_target, read_json


def refusal(file, read=read_json):
    """The message for `file`, having checked that it is one line and names the file."""
    with pytest.raises(InputError) as error:
        read(file)
    assert str(error.value).startswith(str(file))
    assert str(error.value).isprintable()
    return str(error.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is not valid JSON: Expecting value"),
        (b"[1]", "must hold a JSON object"),
        (b'{"a": "\xff"}', "is not UTF-8 text"),
        ('{"a": 1}'.encode("utf-16"), "is not UTF-8 text"),
        (b'{"a": ' * 100_000, "is nested too deeply"),
        (b'{"a": ' + b"1" * 5000 + b"}", "is not valid JSON: an integer in it has thousands of"),
        (b'{"a\n\x1b[31m": ', "is not valid JSON"),
        (rb'{"a": "\ud800"}', "is not valid JSON: 'utf-8' codec can't encode"),
    ],
)
def test_damaged_content(content, words, tmp_path):
    """Guards against a traceback, at once (RecursionError, UnicodeDecodeError) or when half a
    surrogate pair reaches the tokenizers library; and against a second line."""
    file = tmp_path / "a.json"
    file.write_bytes(content)
    assert words in refusal(file)


def test_a_byte_order_mark_is_harmless(tmp_path):
    """Guards against refusing a file that an editor on Windows saved."""
    (tmp_path / "a.json").write_text('{"a": 1}', encoding="utf-8-sig")
    assert read_json(tmp_path / "a.json") == {"a": 1}


def test_only_regular_files_are_opened(tmp_path):
    """Guards against waiting for ever on a FIFO, and tracebacks for the others; links are fine,
    since Hugging Face's cache consists of them."""
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "link").symlink_to("a.json")
    assert "is a directory; it must be a file" in refusal(tmp_path / "folder")
    assert "is a pipe, socket or device; it must be a file" in refusal(tmp_path / "fifo")
    assert "Too many levels of symbolic links" in refusal(tmp_path / "loop")
    assert "No such file" in refusal(tmp_path / "gone", check_regular)
    with pytest.raises(InputError, match=r"a\\x00b cannot be read: embedded null byte"):
        check_regular(tmp_path / "a\0b")
    assert read_json(tmp_path / "link") == {}
    assert read_json(tmp_path / "gone") is None


def test_size_is_limited(tmp_path):
    """Guards against reading gigabytes of weights as JSON."""
    with (tmp_path / "a.json").open("wb") as file:
        file.truncate(2**26 + 1)
    assert "is larger than 64 MiB" in refusal(tmp_path / "a.json")


def test_targets(tmp_path):
    """Guards against waiting for ever for a FIFO's reader; new files and links to files are fine,
    also a link to a file that does not exist yet."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "new link").symlink_to("gone")
    assert "is a directory; it must be a file" in refusal(tmp_path, check_target)
    assert "is a pipe, socket or device" in refusal(tmp_path / "fifo", check_target)
    for name in ("file", "link", "new link", "gone"):
        check_target(tmp_path / name)
