"""A command that measures: its rows as they come to a file, then tables, a report, an exit code."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from bench import jsonl
from bench.ops import parse_device
from bench.options import shared_arguments
from bench.poison import PoisonedError
from bench.report import command as report
from bench.timing import keep_freed_memory

NO_MORE = "this process can do no more; `python -m profiles record` gives every case a process"


@dataclass(frozen=True)
class Measurement:
    """One of `python -m bench`'s commands, as `model.terminal.dispatch` takes it.

    `rows` yields them on a device, `display` prints them, `arguments` adds options of its own.
    `tell` prints its cases or their commands instead, for those that have `--list` and `--repro`.
    """

    rows: Callable[[argparse.Namespace, torch.device], Iterator[dict]]
    display: Callable[[Sequence[dict]], None]
    arguments: Callable[[argparse.ArgumentParser], None] = lambda parser: None
    tell: Callable[[argparse.Namespace, torch.device], int] | None = None

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        self.arguments(parser)
        shared_arguments(parser)

    def run(self, options: argparse.Namespace) -> int:
        if self.tell and (options.list or options.repro):
            return self.tell(options, parse_device(options.device))
        return measure([self], options)


@dataclass(frozen=True)
class Several:
    """Measurements one after the other, with fixed values for the options of each."""

    parts: Sequence[Measurement]
    defaults: dict[str, object]

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        shared_arguments(parser)
        parser.set_defaults(**self.defaults)

    def run(self, options: argparse.Namespace) -> int:
        return measure(self.parts, options)


def measure(parts: Sequence[Measurement], options: argparse.Namespace) -> int:
    """Run them; 1 if a form's numbers are wrong or it could not run, else 0."""
    device = parse_device(options.device)
    keep_freed_memory()
    if options.report:
        report.check(options.report)  # now, not after minutes of work
    found: list[dict] = []
    poisoned: PoisonedError | None = None
    for part in parts:
        made = []
        try:
            for row in part.rows(options, device):
                made.append(row)
                if options.out:
                    jsonl.append(options.out, [row])
        except PoisonedError as error:
            poisoned = error
        if made and not options.json:
            part.display(made)
        found += made
        if poisoned:
            print(f"error: {poisoned.form}: {poisoned}: {NO_MORE}", file=sys.stderr)
            break
    if options.report and found:
        page, *pictures = report.write(found, options.report)
        if not options.json:
            print(f"\nreport: {page} and {len(pictures)} pictures beside it")
    if options.json:
        print(json.dumps({"rows": found}))
    return int(poisoned is not None or any(row.get("failure") for row in found))
