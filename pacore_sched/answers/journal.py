"""A run's journal: every rollout that has ended, in a file that outlives the run, however it ends.

JSONL beside the output, to be read while the run goes on. The first line is the header: all that
the results depend on. Then one line per rollout as it ends, and one per problem with its answer:

    {"kind": "header", "format": 1, "widths": [16], "seed": 0, ...}
    {"kind": "rollout", "problem": "1", "round": 0, "index": 3, "finish_reason": "stop", ...}
    {"kind": "answer", "problem": "1", "answer": "4", "error": null}

Every write is one call to the system, at the end of the file: a process that is killed loses the
rollouts that had not ended, and no other. The disk is waited for at most once a second: a machine
that loses power may lose the rollouts that ended since. A line that was cut off is dropped when the
journal is opened again; a write that fails, as on a full disk, is taken back.
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
HEADER = b'{"kind": "header"'  # how a journal begins
SYNC_SECONDS = 1.0


@dataclass(frozen=True)
class RolloutResult:
    """A rollout as it ended. `tokens` and `logprobs` are empty where only the text is kept."""

    problem: str
    round: int
    index: int
    seed: int
    prompt_tokens: int
    finish_reason: str
    text: str
    num_tokens: int
    logprob: float  # of all tokens together
    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()

    def record(self, *, tokens: bool = False) -> dict:
        """The journal's line; `tokens`: with every token and its log-probability."""
        fields = asdict(self)
        if not tokens:
            del fields["tokens"], fields["logprobs"]
        return {"kind": "rollout", **fields}

    @staticmethod
    def of_record(record: Mapping) -> "RolloutResult":
        """The outcome that a line of the journal holds."""
        fields = {key: value for key, value in record.items() if key != "kind"}
        lists = {key: tuple(fields.get(key, ())) for key in ("tokens", "logprobs")}
        return RolloutResult(**(fields | lists))


class Journal:
    """An open journal, which no other process can open until `close`."""

    def __init__(self, path: str | Path, header: Mapping[str, object], *, resume: bool) -> None:
        """Begin a journal, or go on with the one that is there.

        header: what the results depend on, as JSON has it.
        Raises InputError if there is one and `resume` is false, if its header says otherwise, if it
        is damaged elsewhere than at its end, or if it cannot be written.
        """
        self.path = Path(path)
        line: dict = json.loads(json.dumps({"kind": "header", "format": FORMAT, **header}))
        self._places: dict[str, list[int]] = {}  # problem -> where its rollouts' lines begin
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

    def add(self, outcomes: Iterable[RolloutResult], *, tokens: bool = False) -> None:
        """Write rollouts that have ended. Raises InputError if that fails, with nothing lost of
        what was written before."""
        outcomes = list(outcomes)
        places = self._write([outcome.record(tokens=tokens) for outcome in outcomes])
        for outcome, place in zip(outcomes, places, strict=True):
            self._places.setdefault(outcome.problem, []).append(place)
        self.rollouts += len(outcomes)

    def add_answer(self, problem: str, answer: str, error: str | None) -> None:
        """Write how a problem ended, once: for people to see, a resumed run finds it anew."""
        if problem not in self._answered:
            self._answered.add(problem)
            line = {"kind": "answer", "problem": problem, "answer": answer, "error": error}
            self._write([line])

    def count(self, problem: str) -> int:
        """How many rollouts of a problem have ended."""
        return len(self._places.get(problem, ()))

    def outcomes(self, problem: str) -> list[RolloutResult]:
        """All rollouts of a problem that have ended, by round and index."""
        found = [
            RolloutResult.of_record(self._line(place)) for place in self._places.get(problem, ())
        ]
        return sorted(found, key=lambda outcome: (outcome.round, outcome.index))

    def close(self) -> None:
        """Wait for the disk and let others open the journal."""
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
        """Find what the file holds, and cut off what was not written whole; the bytes left."""
        end, torn = 0, False
        with open(self.path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                if torn:
                    raise InputError(f"{self.path}, line {number - 1}: damaged")
                record = _parsed(line)
                torn = record is None
                if number == 1 and not line.startswith(HEADER) and not HEADER.startswith(line):
                    raise InputError(f"{self.path} is there, and is no journal of a run")
                if record is not None:
                    self._note(record, number, end, header, resume)
                    end += len(line)
        os.ftruncate(self._file, end)
        return end

    def _note(self, record: dict, number: int, place: int, header: dict, resume: bool) -> None:
        """Enter one line of the file."""
        if number == 1:
            if not resume:
                raise InputError(
                    f"{self.path} holds a run already: --resume goes on with it, another --out"
                    " leaves it as it is"
                )
            _compare(self.path, record, header)
        elif record.get("kind") == "rollout":
            self._places.setdefault(record["problem"], []).append(place)
            self.rollouts += 1
        elif record.get("kind") == "answer":
            self._answered.add(record["problem"])

    def _line(self, place: int) -> dict:
        with open(self.path, "rb") as file:
            file.seek(place)
            return json.loads(file.readline())

    def _write(self, records: list[dict]) -> list[int]:
        """Append lines in one piece, or not at all; where each begins."""
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
                " are safe: make room, then go on with --resume"
            ) from None
        places = []
        for line in lines:
            places.append(self._size)
            self._size += len(line)
        return places


def replace_file(path: str | Path, lines: Iterable[str]) -> None:
    """Write a file whole, by another name first: nobody ever sees half of it.

    Raises InputError if it cannot be written; what `path` held is there still.
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
    """os.write until all is written: a disk that fills up takes a part first."""
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def _parsed(line: bytes) -> dict | None:
    """The record of one line; None for one that is not whole."""
    try:
        record = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _compare(path: Path, before: dict, now: dict) -> None:
    """Raise InputError for the first setting that is not what it was."""
    for key in dict.fromkeys((*now, *before)):
        if before.get(key) != now.get(key):
            raise InputError(
                f"{path} was begun with {key} {before.get(key)!r:.100}, which is"
                f" {now.get(key)!r:.100} now: resume with the same settings, or begin another --out"
            )
