"""Terminal interface of all commands: arguments, error lines, progress bars, tables, exit codes."""

import argparse
import errno
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from pkgutil import resolve_name
from types import ModuleType
from typing import Any, Literal, NoReturn, TypeVar

from model import kernels_clash
from model.errors import InputError

T = TypeVar("T")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are InputErrors: one line instead of the whole usage.

    `description` may be a module's docstring: a leading "`python -m ...`: " is removed, since the
    usage shows the name that was typed.
    """

    def __init__(self, *, description: str | None = "", **options: Any) -> None:  # noqa: ANN401
        text = description or ""  # None: with -OO, Python removes docstrings
        super().__init__(description=re.sub(r"\A`[^`]*`: ", "", text), **options)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see `{self.prog} --help`)")


@contextmanager
def progress(description: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A progress bar with the time left, on stderr if that is a terminal; yields its advance(n)."""
    try:  # a GPU node may have only torch, Triton and NumPy
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        yield lambda n: None
        return
    console = Console(stderr=True)
    bar = Progress(
        console=console,
        transient=True,
        disable=not console.is_terminal,
        redirect_stdout=sys.stdout.isatty(),  # output for a file or pipe must not go to stderr
    )
    with bar:
        task = bar.add_task(description, total=total)
        yield lambda n: bar.advance(task, n)


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Iterate with a progress bar; `total` is needed for items without a length."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with progress(description, total) as advance:
        for item in items:
            yield item
            advance(1)


def table(title: str, header: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """Print a table: rich's on a terminal, else plain aligned text.

    Columns align left, those whose header begins with a space align right.
    """
    if sys.stdout.isatty():
        try:  # a GPU node may have only torch, Triton and NumPy
            from rich.box import SIMPLE_HEAD
            from rich.console import Console
            from rich.table import Table
        except ImportError:
            pass
        else:
            grid = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
            for name in header:
                grid.add_column(name.strip(), justify=_justify(name), overflow="fold")
            for line in lines:
                grid.add_row(*line)
            Console().print(grid, markup=False)
            return
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
    print(f"\n{title}")
    for line in (header, *lines):
        cells = (
            f"{cell.strip():>{width}}" if name.startswith(" ") else f"{cell:{width}}"
            for name, cell, width in zip(header, line, widths, strict=True)
        )
        print("  ".join(cells).rstrip())


def dispatch(
    parser: Parser, commands: Mapping[str, tuple[str, str]], argv: Sequence[str] | None
) -> int:
    """Run the command that `argv` (default: the process's) begins with; return its exit code.

    `commands` maps a name to a target and a line for `--help`. A target, "module" or
    "module:object", has `add_arguments(parser)` and `run(options) -> int`. Only the target that
    runs is imported: some commands need no torch.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (target, text) in commands.items():
        if argv[:1] == [name]:
            command = resolve_name(target)
            about = command.__doc__ if isinstance(command, ModuleType) else text
            subparser = subparsers.add_parser(name, help=text, description=about)
            command.add_arguments(subparser)
            subparser.set_defaults(run=command.run)
        else:
            subparsers.add_parser(name, help=text)
    options = parser.parse_args(argv)
    return options.run(options)


def run_command(main: Callable[[], int | None]) -> None:
    """Run `main` and exit with its code, or with 2 and one line on stderr for a user's mistake.

    Warnings are one line on stderr too. First checks whose `kernels` is installed. `main` must
    import ours only when it runs.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell, as in `command >&-`
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    if text := kernels_clash.error():
        print(f"error: {text}", file=sys.stderr)
        sys.exit(2)
    if text := kernels_clash.warning():
        print(f"warning: {text}", file=sys.stderr)
    from kernels.errors import ImplError  # now known to be ours

    if hasattr(sys.stdout, "reconfigure"):  # not every terminal can show all that models write
        sys.stdout.reconfigure(errors="backslashreplace")
    warnings.showwarning = _show_warning
    try:
        code = main() or 0
        sys.stdout.flush()
        sys.exit(code)
    except (InputError, ImplError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:  # stdout's reader has closed, or its disk is full
        if error.errno not in (errno.EPIPE, errno.ENOSPC):
            raise
        assert sys.__stdout__ is not None  # something was printed to it
        # What is left in its buffer goes to /dev/null.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno())
        if error.errno == errno.EPIPE:
            sys.exit(0)
        print(f"error: cannot write the output: {error.strerror}", file=sys.stderr)
        sys.exit(2)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    """`warnings.showwarning` without the line of code, which says nothing to users."""
    print(f"warning: {InputError(str(message))}", file=sys.stderr)  # its text is one line


def _justify(name: str) -> Literal["left", "right"]:
    return "right" if name.startswith(" ") else "left"
