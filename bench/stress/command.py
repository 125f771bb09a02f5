"""`python -m bench stress`: random events on engines of random sizes, checked after every event.

For whoever changes the scheduler, a policy or the engine. A model of hashes reads each context back
from its pages, so that a token that is lost, stale or in a wrong place is seen at once. Every
rollout must become what it would be alone; pages, counters and order are checked after every event.
The first fault ends the command, with exit code 1 and the command that repeats it.
"""

import argparse
import time
import traceback
from collections import Counter
from collections.abc import Callable
from itertools import count
from pathlib import Path

from bench.stress.checks import Checks
from bench.stress.driver import Run
from kernels.errors import one_line
from model.terminal import integer, progress, table

EVENTS_PER_RUN = 400  # before the engine is drained
MAX_TEXT = 200  # characters of an error


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add = parser.add_argument
    add("--events", type=integer(1, 10**9), default=100_000, metavar="N", help="default: 100000")
    add("--seed", type=integer(0, 2**63 - 1), default=0, help="default: 0")
    add("--engine", type=integer(0, 10**9), metavar="N", help="only this engine of the seed")


def run(options: argparse.Namespace) -> int:
    """Stress engines until the events are used up; return 1 after a fault, else 0."""
    total: Counter[str] = Counter()
    start = time.perf_counter()
    with progress("stress", options.events) as advance:
        for number in count() if options.engine is None else [options.engine]:
            try:
                total += stress(options.seed, number, advance)
            except StressError as error:
                print(error)
                print(f"repeat it: python -m bench stress --seed {options.seed} --engine {number}")
                return 1
            total["engines"] += 1
            if total["events"] >= options.events:
                break
    rate = total["events"] / (time.perf_counter() - start)
    lines = [[name, f"{number:,}"] for name, number in sorted(total.items())]
    table(f"stress: no fault, {rate:,.0f} events/s", ("what happened", " times"), lines)
    return 0


class StressError(Exception):
    """What is wrong, and in which event on which engine."""


def stress(seed: int, number: int, advance: Callable[[int], None] = lambda n: None) -> Counter[str]:
    """Run one engine to its end; returns what happened. Raises StressError for the first fault."""
    run = Run(seed, number)
    checks, events, name = Checks(run), 0, ""
    try:
        for name in run.events(EVENTS_PER_RUN):
            events += 1
            run.perform(name)
            checks.after_event()
            advance(1)
        checks.at_end()
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise StressError(
            f"engine {number}, event {events} ({name}): {one_line(error)[:MAX_TEXT]}"
            f" ({Path(frame.filename).name}:{frame.lineno}); {run.config}"
        ) from error
    return _happened(run) + Counter(events=events)


def _happened(run: Run) -> Counter[str]:
    stats, counts = run.engine.stats, run.engine.scheduler.counts
    happened = Counter(
        preemptions=counts.preemptions,
        recomputed=counts.recomputed,
        found=counts.found,
        accepted=stats.accepted,
        wasted=stats.wasted,
    )
    return run.happened + run.executor.counts + happened
