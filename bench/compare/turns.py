"""Worker processes of `bench compare`: two checkouts time the same cases alternately."""

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

from bench.compare.slowdown import Pair
from bench.measure.origin import ROOT
from model.errors import InputError

WORKER = Path(__file__).with_name("worker.py")
WORKING_TREE = "."
# Whether glibc returns freed memory to the system depends on the heap's layout, and allocating
# pages again made a step seven times as long. So both sides keep freed memory, also commits that
# are older than `keep_freed_memory` in bench/measure/timing.py, which does the same.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}
Shape = tuple[str, str]  # op, case
Key = tuple[str, str, str]  # op, case, form


@dataclass(frozen=True)
class WorkerOptions:
    """Options of both workers: device, dtype (None: the device's main one) and CPU threads."""

    device: str
    dtype: str | None
    threads: int


class WorkerError(Exception):
    """A worker could not serve a request; it can still serve others."""


class WorkerDied(Exception):
    """A worker process has ended."""


class Side:
    """A worker process that times one checkout. A file collects its output, in case it dies."""

    def __init__(self, name: str, root: Path, caches: Path, options: WorkerOptions) -> None:
        self.name = name
        self._log = TemporaryFile()  # noqa: SIM115 -- closed by `end`
        separate_caches = {  # compiled code of one side must never be used by the other
            "TRITON_CACHE_DIR": str(caches / "triton"),
            "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        }
        self._process = subprocess.Popen(
            [sys.executable, str(WORKER), str(root)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            cwd=root,
            env=os.environ | KEEP_MEMORY | separate_caches,
            text=True,
            start_new_session=True,  # Ctrl-C must reach only the parent
        )
        try:
            opened = self.request("open", *astuple(options))
        except (WorkerError, WorkerDied) as error:
            self.end()
            raise InputError(f"{name} cannot be timed: {error}") from None
        except KeyboardInterrupt:
            self.end()
            raise
        if Path(opened["root"]) != root.resolve():
            self.end()
            raise InputError(f"{name} cannot be timed: it has no bench package")
        self.device, self.dtype = opened["device"], opened["dtype"]
        self.cases: list[Shape] = [(op, case) for op, case in opened["cases"]]

    def request(self, name: str, *arguments: object) -> dict:
        """Send a request and return the worker's answer."""
        requests, answers = self._process.stdin, self._process.stdout
        assert requests and answers  # pipes
        try:
            requests.write(json.dumps([name, arguments]) + "\n")
            requests.flush()
            line = answers.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise WorkerDied(f"the worker process of {self.name} died: {self._last_line()}")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def _last_line(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it printed nothing"


@contextmanager
def checkout(name: str) -> Iterator[Path]:
    """A temporary folder with the files of a commit; for ".", the working tree itself.

    Neither the user's checkout nor git's list of worktrees is changed.
    """
    if name == WORKING_TREE:
        yield ROOT
        return
    if not (ROOT / ".git").exists():  # git would find the repository around a wheel
        reason = f"{ROOT} is not a git checkout"
        raise InputError(f'{name!r} is neither a commit ({reason}), "." nor a .jsonl file')
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
def processes(roots: Sequence[Path], caches: Path, options: WorkerOptions) -> Iterator[list[Side]]:
    """New worker processes of A and B, which end with the block."""
    sides: list[Side] = []
    try:
        for name, root in zip("AB", roots, strict=True):
            sides.append(Side(name, root, caches / name, options))
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
    """Time each form, which both sides have prepared, in the order A B B A A B ...; its pairs."""
    pairs: dict[Key, list[Pair]] = {(*shape, form): [] for form in forms}
    order = [0, 1]
    if not forms:
        advance(2 * rounds)
        return pairs
    for _ in range(rounds):
        times: dict[int, dict] = {}
        for side in order:
            times[side] = sides[side].request("time", forms, budget_s)
            advance(1)
        for form in forms:
            pairs[*shape, form].append((times[0][form], times[1][form]))
        order.reverse()
    return pairs


def _git(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True)
