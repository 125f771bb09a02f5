"""The progress bar of a job: problems, rollouts, tokens per second and KV pages in use."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

COLUMN_FORMAT = (
    "{task.fields[rollouts]} rollouts  {task.fields[rate]} tok/s  KV {task.fields[kv]} %"
)


class Counts(Protocol):
    """The counts of a run that the progress bar shows."""

    problems: int
    ended: int
    rollouts: int
    tokens: int

    @property
    def seconds(self) -> float: ...


@contextmanager
def batch_progress(kv_used: Callable[[], float], counts: Counts) -> Iterator[Callable[[], None]]:
    """A progress bar on stderr if that is a terminal; yields the function that refreshes it.

    kv_used: returns the share of the KV pages in use
    """
    try:  # a GPU node may have only torch, Triton and NumPy
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.progress import TimeElapsedColumn as Elapsed
    except ImportError:
        yield lambda: None
        return
    console = Console(stderr=True)
    columns = (TextColumn("problems"), BarColumn(), MofNCompleteColumn(), TextColumn(COLUMN_FORMAT))
    bar = Progress(
        *columns,
        Elapsed(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
        redirect_stdout=sys.stdout.isatty(),  # the bar must not reprint piped output
    )
    with bar:
        task = bar.add_task("", total=counts.problems, rollouts=0, rate="-", kv="-")

        def refresh() -> None:
            bar.update(
                task,
                completed=counts.ended,
                rollouts=counts.rollouts,
                rate=f"{counts.tokens / counts.seconds:.0f}",
                kv=f"{100 * kv_used():.0f}",
            )

        yield refresh
