"""Running a command as a process: its streams, error lines and exit code."""

import atexit
import errno
import io
import os
import signal
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress

from model.errors import InputError
from model.process import kernels_clash
from model.terminal import interrupt

# Of a write to stdout: its reader has closed, the shell has closed it, or its disk is full or gone.
_WRITE_ERRORS = (errno.EPIPE, errno.EBADF, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def run_command(main: Callable[[], int | None]) -> None:
    """Run `main` and exit with its code, or with 2 and one line on stderr for a user's mistake.

    Warnings are one line on stderr too. First checks whose `kernels` is installed. `main` must
    import ours only when it runs. Output that cannot be written is a mistake as well, unless the
    reader of a pipe has closed it: that ends the command in silence, with the code of SIGPIPE if it
    was still running. A second Ctrl-C ends the process at once, in silence.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
    _open_streams()
    if text := kernels_clash.error():
        print(f"error: {text}", file=sys.stderr)
        sys.exit(2)
    if text := kernels_clash.warning():
        print(f"warning: {text}", file=sys.stderr)
    from kernels.errors import ImplError, VariableError  # now known to be ours
    from kernels.runtime.environment import check_variables

    warnings.showwarning = _show_warning
    code: object
    try:
        check_variables()
        code = main() or 0
    except (InputError, ImplError, VariableError) as error:
        code = _mistake(str(error))
    except MemoryError:
        code = _mistake("there is not enough memory")
    except KeyboardInterrupt:
        code = 130
    except SystemExit as error:  # of --help and --version
        code = error.code
    except OSError as error:
        if error.filename is not None:
            code = _mistake(str(InputError(f"{error.filename}: {error.strerror}")))
        elif error.errno in _WRITE_ERRORS:
            code = _lost_output(error, 128 + signal.SIGPIPE)
        else:
            raise
    try:
        sys.stdout.flush()
    except OSError as error:
        code = _lost_output(error, code)
    if signal.getsignal(signal.SIGINT) is interrupt:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # A further Ctrl-C would print tracebacks of what runs at exit; this is run first.
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
    sys.exit(code)  # type: ignore[arg-type]


class _Stderr(io.TextIOWrapper):
    """A stderr that drops what cannot be written: a lost message is no reason to lose the work."""

    def __init__(self, stream: io.TextIOWrapper) -> None:
        super().__init__(stream.buffer, stream.encoding, stream.errors, line_buffering=True)
        self._stream = stream  # would close the buffer when collected

    def write(self, text: str) -> int:
        with suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            super().flush()


def _open_streams() -> None:
    """Prepare the standard streams, which the shell may have closed, as in `command >&-`, and whose
    encoding may lack characters that models write."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            # Else the next file opened would get the number. Printing to this stdout fails.
            mode = os.O_WRONLY if name == "stderr" else os.O_RDONLY
            os.dup2(os.open(os.devnull, mode), number)
            stream = open(number, "w" if number else "r", encoding="utf-8")  # noqa: SIM115
            setattr(sys, name, stream)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    if isinstance(sys.stderr, io.TextIOWrapper):
        sys.stderr = _Stderr(sys.stderr)


def _mistake(text: str) -> int:
    print(f"error: {text}", file=sys.stderr)
    return 2


def _lost_output(error: OSError, code_of_pipe: object) -> object:
    """The exit code after a failed write to stdout; what is left in its buffer goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if error.errno == errno.EPIPE:
        return code_of_pipe
    return _mistake(f"cannot write the output: {error.strerror}")


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    """`warnings.showwarning` without the line of code, which says nothing to users."""
    print(f"warning: {InputError(str(message))}", file=sys.stderr)  # its text is one line
