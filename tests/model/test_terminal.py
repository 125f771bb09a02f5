"""The terminal interface of commands: streams that are closed or full, exit codes, signals."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from model import terminal
from model.terminal import Parser, dispatch, stop_signals

ROOT = Path(__file__).parents[2]
PRINTS = "import sys; from model.process.run import run_command; run_command(lambda: {})"
OUT, ERR, FAIL = "print('text')", "print('text', file=sys.stderr)", "int(bool(print('text'))) + 1"
FULL = f"error: cannot write the output: {os.strerror(errno.ENOSPC)}\n"
CLOSED = f"error: cannot write the output: {os.strerror(errno.EBADF)}\n"


def shell(code: str, redirections: str, **variables: str) -> tuple[int, str, str]:
    """The exit code and the output of a command that runs `code`, an expression."""
    done = subprocess.run(
        ["sh", "-c", f'exec "$0" -c "$1" {redirections}', sys.executable, PRINTS.format(code)],
        cwd=ROOT,
        env=os.environ | variables,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.cli
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    ("code", "redirections", "expected"),
    [
        (OUT, ">/dev/full", (2, "", FULL)),
        (OUT, ">&-", (2, "", CLOSED)),
        ("None", ">&-", (0, "", "")),
        (OUT, ">&- 2>&-", (2, "", "")),
        (OUT, "<&- 2>&-", (0, "text\n", "")),
        (ERR, "2>/dev/full", (0, "", "")),
        (ERR, "2>&-", (0, "", "")),
        (f"[{OUT}, {ERR}, 1][2]", "2>/dev/full", (1, "text\n", "")),
    ],
)
def test_streams(code: str, redirections: str, expected: tuple, unbuffered: str):
    """A traceback, a lost exit code, or exit code 0 for a document that nobody got. A message that
    stderr cannot take must not take the result with it."""
    assert shell(code, redirections, PYTHONUNBUFFERED=unbuffered) == expected


@pytest.mark.cli
def test_characters_that_the_terminal_lacks():
    """A UnicodeEncodeError for a character of a model's text."""
    expected = (0, "\\u2603\n", "")
    assert shell("print('\\u2603')", "", PYTHONIOENCODING="ascii") == expected


@pytest.mark.cli
def test_no_docstrings():
    """A traceback under -OO, which removes the docstrings that --help shows."""
    command = [sys.executable, "-OO", "-m", "model", "describe", "tiny"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.cli
def test_a_reader_that_closed_the_pipe():
    """Exit code 0 of a check that failed, or was cut short, because `| head` had read enough."""
    reader, writer = os.pipe()
    os.close(reader)
    for code, unbuffered, expected in ((FAIL, "", 1), (OUT, "1", 128 + signal.SIGPIPE)):
        done = subprocess.run(
            [sys.executable, "-c", PRINTS.format(code)],
            cwd=ROOT,
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
            stdout=writer,
            stderr=subprocess.PIPE,
        )
        assert (done.returncode, done.stderr) == (expected, b"")
    os.close(writer)


@pytest.mark.cli
@pytest.mark.parametrize(
    ("name", "value", "choices"),
    [
        ("PACORE_SPANS", "foo", "off, nvtx or torch"),
        ("PACORE_WARM_UP", "no", "1 or 0"),
        ("PACORE_CHECK_SCHEDULE", "true", "0 or 1"),
    ],
)
def test_wrong_variables(name: str, value: str, choices: str):
    """A traceback at import for a wrong value, or a value that is ignored in silence."""
    expected = (2, "", f"error: {name} must be {choices}, not {value!r}\n")
    assert shell("None", "", **{name: value}) == expected


@pytest.mark.cli
@pytest.mark.parametrize(
    ("error", "line"),
    [
        ("MemoryError", "there is not enough memory"),
        ("PermissionError(13, 'Permission denied', 'a/b')", "a/b: Permission denied"),
    ],
)
def test_errors_of_the_system(error: str, line: str):
    """A traceback for a folder that may not be read, or for a lack of memory."""
    assert shell(f"(_ for _ in ()).throw({error})", "") == (2, "", f"error: {line}\n")


@pytest.mark.parametrize(
    ("before", "during"),
    [
        (signal.default_int_handler, signal.SIG_DFL),
        (terminal.interrupt, signal.SIG_DFL),
        (signal.SIG_IGN, signal.SIG_IGN),
    ],
)
def test_ctrl_c_during_imports(before: object, during: object, monkeypatch: pytest.MonkeyPatch):
    """An interrupted import that NumPy or torch takes for a missing part of itself."""
    handlers = []

    def resolve(target: str) -> SimpleNamespace:
        handlers.append(signal.getsignal(signal.SIGINT))
        return SimpleNamespace(add_arguments=lambda parser: None, run=lambda options: 0)

    monkeypatch.setattr("model.terminal.resolve_name", resolve)
    earlier = signal.signal(signal.SIGINT, before)
    try:
        assert dispatch(Parser(), {"go": ("target", "")}, ["go"]) == 0
        assert [*handlers, signal.getsignal(signal.SIGINT)] == [during, before]
    finally:
        signal.signal(signal.SIGINT, earlier)


def test_an_ignored_signal_stays_ignored():
    """Guards jobs under nohup, and in the background of scripts, against another job's Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert list(stop_signals()) == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGINT, before)
    assert stop_signals()[signal.SIGINT] == before


@pytest.mark.cli
def test_a_second_ctrl_c():
    """A traceback of the second one: from a library's lock, a thread, or the end of Python."""
    code = """if True:
        import signal
        from model.process.run import run_command

        def main():
            try:
                signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt:
                print("cleaning up", flush=True)
                signal.raise_signal(signal.SIGINT)

        run_command(main)
    """
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "cleaning up\n", "")
