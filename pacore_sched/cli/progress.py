"""The progress bar of a job: problems, rollouts, tokens per second, and how full the KV is."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from pacore_sched.engine.engine import Engine

FORM = "{task.fields[rollouts]} rollouts  {task.fields[rate]} tok/s  KV {task.fields[kv]} %"


class Counts(Protocol):
    """What is shown of a run."""

    problems: int
    ended: int
    rollouts: int
    tokens: int

    @property
    def seconds(self) -> float: ...


@contextmanager
def batch_progress(engine: Engine, done: Counts) -> Iterator[Callable[[], None]]:
    """A bar on stderr if that is a terminal; yields what brings it up to date."""
    try:  # GPU nodes may offer torch, Triton and NumPy alone
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.progress import TimeElapsedColumn as Elapsed
    except ImportError:
        yield lambda: None
        return
    console = Console(stderr=True)
    columns = (TextColumn("problems"), BarColumn(), MofNCompleteColumn(), TextColumn(FORM))
    bar = Progress(
        *columns,
        Elapsed(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
        redirect_stdout=sys.stdout.isatty(),  # what goes to a file or pipe must not end up here
    )
    with bar:
        task = bar.add_task("", total=done.problems, rollouts=0, rate="-", kv="-")

        def refresh() -> None:
            tree = engine.scheduler.tree
            bar.update(
                task,
                completed=done.ended,
                rollouts=done.rollouts,
                rate=f"{done.tokens / done.seconds:.0f}",
                kv=f"{100 * (1 - tree.free_pages / tree.num_pages):.0f}",
            )

        yield refresh
