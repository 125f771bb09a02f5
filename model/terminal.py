"""How every command talks to the person at the terminal: mistakes, progress, exit codes."""

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from kernels._launch import ImplError

T = TypeVar("T")


class InputError(ValueError):
    """A mistake in what the user gave: one line that names it and says what would be right."""


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Iterate with a progress bar on stderr when that is a terminal, silently otherwise."""
    if not sys.stderr.isatty():
        yield from items
        return
    try:  # GPU nodes may offer torch, Triton and NumPy alone
        from rich.console import Console
        from rich.progress import track as rich_track
    except ImportError:
        yield from items
        return
    yield from rich_track(
        items, description, total=total, console=Console(stderr=True), transient=True
    )


def run_command(main: Callable[[], int | None]) -> None:
    """Run `main` and exit: with its code, or with 2 and one line on stderr for a user's mistake."""
    try:
        sys.exit(main() or 0)
    except (InputError, ImplError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(0)
