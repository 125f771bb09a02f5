"""The processes of a command, as /proc shows them: its descendants, their titles, their ends.

Ray gives its workers titles: "ray::ReplicaActor.advance" is a replica that runs.
"""

import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

PROC = Path("/proc")
POLL_S = 0.1


class Process(NamedTuple):
    """A process. Its start, in clock ticks since boot, tells it from a later one of its number."""

    pid: int
    start: int

    @property
    def alive(self) -> bool:
        """Whether it runs; false for a zombie, which has ended and only waits for its parent."""
        found = _stat(self.pid)
        return found is not None and found[1:] == (self.start, True)

    @property
    def title(self) -> str:
        """Its command line; "" if it has ended."""
        try:
            return (PROC / str(self.pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            return ""

    def kill(self) -> None:
        """SIGKILL, if it still runs."""
        if self.alive:
            os.kill(self.pid, signal.SIGKILL)


def descendants(pid: int) -> set[Process]:
    """All processes below one, without itself."""
    children: dict[int, list[Process]] = {}
    for entry in os.listdir(PROC):
        if entry.isdigit() and (found := _stat(int(entry))):
            parent, start, _ = found
            children.setdefault(parent, []).append(Process(int(entry), start))
    below: set[Process] = set()
    new = children.get(pid, [])
    while new:
        below.update(new)
        new = [child for process in new for child in children.get(process.pid, [])]
    return below


def outlive(processes: Iterable[Process], seconds: float) -> list[Process]:
    """The processes that are still alive after this time; returns early if there are none."""
    end = time.monotonic() + seconds
    left = [process for process in processes if process.alive]
    while left and time.monotonic() < end:
        time.sleep(POLL_S)
        left = [process for process in left if process.alive]
    return left


def _stat(pid: int) -> tuple[int, int, bool] | None:
    """(parent, start, whether it runs) of a process; None if there is none."""
    try:
        text = (PROC / str(pid) / "stat").read_text()
    except OSError:
        return None
    state, parent, *fields = text.rpartition(")")[2].split()  # the name may have spaces
    return int(parent), int(fields[17]), state not in "ZX"
