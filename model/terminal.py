"""Terminal interface of all commands: arguments, progress bars, tables."""

import argparse
import json
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pkgutil import resolve_name
from types import ModuleType
from typing import Any, Literal, NoReturn, TypeVar

from model.errors import InputError, shown

T = TypeVar("T")
Number = TypeVar("Number", int, float)


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


def integer(low: int, high: int) -> Callable[[str], int]:
    """The `type` of an option whose value is an integer from `low` to `high`."""
    return partial(_number, int, low, high, f"an integer from {low:,} to {high:,}")


def real(low: float, high: float, *, exclusive: bool = False) -> Callable[[str], float]:
    """The `type` of an option whose value is from `low`, or if `exclusive` above it, to `high`."""
    limits = f"above {low:,.10g} and at most" if exclusive else f"from {low:,.10g} to"
    above = math.nextafter(low, math.inf) if exclusive else low
    return partial(_number, float, above, high, f"a number {limits} {high:,.10g}")


def _number(
    kind: Callable[[str], Number], low: Number, high: Number, valid: str, text: str
) -> Number:
    try:
        value = kind(text)
    except ValueError:  # also for an integer of thousands of digits
        value = None
    if value is None or not low <= value <= high:  # false for NaN
        raise argparse.ArgumentTypeError(f"{shown(text)} is not {valid}")
    return value


def add_threads(parser: argparse.ArgumentParser) -> None:
    """Add `--threads`, for `torch.set_num_threads`: None leaves PyTorch's number."""
    parser.add_argument(
        "--threads",
        type=_threads,
        metavar="N",
        help="threads that compute on a CPU (default: PyTorch's, one per core); next to a busy"
        " process, one fewer is faster",
    )


def add_rope_scaling(parser: argparse.ArgumentParser) -> None:
    """Add `--rope-scaling`, for `Config.with_rope_scaling`."""
    parser.add_argument(
        "--rope-scaling",
        type=_json_object,
        metavar="JSON",
        help="a longer context, described as rope_parameters in transformers' config.json:"
        ' \'{"rope_type": "yarn", "factor": 2}\' doubles it; also linear and llama3',
    )


def _json_object(text: str) -> dict:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(
            f'{shown(text)} is not a JSON object such as \'{{"rope_type": "yarn", "factor": 2}}\''
        )
    return value


def usable_cpus() -> int:
    """How many CPUs this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _threads(text: str) -> int:
    cpus = usable_cpus()
    valid = f"an integer from 1 to {cpus}, the number of CPUs that this process may use"
    return _number(int, 1, cpus, valid, text)


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
            from rich.text import Text
        except ImportError:
            pass
        else:
            plain = Text(title, "bold")  # a str would be read as markup
            grid = Table(title=plain, title_justify="left", box=SIMPLE_HEAD)
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
    runs is imported: some commands need no torch. Raises InputError for arguments that are not
    UTF-8: neither tokenizers nor JSON files can represent them.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    for before, word in pairwise(["the command", *argv]):
        if not word.isascii() and word.encode("utf-8", "ignore").decode() != word:
            raise InputError(f"the argument {shown(word)} after {shown(before)} is not UTF-8 text")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (target, text) in commands.items():
        if argv[:1] == [name]:
            with _interruptible():
                command = resolve_name(target)
            about = command.__doc__ if isinstance(command, ModuleType) else text
            subparser = subparsers.add_parser(name, help=text, description=about)
            command.add_arguments(subparser)
            subparser.set_defaults(run=command.run)
        else:
            subparsers.add_parser(name, help=text)
    options = parser.parse_args(argv)
    return options.run(options)


def stop_signals() -> dict[int, Any]:
    """SIGINT and SIGTERM with their handlers, for a command that handles them itself; not those
    that this process was started to ignore, as in the background of a shell's script."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    return {n: handler for n, handler in handlers.items() if handler not in (signal.SIG_IGN, None)}


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C ends the process at once: an exception within the imports of NumPy or torch would be
    taken for a missing part, or abort."""
    before = signal.getsignal(signal.SIGINT)
    if before not in (signal.default_int_handler, interrupt):
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def interrupt(number: int, frame: object) -> NoReturn:
    """Raise KeyboardInterrupt once: a second one, in the middle of cleaning up or in a library's
    lock, would be a traceback."""
    signal.signal(number, signal.SIG_DFL)
    raise KeyboardInterrupt


def _justify(name: str) -> Literal["left", "right"]:
    return "right" if name.startswith(" ") else "left"
