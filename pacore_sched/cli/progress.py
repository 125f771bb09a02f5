"""The progress bar of a job: problems, rollouts, tokens per second and KV pages in use."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from pacore_sched.engine.engine import Engine

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
def batch_progress(engine: Engine, counts: Counts) -> Iterator[Callable[[], None]]:
    """A progress bar on stderr if that is a terminal; yields the function that refreshes it."""
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
            tree = engine.scheduler.tree
            bar.update(
                task,
                completed=counts.ended,
                rollouts=counts.rollouts,
                rate=f"{counts.tokens / counts.seconds:.0f}",
                kv=f"{100 * (1 - tree.free_pages / tree.num_pages):.0f}",
            )

        yield refresh
