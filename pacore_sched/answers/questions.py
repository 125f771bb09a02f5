"""Reader of question files: JSONL with one problem per line.

    {"question": "What is 2 + 2?"}
    {"id": "photo-7", "question": "How many birds?", "images": ["birds.jpg"]}
    {"messages": [{"role": "user", "content": "What is 2 + 2?"}]}

The images of a "question" come first in its message; those of "messages" fill its image parts in
order. Images are paths, relative to the file, or data URLs. An invalid line fails alone; the other
lines are answered.
"""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from model.errors import InputError, reason, shown
from model.text.files import open_file, parse_json
from model.vision.reading.limits import check_image_file

MAX_LINE = 2**28  # bytes, as of an image file: images may be in it, as data URLs
BLOCK = 2**20  # bytes of a longer line read at a time
KEYS = {"id", "question", "messages", "image", "images"}


@dataclass(frozen=True)
class Question:
    """A line of the file. If `error` is not None, it says why the line cannot be answered.

    `id` is the line's "id" or else its number. It is unique among the lines without an error.
    """

    line: int
    id: str
    messages: tuple[dict, ...] = ()
    images: tuple[Path | str, ...] = ()
    error: str | None = None


@dataclass(frozen=True)
class QuestionFile:
    """All questions of a file, in file order, and the SHA-256 of its bytes."""

    questions: tuple[Question, ...]
    digest: str


class _LineError(Exception):
    """The reason why one line is invalid."""


def read_questions(path: str | Path) -> QuestionFile:
    """Read a JSONL file; empty lines are skipped.

    Raises InputError for a file that cannot be read or has no questions, and for a pipe, from which
    a run could not be resumed.
    """
    path = Path(path)
    questions: list[Question] = []
    lines: dict[str, int] = {}
    digest = hashlib.sha256()
    with open_file(path) as file:
        for number, line in enumerate(_lines(file, digest), start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")  # a byte order mark
            if line.strip():
                questions.append(_question(number, line, path.parent, lines))
    if not questions:
        raise InputError(f"{path} has no questions")
    return QuestionFile(tuple(questions), digest.hexdigest())


def _lines(file: BinaryIO, digest: "hashlib._Hash") -> Iterator[bytes]:
    """The lines of a file, whose bytes all go into `digest`; of a line that is too long, only as
    much as shows it."""
    while line := file.readline(MAX_LINE + 1):
        digest.update(line)
        rest = line
        while len(line) > MAX_LINE and rest and not rest.endswith(b"\n"):
            rest = file.readline(BLOCK)
            digest.update(rest)
        yield line


def _question(number: int, line: bytes, folder: Path, lines: dict[str, int]) -> Question:
    """The question of one line. `lines` maps known ids to line numbers; this id is added to it."""
    id = str(number)
    try:
        fields = _fields(line)
        id = _id(fields, number)
        if id in lines:
            raise _LineError(f"id {id!r} is already used by line {lines[id]}")
        messages = _messages(fields)
        images = _images(fields, folder)
    except _LineError as error:
        return Question(number, id, error=f"line {number}: {error}")
    except Exception as error:  # such as a MemoryError
        return Question(number, id, error=f"line {number}: {reason(error)}")
    lines[id] = number
    if "question" in fields:
        images_first = [{"type": "image"} for _ in images]
        content = [*images_first, {"type": "text", "text": fields["question"]}]
        messages = [{"role": "user", "content": content if images else fields["question"]}]
    return Question(number, id, tuple(messages), images)


def _fields(line: bytes) -> dict:
    if len(line) > MAX_LINE:
        raise _LineError(f"longer than {MAX_LINE >> 20} MiB, the limit for a line")
    try:
        fields = parse_json(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise _LineError("not UTF-8 text") from None
    except UnicodeEncodeError as error:
        surrogate = ord(error.object[error.start])
        raise _LineError(
            f"\\u{surrogate:x} is half of a surrogate pair, which UTF-8 cannot encode"
        ) from None
    except ValueError as error:
        raise _LineError(f"not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise _LineError('not an object such as {"question": "..."}')
    fields = {name: value for name, value in fields.items() if value is not None}
    if unknown := sorted(fields.keys() - KEYS):
        raise _LineError(
            f"unknown key {', '.join(map(repr, unknown))}; known: {', '.join(sorted(KEYS))}"
        )
    return fields


def _id(fields: dict, number: int) -> str:
    """The line's id, or else its number. An integer is the same id as its digits in a string."""
    id = fields.get("id", number)
    if type(id) not in (str, int) or id == "":
        raise _LineError(f"id {shown(id)} must be a non-empty string or an integer")
    return str(id)


def _messages(fields: dict) -> list[dict]:
    """The line's conversation; [] if it has a question instead."""
    if ("question" in fields) == ("messages" in fields):
        raise _LineError('a line needs either "question" or "messages"')
    if "question" in fields:
        question = fields["question"]
        if not isinstance(question, str):
            raise _LineError("the question must be a string")
        if not question.strip():
            raise _LineError("the question is empty")
        return []
    messages = fields["messages"]
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise _LineError("messages must be a list of objects")
    users = [message for message in messages if message.get("role") == "user"]
    if not users:
        raise _LineError("the messages have none with role user")
    if _is_blank(users[-1].get("content")):
        raise _LineError("the question is empty")
    return messages


def _is_blank(content: object) -> bool:
    """Whether a message's content has no text but white space. What is no content at all is not
    blank: building the prompt says what is wrong with it."""
    if isinstance(content, list):
        texts = [part.get("text", "") if isinstance(part, dict) else part for part in content]
    else:
        texts = ["" if content is None else content]
    return all(isinstance(text, str) and not text.strip() for text in texts)


def _images(fields: dict, folder: Path) -> tuple[Path | str, ...]:
    if "image" in fields and "images" in fields:
        raise _LineError('a line may have "image" or "images", not both')
    names = [fields["image"]] if "image" in fields else fields.get("images", [])
    if not isinstance(names, list) or not all(isinstance(n, str) and n for n in names):
        raise _LineError('images must be a list of paths and data URLs; "image" is a single one')
    images = tuple(name if name.startswith("data:") else folder / name for name in names)
    for name, image in zip(names, images, strict=True):
        if isinstance(image, Path):
            try:
                check_image_file(image if os.path.lexists(image) else name)
            except InputError as error:
                raise _LineError(error) from None
    return images
