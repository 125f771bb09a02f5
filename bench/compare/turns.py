"""Two checkouts of this repository take turns at timing the same cases: for `bench compare`."""

import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile

from bench import rows
from bench.compare.slowdown import Pair
from model.errors import InputError

WORKER = Path(__file__).with_name("worker.py")
WORKING_TREE = "."
# glibc gives freed memory back to the system or not by the heap's luck, and pages that must be had
# anew made a step seven times as long: both sides keep it, also those from before
# bench/timing.py's `keep_freed_memory`, which does the same.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}
Shape = tuple[str, str]  # op, case
Key = tuple[str, str, str]  # op, case, form


@dataclass(frozen=True)
class Settings:
    """Of all runs: where, in which dtype (None: the device's main one), on how many threads."""

    device: str
    dtype: str | None
    threads: int


class Refused(Exception):
    """A side could not do what it was asked; it can be asked something else."""


class Died(Exception):
    """A side's process has ended."""


class Side:
    """A process that times one checkout. What it prints goes to a file, for when it dies."""

    def __init__(self, name: str, root: Path, caches: Path, settings: Settings) -> None:
        self.name = name
        self._log = TemporaryFile()  # noqa: SIM115 -- closed by `end`
        own = {  # compiled code of one side must never be taken for the other's
            "TRITON_CACHE_DIR": str(caches / "triton"),
            "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        }
        self._process = subprocess.Popen(
            [sys.executable, str(WORKER), str(root)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            cwd=root,
            env=os.environ | KEEP_MEMORY | own,
            text=True,
            start_new_session=True,  # Ctrl-C is for the one who asks
        )
        try:
            opened = self.ask("open", *astuple(settings))
        except (Refused, Died) as error:
            self.end()
            raise InputError(f"{name} cannot be timed: {error}") from None
        except KeyboardInterrupt:
            self.end()
            raise
        if Path(opened["root"]) != root.resolve():
            self.end()
            raise InputError(f"{name} has no bench of its own to be timed")
        self.device, self.dtype = opened["device"], opened["dtype"]
        self.cases: list[Shape] = [(op, case) for op, case in opened["cases"]]

    def ask(self, name: str, *arguments: object) -> dict:
        """The answer to a request."""
        try:
            self._process.stdin.write(json.dumps([name, arguments]) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise Died(f"the process of {self.name} died: {self._last_words()}")
        answer = json.loads(line)
        if "error" in answer:
            raise Refused(answer["error"])
        return answer

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "without a word"


@contextmanager
def checkout(name: str) -> Iterator[Path]:
    """A folder with the files of a commit, gone afterwards; of ".", the working tree itself.

    Neither the user's checkout nor git's list of worktrees is touched.
    """
    if name == WORKING_TREE:
        yield rows.ROOT
        return
    if not (rows.ROOT / ".git").exists():  # git would find the repository around a wheel
        why = f"{rows.ROOT} is no git checkout"
        raise InputError(f'{name!r} is neither a commit ({why}), "." nor a .jsonl file')
    commit = _git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}")
    if commit.returncode:
        raise InputError(f'{name!r} is neither a commit, "." (the working tree) nor a .jsonl file')
    packed = _git("archive", "--format=tar", commit.stdout.decode().strip())
    with TemporaryDirectory(prefix="bench-compare-") as folder:
        with tarfile.open(fileobj=io.BytesIO(packed.stdout)) as archive:
            # Refuses files outside the folder; Python has this filter from 3.11.4 on.
            archive.extraction_filter = getattr(tarfile, "data_filter", None)
            archive.extractall(folder)
        yield Path(folder)


@contextmanager
def processes(roots: Sequence[Path], caches: Path, settings: Settings) -> Iterator[list[Side]]:
    """New processes of A and B, which end with the block."""
    sides: list[Side] = []
    try:
        for name, root in zip("AB", roots, strict=True):
            sides.append(Side(name, root, caches / name, settings))
        yield sides
    finally:
        for side in sides:
            side.end()


def take_turns(
    sides: Sequence[Side],
    shape: Shape,
    forms: Sequence[str],
    rounds: int,
    budget_s: float,
    advance: Callable[[int], None],
) -> dict[Key, list[Pair]]:
    """Pairs of neighbouring runs of each form that both sides have prepared: A B B A A B ..."""
    pairs: dict[Key, list[Pair]] = {(*shape, form): [] for form in forms}
    order = [0, 1]
    if not forms:
        advance(2 * rounds)
        return pairs
    for _ in range(rounds):
        times: dict[int, dict] = {}
        for which in order:
            times[which] = sides[which].ask("time", forms, budget_s)
            advance(1)
        for form in forms:
            pairs[*shape, form].append((times[0][form], times[1][form]))
        order.reverse()
    return pairs


def _git(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["git", "-C", str(rows.ROOT), *arguments], capture_output=True)
