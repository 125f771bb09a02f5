"""The run journal: a JSONL file of finished rollouts, from which an interrupted run is resumed.

It is next to the output and can be read during the run. The first line is the header: everything
that the results depend on, but for image files. A line per finished rollout and one per answered
problem follow, and before a problem's first rollout the hashes of its image files:

    {"kind": "header", "format": 2, "widths": [16], "seed": 0, ...}
    {"kind": "images", "problem": "1", "sha256": ["9f86d0..."]}
    {"kind": "rollout", "problem": "1", "round": 0, "index": 3, "finish_reason": "stop", ...}
    {"kind": "answer", "problem": "1", "answer": "4", "error": null}

Each write is one system call that appends to the file, so a killed process loses only unfinished
rollouts. fsync runs at most once a second, so a power failure may also lose the rollouts that ended
since the last one. When the journal is reopened, a write that was cut off at the end is removed,
and every line is checked (journal_lines.py); a failed write, such as on a full disk, is undone.
"""

import fcntl
import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from model.errors import InputError, shown
from model.text.files import check_target
from pacore_sched.answers.journal_index import JournalIndex
from pacore_sched.answers.journal_lines import Expected, RolloutResult

FORMAT = 2
HEADER = b'{"kind": "header"'  # the first bytes of a journal
MAX_LINE = 2**28  # bytes: more than a rollout of a million tokens needs
SYNC_SECONDS = 1.0


class Journal:
    """An open journal. It is locked: no other process can open it until `close`."""

    def __init__(
        self,
        path: str | Path,
        settings: Mapping[str, object],
        expected: Expected,
        *,
        resume: bool,
    ) -> None:
        """Open and check the journal that exists, if any; `begin` writes a new one.

        settings: those that the results depend on, serialisable as JSON, as far as they are known
        expected: what the other lines must agree with

        Raises InputError if a journal exists and `resume` is false, if a setting or the format
        differs, if a line is damaged or wrong, or if the journal cannot be written.
        """
        self.path = Path(path)
        self._settings = _as_json(settings)
        self._resume, self._tokens = resume, expected.tokens
        self._header: dict | None = None  # as it is in the file
        self._index = JournalIndex(expected)
        self._synced = time.monotonic()
        self._file, self._size = -1, 0
        if os.path.exists(self.path):
            self._open()

    def begin(self, settings: Mapping[str, object] | None = None) -> "Journal":
        """Write the header, or compare it with the journal's; returns self.

        `settings` are those that were not known before. Raises InputError as the constructor does.
        """
        if self._file < 0:
            self._open(os.O_CREAT)
        header = {"kind": "header", "format": FORMAT, **self._settings, **_as_json(settings or {})}
        if self._header is None:
            self._write([header])
        else:
            _compare(self.path, self._header, header)
        self._header = header
        return self

    def add(self, results: Sequence[RolloutResult], *, images: Sequence[str] = ()) -> None:
        """Append finished rollouts of a problem.

        images: the SHA-256 of the problem's image files; they are written once

        Raises InputError if that fails; earlier lines are kept.
        """
        records = [result.record(tokens=self._tokens) for result in results]
        if images and results and not self._index.offsets.get(problem := results[0].problem):
            hashes = {"kind": "images", "problem": problem, "sha256": list(images)}
            records.insert(0, hashes)
        self._write(records)

    def add_answer(self, problem: str, answer: str, error: str | None) -> None:
        """Write a problem's answer, once, or again after an error that was mended. It is for
        readers only: a resumed run recomputes it."""
        before = self._index.errors.get(problem, "")  # None: it has been answered
        if before is not None and before != error:
            line = {"kind": "answer", "problem": problem, "answer": answer, "error": error}
            self._write([line])

    def finished(self, problem: str) -> set[tuple[int, int]]:
        """The round and index of every finished rollout of a problem."""
        return set(self._index.offsets.get(problem, ()))

    def results(self, problem: str) -> list[RolloutResult]:
        """All finished rollouts of a problem, sorted by round and index."""
        offsets = sorted(self._index.offsets.get(problem, {}).items())
        return [RolloutResult.of_record(self._line(offset)) for _, offset in offsets]

    @property
    def rollouts(self) -> int:
        """The number of finished rollouts."""
        return self._index.rollouts

    def images(self, problem: str) -> list[str] | None:
        """The SHA-256 of a problem's image files; None for a problem without any, or without
        finished rollouts."""
        return self._index.images.get(problem)

    def close(self) -> None:
        """Sync the file to disk and release the lock."""
        if self._file < 0:
            return
        file, self._file = self._file, -1
        try:
            os.fsync(file)
        except OSError as error:
            raise InputError(f"cannot write {self.path}: {error.strerror}") from None
        finally:
            os.close(file)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self, flags: int = 0) -> None:
        """Open, lock and read the file."""
        check_target(self.path)
        try:
            flags |= os.O_RDWR | os.O_APPEND | os.O_CLOEXEC
            self._file = os.open(self.path, flags, 0o644)
        except OSError as error:
            raise InputError(f"cannot write {self.path}: {error.strerror}") from None
        try:
            self._lock()
            self._size = self._read()
        except BaseException:
            os.close(self._file)
            self._file = -1
            raise

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{self.path} is being written by another run") from None
        except OSError as error:  # some network file systems have no locks
            raise InputError(f"cannot lock {self.path}: {error.strerror}") from None

    def _read(self) -> int:
        """Index the file's lines and cut off an unfinished write; returns the bytes left."""
        offset = end = 0  # of this line, and of the last finished write
        damaged = False
        with open(self.path, "rb") as file:
            start = file.read(len(HEADER))
            if start != HEADER[: len(start)]:
                raise InputError(
                    f"{self.path} exists and is not a run journal: choose another --out"
                )
            file.seek(0)
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE), b""), start=1):
                if damaged:
                    raise self._wrong(number - 1, "is damaged; only the last may be incomplete")
                record = _parsed(line)
                damaged = record is None
                if record is not None:
                    if number == 1:
                        self._check_header(record)
                    else:
                        self._add(record, number, offset)
                    offset += len(line)
                    if not self._index.begun:
                        end = offset
        self._index.begun = None
        os.ftruncate(self._file, end)
        return end

    def _check_header(self, record: dict) -> None:
        if not self._resume:
            raise InputError(
                f"{self.path} already holds a run: continue it with --resume, or choose another"
                " --out"
            )
        if (format := record.get("format")) != FORMAT:
            raise InputError(
                f"{self.path} was written by another version of this program, in journal format"
                f" {shown(format)} instead of {FORMAT}: start a new run with another --out"
            )
        _compare(self.path, record, self._settings, self._settings)
        self._header = record

    def _add(self, record: dict, number: int, offset: int) -> None:
        """Check line `number`, at byte `offset`, and add it to the index."""
        try:
            self._index.check(record)
        except ValueError as error:
            raise self._wrong(number, f"is not of this run: {error}") from None
        self._index.add(record, offset)

    def _wrong(self, number: int, reason: str) -> InputError:
        return InputError(
            f"{self.path}: line {number} {reason}: restore the file or choose another --out"
        )

    def _line(self, offset: int) -> dict:
        with open(self.path, "rb") as file:
            file.seek(offset)
            return json.loads(file.readline())

    def _write(self, records: list[dict]) -> None:
        """Append all lines or none."""
        lines = [json.dumps(record).encode() + b"\n" for record in records]
        try:
            _write_all(self._file, b"".join(lines))
            if time.monotonic() - self._synced >= SYNC_SECONDS:
                os.fsync(self._file)
                self._synced = time.monotonic()
        except OSError as error:
            os.ftruncate(self._file, self._size)
            raise InputError(
                f"cannot write {self.path}: {error.strerror}; the {self.rollouts} rollouts in it"
                " are safe: free some space, then continue with --resume"
            ) from None
        for record, line in zip(records, lines, strict=True):
            if record["kind"] != "header":
                self._index.add(record, self._size)
            self._size += len(line)


