"""The files that a job's results depend on, by content: a resumed run must find the same.

A checkpoint's files are compared in the journal's header, image files by its lines of hashes.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path

from model.errors import InputError
from model.terminal import track
from model.text.files import open_file
from model.vision.reading.limits import MAX_BYTES
from model.weights.gguf import smollm2_path
from model.weights.source import source_files
from pacore_sched.answers.images import ImageData
from pacore_sched.answers.journal import Journal
from pacore_sched.answers.questions import Question

MAX_HASHED = 2**28  # bytes of a model's file: reading shards of gigabytes would take minutes


def model_identity(model: str) -> str | dict[str, str]:
    """What identifies --model: file name -> SHA-256, or size and modification time if the file has
    more than MAX_HASHED bytes; the name of a preset with random weights.

    Raises InputError for a file that cannot be read.
    """
    path = Path(model)
    if not os.path.exists(path):
        if model != "smollm2-135m":
            return model
        path = smollm2_path()
    files = source_files(path)
    folder = path if path.is_dir() else path.parent
    return {str(file.relative_to(folder)): _identity(file) for file in track(files, "model files")}


class ImageFiles:
    """Reads the questions' images, and remembers the SHA-256 of each file's bytes.

    A data URL needs none: it is part of the questions file.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._hashes: dict[str, list[str]] = {}

    def check(self, questions: Sequence[Question]) -> None:
        """Raise InputError if an image file of a problem with finished rollouts is not the one that
        they have seen. A problem without rollouts may have a mended image."""
        valid = {question.id for question in questions if not question.error}
        sha256 = cache(_file_sha256)  # many questions may be about one image
        for question in track(questions, "image files"):
            if not self._journal.finished(question.id) or (question.error and question.id in valid):
                continue  # the id of a wrong line may be that of another line
            error = question.error
            recorded = iter(self._journal.images(question.id) or ())
            try:
                for file in image_files(question):
                    _compare(file, next(recorded), sha256(file))
            except InputError as difference:
                error = f"line {question.line}: {difference}"
            if error:
                raise InputError(
                    f"{error}; {self._journal.path} has rollouts of it: restore the file or choose"
                    " another --out"
                )

    def read(self, question: Question, check_stop: Callable[[], None]) -> Iterator[ImageData]:
        """The images of a question; `check_stop` is called before each. Raises InputError for one
        that cannot be read or is not the one that the problem's rollouts have seen."""
        recorded = iter(self._journal.images(question.id) or ())
        hashes: list[str] = []
        for source in question.images:
            check_stop()
            if isinstance(source, str):
                yield ImageData(source)
                continue
            with open_file(source, f"image {source}") as file:
                data = file.read(MAX_BYTES + 1)  # what is longer is refused when it is decoded
            sha256 = hashlib.sha256(data).hexdigest()
            _compare(source, next(recorded, sha256), sha256)
            hashes.append(sha256)
            yield ImageData(str(source), data)
        self._hashes[question.id] = hashes

    def hashes(self, problem: str) -> list[str]:
        """The SHA-256 of a problem's image files, after they have been read."""
        return self._hashes.get(problem, [])


def image_files(question: Question) -> list[Path]:
    """The images of a question that are files, not data URLs."""
    return [image for image in question.images if isinstance(image, Path)]


def _compare(path: Path, before: str, now: str) -> None:
    if now != before:
        raise InputError(f"image {path} has changed")


def _identity(path: Path) -> str:
    status = path.stat()
    if status.st_size <= MAX_HASHED:
        return f"sha256 {_file_sha256(path)}"
    return f"{status.st_size} bytes, modified {status.st_mtime_ns} ns after 1970"


def _file_sha256(path: Path) -> str:
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
