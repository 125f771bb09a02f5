"""Renders untrusted jinja2 templates in separate processes with limits (jinja_worker.py).

A process is started on first use and serves all templates; threads that render at the same time
each have one, so that none waits for another's slow template. A process that exceeded its limits is
not used again. Every error is an InputError of one line.
"""

import atexit
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping

from model.errors import InputError
from model.text import jinja_worker as worker

_idle: "list[subprocess.Popen[bytes]]" = []  # its methods are atomic


class TemplateError(InputError):
    """The template is wrong or refuses its input; exceeded limits are plain InputErrors."""


def render(what: str, source: str, variables: Mapping, *, chat: bool = False) -> str:
    """The text that a template makes of JSON-like variables.

    `what` names the template in errors. With `chat` the environment is that of chat templates in
    transformers, else jinja2's default. Raises TemplateError for what the template raises, and
    InputError for more than 10 s, 1 GiB or 8 Mi characters.
    """
    return _ask(what, {"source": source, "variables": variables, "chat": chat})["text"]


def variable_names(what: str, source: str) -> set[str]:
    """The variables that a template with jinja2's default environment uses but does not set.

    Raises as `render` does.
    """
    return set(_ask(what, {"source": source, "variables": None, "chat": False})["names"])


def _ask(what: str, request: dict) -> dict:
    data = json.dumps(request, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
    process = _running()
    try:
        line = _exchange(process, data)
        if not line.endswith(b"\n"):
            raise InputError(_death(what, process.wait()))
    except BaseException:  # after Ctrl-C, a reply may still be coming
        _stop(process)
        raise
    _idle.append(process)
    reply = json.loads(line)
    if "limit" in reply:
        raise InputError(f"{what} {reply['limit']}")
    if "error" in reply:
        where = f" in line {reply['line']}" if reply["line"] else ""
        raise TemplateError(f"{what} failed{where}: {reply['error']}")
    return reply


def _running() -> "subprocess.Popen[bytes]":
    """An idle process, else a new one."""
    while _idle:
        try:
            process = _idle.pop()
        except IndexError:  # another thread took it
            break
        if process.poll() is None:
            return process
        _stop(process)
    return subprocess.Popen(
        [sys.executable, "-P", worker.__file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        bufsize=0,
        start_new_session=True,  # Ctrl-C in the terminal is for the command, which decides
    )


def _exchange(process: "subprocess.Popen[bytes]", data: bytes) -> bytes:
    """Send a request; returns the reply's line, or less if the process has ended."""
    assert process.stdin is not None and process.stdout is not None
    rest = memoryview(data)
    try:
        while rest:
            rest = rest[process.stdin.write(rest) :]
    except BrokenPipeError:
        return b""
    chunks = []
    while chunk := process.stdout.read(1 << 16):
        chunks.append(chunk)
        if chunk.endswith(b"\n"):
            break
    return b"".join(chunks)


def _death(what: str, code: int) -> str:
    """Why the process ended without a reply."""
    if code == worker.NO_JINJA2:
        return "templates need the package jinja2: pip install jinja2"
    if code == worker.OUT_OF_MEMORY:
        return f"{what} needs more than {worker.MEMORY >> 30} GiB of memory"
    if code == -signal.SIGPROF:
        return f"{what} takes longer than {worker.SECONDS} s"
    reason = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return f"{what} is not rendered: the process for it ended ({reason})"


def _stop(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    with process:  # closes the pipes and waits
        pass


def _stop_all() -> None:
    while _idle:
        _stop(_idle.pop())


def _forget() -> None:
    """Leave the processes to the parent after a fork; the child starts its own."""
    for process in _idle:
        process.returncode = 0  # only the parent may wait for it
    _idle.clear()


atexit.register(_stop_all)
os.register_at_fork(after_in_child=_forget)