def draft_of(path: Path) -> Path:
    """The file that `replace_file` writes first."""
    return path.with_name(f"{path.name}.partial")


def replace_file(path: str | Path, lines: Iterable[str]) -> None:
    """Write a file atomically: under a temporary name first, then renamed.

    Raises InputError if it cannot be written; `path` then keeps its old content.
    """
    path = Path(path)
    draft = draft_of(path)
    check_target(draft)
    try:
        with open(draft, "w", encoding="utf-8", newline="\n") as file:
            file.writelines(f"{line}\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException as error:
        draft.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise InputError(f"cannot write {path}: {error.strerror}") from None
        raise


def _write_all(file: int, data: bytes) -> None:
    """Call os.write until everything is written: a disk that fills up accepts only a part."""
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def _parsed(line: bytes) -> dict | None:
    """The record in one line; None if the line is incomplete or not a JSON object."""
    try:
        record = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _as_json(settings: Mapping[str, object]) -> dict:
    """`settings` as they are read back: with lists instead of tuples."""
    return json.loads(json.dumps(settings))


def _compare(path: Path, before: dict, now: dict, keys: Iterable[str] | None = None) -> None:
    """Raise InputError for the first of `keys` (default: all) that differs from the journal's."""
    for key in keys or dict.fromkeys((*now, *before)):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            changed = {part for part in old | new if old.get(part) != new.get(part)}
            if changed:
                part = min(changed)
                key, old, new = f"{key} {part}", old.get(part), new.get(part)
        if old != new:
            raise InputError(
                f"{path} was started with {key} {old!r:.100}, which is {new!r:.100} now: resume"
                " with the same settings or choose another --out"
            )
