"""Our server as a process of its own, for the time of a run."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from model.errors import InputError
from pacore_sched.cli.serve import KEY_VARIABLE

START_S, END_S = 600.0, 60.0
POLL_S = 0.1


@dataclass(frozen=True)
class OwnServer:
    """A server that takes requests."""

    url: str
    pid: int

    def rss_bytes(self) -> int:
        """Memory of the process that is in RAM; 0 if it has ended."""
        try:
            pages = Path(f"/proc/{self.pid}/statm").read_text().split()[1]
        except OSError:
            return 0
        return int(pages) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def own_server(model: str, options: Sequence[str] = ()) -> Iterator[OwnServer]:
    """`python -m pacore_sched serve` on a free port without an API key, until the end of the
    context.

    Raises InputError with its error if it does not start.
    """
    environment = {name: value for name, value in os.environ.items() if name != KEY_VARIABLE}
    command = [sys.executable, "-m", "pacore_sched", "serve", "--model", model, "--port", "0"]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [*command, *options], stdout=subprocess.DEVNULL, stderr=log, env=environment
        )
        try:
            yield OwnServer(_url(process, log.fileno()), process.pid)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _url(process: subprocess.Popen, log: int) -> str:
    """Wait until the server listens."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        ended = process.poll() is not None
        lines = os.pread(log, 2**20, 0).decode(errors="replace").splitlines()
        for line in lines:
            if line.startswith("{") and '"listening"' in line:
                return json.loads(line)["url"]
        if ended:
            last = lines[-1].removeprefix("error: ") if lines else "no message"
            raise InputError(f"the server did not start: {last}")
        time.sleep(POLL_S)
    raise InputError(f"the server did not start within {START_S:g} s")
