"""Questions from JSONL: what a line may say, and that a wrong line fails alone, by its number."""

import json
from pathlib import Path

import pytest

from model.errors import InputError
from pacore_sched.answers.questions import Question, read_questions


@pytest.fixture
def read(tmp_path: Path):
    """Write lines (bytes, or anything that JSON can say) to a file and read it."""
    (tmp_path / "birds.png").write_bytes(b"pixels")

    def run(*lines: object) -> tuple[Question, ...]:
        raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
        path = tmp_path / "questions.jsonl"
        path.write_bytes(b"\n".join(raw) + b"\n")
        return read_questions(path).questions

    return run


def test_forms_of_a_line(read, tmp_path: Path):
    """A question alone, with an image, and a whole conversation; ids are texts."""
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
    """Several images of one conversation, in their order; absolute paths stay as they are."""
    parts = [{"type": "image"}, {"type": "text", "text": "or"}, {"type": "image"}]
    path = str(tmp_path / "birds.png")
    (question,) = read(
        {"messages": [{"role": "user", "content": parts}], "images": ["birds.png", path]}
    )
    assert question.images == (tmp_path / "birds.png", tmp_path / "birds.png")
    assert question.messages == ({"role": "user", "content": parts},)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"question": "Why?"', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"question": "\xff"}', "not UTF-8"),
        (b'{"id": "\\ud800", "question": "Why?"}', "ud800 is half a character"),
        (b'{"question": "\\udfffWhy?"}', "udfff is half a character"),
        (["Why?"], "not an object"),
        ({"question": "Why?", "seed": 1}, "unknown key 'seed'; known: id, image"),
        ({}, 'either "question" or "messages"'),
        ({"question": "Why?", "messages": []}, 'either "question" or "messages"'),
        ({"question": 3}, "not text"),
        ({"question": " \n"}, "the question is empty"),
        ({"messages": "Why?"}, "not a list"),
        ({"messages": [{"role": "system", "content": "x"}]}, "none of role user"),
        ({"messages": [{"role": "user", "content": " "}]}, "the question is empty"),
        ({"messages": [{"role": "user"}]}, "the question is empty"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}], "image": "birds.png"},
            "the question is empty",
        ),
        ({"question": "Why?", "id": 1.5}, "neither text nor an integer"),
        ({"question": "Why?", "id": True}, "neither text nor an integer"),
        ({"question": "Why?", "id": ""}, "neither text nor an integer"),
        ({"question": "Why?", "image": "cats.png"}, "no image file 'cats.png'"),
        ({"question": "Why?", "image": "a\0b"}, "no image file"),
        ({"question": "Why?", "image": ["birds.png"]}, "not paths"),
        ({"question": "Why?", "images": "birds.png"}, "not paths"),
        ({"question": "Why?", "image": "birds.png", "images": []}, "not both"),
        ({"question": "Why?", "id": "first"}, "id 'first' is that of line 1"),
    ],
)
def test_a_wrong_line_fails_alone(read, line: object, reason: str):
    """The line's number and its reason; its neighbours are as they would be without it."""
    first, wrong, last = read({"id": "first", "question": "Who?"}, line, {"question": "When?"})
    assert wrong.line == 2
    assert wrong.error.startswith("line 2: ")
    assert reason in wrong.error
    assert "\n" not in wrong.error
    assert (first.error, first.id, last.error, last.id) == (None, "first", None, "3")


def test_a_line_number_may_be_anothers_id(read):
    """Guards against two problems of one id, hence one seed and one place in a journal."""
    explicit, default = read({"id": "2", "question": "Who?"}, {"question": "When?"})
    assert explicit.error is None
    assert "id '2' is that of line 1" in default.error


def test_a_wrong_line_holds_no_id(read):
    """The first line that can be answered has the id, not a wrong one before it."""
    wrong, right = read({"id": "a", "question": ""}, {"id": "a", "question": "Who?"})
    assert wrong.error
    assert right.error is None


def test_empty_lines_count_but_ask_nothing(read):
    """Numbers are those an editor shows, with Windows' line ends and a byte-order mark too."""
    questions = read(b"\xef\xbb\xbf" + b'{"question": "Who?"}\r', b"", b"  ", {"question": "When?"})
    assert [(q.line, q.id, q.error) for q in questions] == [(1, "1", None), (4, "4", None)]


def test_the_digest_is_the_files(tmp_path: Path):
    """Another byte is another digest: results of one file are not resumed with another."""
    path, digests = tmp_path / "q.jsonl", set()
    for text in ("Who?", "When?"):
        path.write_text(json.dumps({"question": text}))
        digests.add(read_questions(path).digest)
    assert len(digests) == 2


def test_files_that_cannot_be_read(tmp_path: Path):
    """One line for the user, whatever the system says."""
    with pytest.raises(InputError, match=r"cannot read .*nowhere.jsonl: No such file"):
        read_questions(tmp_path / "nowhere.jsonl")
    with pytest.raises(InputError, match="cannot read .*: Is a directory"):
        read_questions(tmp_path)
    (tmp_path / "empty.jsonl").write_text("\n \n")
    with pytest.raises(InputError, match="holds no questions"):
        read_questions(tmp_path / "empty.jsonl")
