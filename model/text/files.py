"""Files that users name: only regular ones are opened; text is UTF-8 of limited size."""

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader, TextIOWrapper
from pathlib import Path

from model.errors import InputError

MAX_BYTES = 2**26  # twice the largest tokenizer.json in use; an index of a million tensors


def read_json(file: Path) -> dict | None:
    """The object in a JSON file, None if there is no such file.

    Raises InputError as `read_text` does, and for anything but an object of valid Unicode.
    """
    text = read_text(file)
    if text is None:
        return None
    try:
        value = parse_json(text)
    except ValueError as error:
        raise InputError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{file} must hold a JSON object")
    return value


def parse_json(text: str) -> object:
    """The value of a JSON text.

    Raises ValueError for any other text, one that is nested too deeply, integers with thousands of
    digits, and strings that are not valid Unicode ("\\ud800" is no character).
    """
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValueError as error:
        if "sys.set_int_max_str_digits" in str(error):  # advice for programmers
            raise ValueError("an integer in it has thousands of digits") from None
        raise
    return value


def read_text(file: Path, max_bytes: int = MAX_BYTES) -> str | None:
    """The text of a file without its byte order mark, None if there is no such file.

    Raises InputError, which begins with the file's name, for a file that cannot be read.
    """
    if not os.path.lexists(file):
        return None
    with open_file(file) as opened, TextIOWrapper(opened, encoding="utf-8-sig") as text:
        if os.fstat(opened.fileno()).st_size > max_bytes:
            raise InputError(f"{file} is larger than {max_bytes >> 20} MiB, the limit for text")
        try:
            return text.read()
        except UnicodeDecodeError:
            raise InputError(f"{file} is not UTF-8 text") from None


@contextmanager
def open_file(file: str | os.PathLike[str], name: str | None = None) -> Iterator[BufferedReader]:
    """The bytes of a file. Raises InputError as `check_regular` does, and for errors of the system
    while the file is open."""
    check_regular(file, name)
    try:
        with open(file, "rb") as opened:
            yield opened
    except OSError as error:
        raise InputError(f"{name or file} cannot be read: {error.strerror}") from None


def check_regular(file: str | os.PathLike[str], name: str | None = None) -> None:
    """Raise InputError unless `file`, in messages `name`, is a regular file or a link to one.

    Opening a FIFO would wait for its writer for ever; a directory has no content.
    """
    name = name or str(file)
    try:
        mode = os.stat(file).st_mode
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{name} cannot be read: {reason}") from None
    if not stat.S_ISREG(mode):
        kind = "a directory" if stat.S_ISDIR(mode) else "a pipe, socket or device"
        raise InputError(f"{name} is {kind}; it must be a file")


def check_target(file: str | os.PathLike[str]) -> None:
    """Raise InputError if `file`, which is to be written, exists and is not a regular file.

    Opening a FIFO would wait for its reader for ever.
    """
    if os.path.exists(file):
        check_regular(file)
