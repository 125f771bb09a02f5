"""Running a measuring command: rows to a file as they come, then tables, a report, an exit code."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from bench.measure.devices import parse_device
from bench.measure.poison import PoisonedError
from bench.measure.timing import keep_freed_memory
from bench.options import shared_arguments
from bench.report import command as report
from bench.rows import jsonl

MUST_END = "this process must end; `python -m profiles record` runs every case in its own process"


@dataclass(frozen=True)
class Measurement:
    """One of `python -m bench`'s commands, in the form that `model.terminal.dispatch` takes.

    `rows` yields its rows on a device, `display` prints them, `arguments` adds its own options. For
    commands with `--list` and `--repro`, `list_cases` prints the cases or their commands instead.
    """

    rows: Callable[[argparse.Namespace, torch.device], Iterator[dict]]
    display: Callable[[Sequence[dict]], None]
    arguments: Callable[[argparse.ArgumentParser], None] = lambda parser: None
    list_cases: Callable[[argparse.Namespace, torch.device], int] | None = None

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        self.arguments(parser)
        shared_arguments(parser)

    def run(self, options: argparse.Namespace) -> int:
        if self.list_cases and (options.list or options.repro):
            return self.list_cases(options, parse_device(options.device))
        return measure([self], options)


@dataclass(frozen=True)
class Several:
    """Several measurements in a row, with fixed values for their options."""

    parts: Sequence[Measurement]
    defaults: dict[str, object]

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        shared_arguments(parser)
        parser.set_defaults(**self.defaults)

    def run(self, options: argparse.Namespace) -> int:
        return measure(self.parts, options)


def measure(parts: Sequence[Measurement], options: argparse.Namespace) -> int:
    """Run the measurements; returns 1 if a form's numbers are wrong or it could not run, else 0."""
    if options.threads:
        torch.set_num_threads(options.threads)
    device = parse_device(options.device)
    keep_freed_memory()
    if options.out:
        jsonl.append(options.out, [])  # fails now, not after minutes of work
    if options.report:
        report.check(options.report)
    all_rows: list[dict] = []
    poisoned: PoisonedError | None = None
    for part in parts:
        rows = []
        try:
            for row in part.rows(options, device):
                rows.append(row)
                if options.out:
                    jsonl.append(options.out, [row])
        except PoisonedError as error:
            poisoned = error
        if rows and not options.json:
            part.display(rows)
        all_rows += rows
        if poisoned:
            print(f"error: {poisoned.form}: {poisoned}: {MUST_END}", file=sys.stderr)
            break
    if options.report and all_rows:
        page, *pictures = report.write(all_rows, options.report)
        if not options.json:
            print(f"\nreport: {page} and {len(pictures)} pictures in the same folder")
    if options.json:
        print(json.dumps({"rows": all_rows}))
    return int(poisoned is not None or any(row.get("failure") for row in all_rows))
