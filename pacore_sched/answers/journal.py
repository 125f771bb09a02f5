"""The run journal: a JSONL file of finished rollouts, from which an interrupted run is resumed.

It is next to the output and can be read during the run. The first line is the header: everything
that the results depend on. One line per finished rollout and one per answered problem follow:

    {"kind": "header", "format": 1, "widths": [16], "seed": 0, ...}
    {"kind": "rollout", "problem": "1", "round": 0, "index": 3, "finish_reason": "stop", ...}
    {"kind": "answer", "problem": "1", "answer": "4", "error": null}

Each write is one system call that appends to the file, so a killed process loses only unfinished
rollouts. fsync runs at most once a second, so a power failure may also lose the rollouts that ended
since the last one. A truncated last line is dropped when the journal is reopened; a failed write,
such as on a full disk, is undone.
"""

import fcntl
import json
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from model.errors import InputError

FORMAT = 1
HEADER = b'{"kind": "header"'  # the first bytes of a journal
SYNC_SECONDS = 1.0


@dataclass(frozen=True)
class RolloutResult:
    """A finished rollout. `tokens` and `logprobs` are empty if the journal keeps only the text.

    cut, dropped: the rollouts of the previous round whose messages have lost their beginnings, or
    are left out, in this rollout's prompt
    """

    problem: str
    round: int
    index: int
    seed: int
    prompt_tokens: int
    finish_reason: str
    text: str
    num_tokens: int
    logprob: float  # of all tokens, summed; raw or processed, as `Sampling.logprobs` says
    cut: tuple[int, ...] = ()
    dropped: tuple[int, ...] = ()
    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()

    def record(self, *, tokens: bool = False) -> dict:
        """The journal line; with `tokens`, it has every token and its log-probability."""
        fields = asdict(self)
        if not tokens:
            del fields["tokens"], fields["logprobs"]
        return {"kind": "rollout", **fields}

    @staticmethod
    def of_record(record: Mapping) -> "RolloutResult":
        """The result in a journal line."""
        fields = {key: value for key, value in record.items() if key != "kind"}
        names = ("cut", "dropped", "tokens", "logprobs")
        lists = {key: tuple(fields.get(key, ())) for key in names}
        return RolloutResult(**(fields | lists))


class Journal:
    """An open journal. It is locked: no other process can open it until `close`."""

    def __init__(self, path: str | Path, header: Mapping[str, object], *, resume: bool) -> None:
        """Create a journal or resume the existing one.

        header: the settings that the results depend on, serialisable as JSON.
        Raises InputError if a journal exists and `resume` is false, if its header differs, if it is
        damaged anywhere but at its end, or if it cannot be written.
        """
        self.path = Path(path)
        line: dict = json.loads(json.dumps({"kind": "header", "format": FORMAT, **header}))
        self._offsets: dict[str, list[int]] = {}  # problem -> byte offsets of its rollouts' lines
        self._answered: set[str] = set()
        self._synced = time.monotonic()
        self.rollouts = 0
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        try:
            self._file = os.open(self.path, flags, 0o644)
        except OSError as error:
            raise InputError(f"cannot write {self.path}: {error.strerror}") from None
        try:
            self._lock()
            self._size = self._read(line, resume)
            if not self._size:
                self._write([line])
        except BaseException:
            os.close(self._file)
            raise

    def add(self, results: Iterable[RolloutResult], *, tokens: bool = False) -> None:
        """Append finished rollouts. Raises InputError if that fails; earlier lines are kept."""
        results = list(results)
        offsets = self._write([result.record(tokens=tokens) for result in results])
        for result, offset in zip(results, offsets, strict=True):
            self._offsets.setdefault(result.problem, []).append(offset)
        self.rollouts += len(results)

    def add_answer(self, problem: str, answer: str, error: str | None) -> None:
        """Write a problem's answer once. It is for readers only: a resumed run recomputes it."""
        if problem not in self._answered:
            self._answered.add(problem)
            line = {"kind": "answer", "problem": problem, "answer": answer, "error": error}
            self._write([line])

    def count(self, problem: str) -> int:
        """The number of finished rollouts of a problem."""
        return len(self._offsets.get(problem, ()))

    def results(self, problem: str) -> list[RolloutResult]:
        """All finished rollouts of a problem, sorted by round and index."""
        results = [
            RolloutResult.of_record(self._line(offset)) for offset in self._offsets.get(problem, ())
        ]
        return sorted(results, key=lambda result: (result.round, result.index))

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

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{self.path} is being written by another run") from None
        except OSError as error:  # some network file systems have no locks
            raise InputError(f"cannot lock {self.path}: {error.strerror}") from None

    def _read(self, header: dict, resume: bool) -> int:
        """Index the file's lines and cut off a truncated last line; returns the bytes left."""
        end, torn = 0, False
        with open(self.path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                if torn:
                    raise InputError(
                        f"{self.path}: line {number - 1} is damaged; only the last may be"
                        " incomplete: restore the file or choose another --out"
                    )
                record = _parsed(line)
                torn = record is None
                if number == 1 and not line.startswith(HEADER) and not HEADER.startswith(line):
                    raise InputError(
                        f"{self.path} exists and is not a run journal: choose another --out"
                    )
                if record is not None:
                    self._index(record, number, end, header, resume)
                    end += len(line)
        os.ftruncate(self._file, end)
        return end

    def _index(self, record: dict, number: int, offset: int, header: dict, resume: bool) -> None:
        """Index one line of the file, or compare it with `header` if it is the first."""
        if number == 1:
            if not resume:
                raise InputError(
                    f"{self.path} already holds a run: continue it with --resume, or choose"
                    " another --out"
                )
            _compare(self.path, record, header)
        elif record.get("kind") == "rollout":
            self._offsets.setdefault(record["problem"], []).append(offset)
            self.rollouts += 1
        elif record.get("kind") == "answer":
            self._answered.add(record["problem"])

    def _line(self, offset: int) -> dict:
        with open(self.path, "rb") as file:
            file.seek(offset)
            return json.loads(file.readline())

    def _write(self, records: list[dict]) -> list[int]:
        """Append all lines or none; returns the byte offset of each."""
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
        offsets = []
        for line in lines:
            offsets.append(self._size)
            self._size += len(line)
        return offsets


def replace_file(path: str | Path, lines: Iterable[str]) -> None:
    """Write a file atomically: under a temporary name first, then renamed.

    Raises InputError if it cannot be written; `path` then keeps its old content.
    """
    path = Path(path)
    draft = path.with_name(f"{path.name}.partial")
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
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _compare(path: Path, before: dict, now: dict) -> None:
    """Raise InputError for the first setting that differs from the journal's."""
    for key in dict.fromkeys((*now, *before)):
        if before.get(key) != now.get(key):
            raise InputError(
                f"{path} was started with {key} {before.get(key)!r:.100}, which is"
                f" {now.get(key)!r:.100} now: resume with the same settings or choose another --out"
            )
