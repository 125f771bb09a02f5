"""`python -m profiles decisions DIR`: what the rows of a first-light run say to do next, once more.

The decision table that `first-light` ends with, made again from DIR/rows.jsonl, and what it rests
on: the line t = a + bytes / w through the times of decode attention, and what each switch gains.
Of the device and commit of the last row. Nothing is measured.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from bench import jsonl
from model.errors import InputError
from model.terminal import table
from profiles.first_light.decision_table import attention_lines, copy_rate, decisions, good, latest
from profiles.runs.task import Row, of_origin


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own options."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="the --out of `first-light`")
    parser.add_argument("--json", action="store_true", help="no tables; one JSON document")


def run(options: argparse.Namespace) -> int:
    """Print. Raises InputError if DIR has no rows."""
    path = options.folder / "rows.jsonl"
    found = jsonl.read(path)
    if not found:
        raise InputError(f"{path}: there are no rows; `profiles first-light --out` writes them")
    rows = latest(of_origin(found, found[-1]))
    lines, pairs = fitted(rows), gained(rows)
    if options.json:
        print(json.dumps({"decisions": decisions(rows), "lines": lines, "pairs": pairs}))
        return 0
    print("\n".join(decisions(rows)))
    show("decode attention, t = a + bytes / w", lines)
    show("what a switch gains", pairs)
    return 0


def fitted(rows: Sequence[Row]) -> list[Row]:
    """Of every form and number of rollouts the line's a and w, and w's share of the copy rate."""
    timed_pairs = good(rows, "pairs")
    forms = dict.fromkeys(row["pair"] for row in timed_pairs)
    return [
        {
            "form": form,
            "rollouts": batch,
            "a us": round(line.start_us, 2),
            "w GB/s": round(line.gb_s, 1),
            "% of copy": round(100 * line.gb_s / copy_rate(timed_pairs), 1),
        }
        for form in forms
        for batch, line in attention_lines(rows, form).items()
    ]


def gained(rows: Sequence[Row]) -> list[Row]:
    """Of every pair both times, and percent of the old one that the new form saves."""
    times = {(row["op"], row["case"], row["pair"]): row["median_us"] for row in good(rows, "pairs")}
    found: dict[tuple[str, str, str], list[tuple[int, float]]] = {}
    for (op, case, pair), us in times.items():
        switch, _, value = pair.partition(" ")
        if value:
            found.setdefault((op, case, switch), []).append((int(value), us))
    made = []
    for (op, case, switch), both in found.items():
        if len(both) == 2:
            (old, before), (new, after) = sorted(both)
            row: Row = {"op": op, "case": case, "switch": f"{switch} {old} -> {new}"}
            row |= {"old us": round(before, 2), "new us": round(after, 2)}
            made.append(row | {"saves %": round(100 * (1 - after / before), 1)})
    return made


def show(title: str, rows: Sequence[Row]) -> None:
    """A table of rows of one kind; nothing without any."""
    if not rows:
        return
    header = [f" {name}" if isinstance(value, float) else name for name, value in rows[0].items()]
    table(title, header, [[str(value) for value in row.values()] for row in rows])
