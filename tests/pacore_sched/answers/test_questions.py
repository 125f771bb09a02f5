"""Question files: the valid forms of a line, and errors that name an invalid line's number."""

import json
import os
from pathlib import Path

import pytest

from model.config import TINY
from model.errors import InputError
from model.text.prompt import build_prompt
from model.text.tokenizer import Tokenizer
from pacore_sched.answers import questions
from pacore_sched.answers.questions import Question, read_questions


@pytest.fixture
def read(tmp_path: Path):
    """Write lines (bytes, or objects to be written as JSON) to a file and read it."""
    (tmp_path / "birds.png").write_bytes(b"pixels")

    def run(*lines: object) -> tuple[Question, ...]:
        raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
        path = tmp_path / "questions.jsonl"
        path.write_bytes(b"\n".join(raw) + b"\n")
        return read_questions(path).questions

    return run


def test_forms_of_a_line(read, tmp_path: Path):
    """A question, a question with an image or a conversation read wrongly; an id not a string."""
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    alone, photo, talk = read(
        {"question": "Why?"},
        {"id": "b", "question": "How many?", "image": "birds.png"},
        {"id": 7, "messages": turns},
    )
    assert alone == Question(1, "1", ({"role": "user", "content": "Why?"},))
    content = [{"type": "image"}, {"type": "text", "text": "How many?"}]
    assert photo == Question(
        2, "b", ({"role": "user", "content": content},), (tmp_path / "birds.png",)
    )
    assert talk == Question(3, "7", tuple(turns))


def test_images_fill_the_parts_of_messages(read, tmp_path: Path):
    """Images of a conversation out of order; an absolute path that is changed, or a data URL."""
    parts = [{"type": "image"}, {"type": "text", "text": "or"}, {"type": "image"}]
    path, url = str(tmp_path / "birds.png"), "data:image/png;base64,iVBORw=="
    (question,) = read(
        {"messages": [{"role": "user", "content": parts}], "images": ["birds.png", path]}
    )
    assert question.images == (tmp_path / "birds.png", tmp_path / "birds.png")
    assert question.messages == ({"role": "user", "content": parts},)
    (question,) = read({"question": "Why?", "images": [url, "birds.png"]})
    assert question.images == (url, tmp_path / "birds.png")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"question": "Why?"', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"question": "\xff"}', "not UTF-8"),
        (b'{"id": "\\ud800", "question": "Why?"}', "ud800 is half of a surrogate pair"),
        (b'{"question": "\\udfffWhy?"}', "udfff is half of a surrogate pair"),
        (["Why?"], "not an object"),
        ({"question": "Why?", "seed": 1}, "unknown key 'seed'; known: id, image"),
        ({}, 'either "question" or "messages"'),
        ({"question": "Why?", "messages": []}, 'either "question" or "messages"'),
        ({"question": 3}, "must be a string"),
        ({"question": " \n"}, "the question is empty"),
        ({"messages": "Why?"}, "must be a list"),
        ({"messages": [{"role": "system", "content": "x"}]}, "none with role user"),
        ({"messages": [{"role": "user", "content": " "}]}, "the question is empty"),
        ({"messages": [{"role": "user"}]}, "the question is empty"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}], "image": "birds.png"},
            "the question is empty",
        ),
        ({"question": "Why?", "id": 1.5}, "must be a non-empty string or an integer"),
        ({"question": "Why?", "id": []}, "id [] must be a non-empty string or an integer"),
        ({"question": None}, 'either "question" or "messages"'),
        ({"question": "Why?", "id": True}, "must be a non-empty string or an integer"),
        ({"question": "Why?", "id": ""}, "must be a non-empty string or an integer"),
        ({"question": "Why?", "image": "cats.png"}, "image cats.png cannot be read: No such file"),
        ({"question": "Why?", "image": "a\0b"}, "image 'a\\x00b' cannot be read"),
        ({"question": "Why?", "image": "."}, "is a directory; it must be a file"),
        ({"question": "Why?", "image": "http://a.org/b.png"}, "b.png is a URL, which is not"),
        ({"question": "Why?", "image": ["birds.png"]}, "must be a list of paths"),
        ({"question": "Why?", "images": "birds.png"}, "must be a list of paths"),
        ({"question": "Why?", "image": "birds.png", "images": []}, "not both"),
        ({"question": "Why?", "id": "first"}, "id 'first' is already used by line 1"),
    ],
)
def test_an_invalid_line_fails_alone(read, line: object, reason: str):
    """An error without line number or reason, or one that affects other lines."""
    first, wrong, last = read({"id": "first", "question": "Who?"}, line, {"question": "When?"})
    assert wrong.line == 2
    assert wrong.error.startswith("line 2: ")
    assert reason in wrong.error
    assert "\n" not in wrong.error
    assert (first.error, first.id, last.error, last.id) == (None, "first", None, "3")


@pytest.mark.parametrize("content", [1, True, {"text": "x"}, ["x"], [None], [{"text": ["x"]}]])
def test_what_is_no_content_is_not_empty(read, content: object):
    """A wrong type called an empty question; building the prompt names it."""
    (question,) = read({"messages": [{"role": "user", "content": content}]})
    assert question.error is None
    with pytest.raises(InputError, match="a string or a list of parts|a content part must be"):
        build_prompt(question.messages, Tokenizer.byte_level(TINY), TINY)


def test_a_line_number_equal_to_another_id(read):
    """Two problems with one id, which would share seeds and journal entries."""
    explicit, default = read({"id": "2", "question": "Who?"}, {"question": "When?"})
    assert explicit.error is None
    assert "id '2' is already used by line 1" in default.error


def test_an_invalid_line_reserves_no_id(read):
    """A valid line that is rejected because an invalid one before it has the same id."""
    wrong, right = read({"id": "a", "question": ""}, {"id": "a", "question": "Who?"})
    assert wrong.error
    assert right.error is None


def test_empty_lines_are_numbered_and_skipped(read):
    """Line numbers other than an editor's, also with CRLF line ends and a byte-order mark."""
    lines = read(b"\xef\xbb\xbf" + b'{"question": "Who?"}\r', b"", b"  ", {"question": "When?"})
    assert [(q.line, q.id, q.error) for q in lines] == [(1, "1", None), (4, "4", None)]


def test_a_line_that_is_too_long_fails_alone(read, monkeypatch: pytest.MonkeyPatch):
    """A line of many GB that is read whole, or the rest of it as further lines."""
    monkeypatch.setattr(questions, "MAX_LINE", 60)
    monkeypatch.setattr(questions, "BLOCK", 16)
    edge = b'{"question": "' + b"x" * (60 - 17) + b'"}'  # 60 bytes with its end
    first, wrong, last = read(edge, edge.replace(b"x", b"yy", 1) + b"\r", {"question": "When?"})
    assert (first.error, last.error, last.line) == (None, None, 3)
    assert wrong.error == "line 2: longer than 0 MiB, the limit for a line"


def test_an_unexpected_error_fails_alone(read, monkeypatch: pytest.MonkeyPatch):
    """A line that needs too much memory, which ended the whole job."""

    def fail(line: bytes) -> dict:
        if b"Why" in line:
            raise MemoryError
        return json.loads(line)

    monkeypatch.setattr(questions, "_fields", fail)
    first, wrong = read({"question": "Who?"}, {"question": "Why?"})
    assert first.error is None
    assert wrong.error.startswith("line 2: unexpected MemoryError (test_questions.py, line ")


@pytest.mark.parametrize("max_line", [4, questions.MAX_LINE])
def test_the_digest_depends_on_the_file(max_line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """One digest for two files, whose results could then be mixed by --resume; also if they differ
    in what is not read of a long line."""
    monkeypatch.setattr(questions, "MAX_LINE", max_line)
    path, digests = tmp_path / "q.jsonl", set()
    for text in ("Who?", "Why?"):
        path.write_text(json.dumps({"question": text}))
        digests.add(read_questions(path).digest)
    assert len(digests) == 2


def test_files_that_cannot_be_read(tmp_path: Path):
    """A traceback for a missing file, a folder or a file without questions; waiting for ever for
    the writer of a pipe."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match=r"pipe is a pipe, socket or device; it must be a file"):
        read_questions(tmp_path / "pipe")
    with pytest.raises(InputError, match=r"nowhere.jsonl cannot be read: No such file"):
        read_questions(tmp_path / "nowhere.jsonl")
    with pytest.raises(InputError, match="is a directory; it must be a file"):
        read_questions(tmp_path)
    (tmp_path / "empty.jsonl").write_text("\n \n")
    with pytest.raises(InputError, match="has no questions"):
        read_questions(tmp_path / "empty.jsonl")


def test_null_is_absent(read):
    """Guards exports that write every field: a null "image" was an error, or a null "id" an id."""
    nulls = {"id": None, "messages": None, "image": None, "images": None}
    (question,) = read({"question": "Why?"} | nulls)
    assert (question.error, question.id, question.images) == (None, "1", ())
