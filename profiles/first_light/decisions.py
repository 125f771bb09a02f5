"""`python -m profiles decisions DIR`: the decision table of a first-light run, shown again.

It is computed from DIR/rows.jsonl, for the device and commit of the last row, and shown with what
it rests on: the line t = a + bytes / w through the times of decode attention, and what each switch
gains. Nothing is measured.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from bench.rows import jsonl, show
from bench.rows.columns import columns_of, make_table
from model.errors import InputError
from profiles.first_light.decision_table import attention_lines, copy_rate, decisions, good, latest
from profiles.runs.task import Row, rows_from


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="the --out of `first-light`")
    parser.add_argument("--json", action="store_true", help="print one JSON document, no tables")


def run(options: argparse.Namespace) -> int:
    """Print the decisions. Raises InputError if DIR has no rows."""
    path = options.folder / "rows.jsonl"
    all_rows = jsonl.read_measured(path)
    if not all_rows:
        raise InputError(f"{path} has no rows; `profiles first-light --out DIR` writes them")
    rows = latest(rows_from(all_rows, all_rows[-1]))
    lines, pairs = fitted(rows), gained(rows)
    if options.json:
        print(json.dumps({"decisions": decisions(rows), "lines": lines, "pairs": pairs}))
        return 0
    print("\n".join(decisions(rows)))
    show_values("decode attention, t = a + bytes / w", lines)
    show_values("what a switch gains", pairs)
    return 0


def fitted(rows: Sequence[Row]) -> list[Row]:
    """a, w and w's share of the copy bandwidth, for every form and number of rollouts."""
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
    """Both times of every pair, and the percent of the old form's time that the new one saves."""
    times = {(row["op"], row["case"], row["pair"]): row["median_us"] for row in good(rows, "pairs")}
    by_switch: dict[tuple[str, str, str], list[tuple[int, float]]] = {}
    for (op, case, pair), us in times.items():
        switch, _, value = pair.partition(" ")
        if value.isdecimal():
            by_switch.setdefault((op, case, switch), []).append((int(value), us))
    lines = []
    for (op, case, switch), both in by_switch.items():
        if len(both) == 2:
            (old, before), (new, after) = sorted(both)
            row: Row = {"op": op, "case": case, "switch": f"{switch} {old} -> {new}"}
            row |= {"old us": round(before, 2), "new us": round(after, 2)}
            lines.append(row | {"saves %": round(100 * (1 - after / before), 1)})
    return lines


def show_values(title: str, rows: Sequence[Row]) -> None:
    """Print rows with the same fields as a table; nothing if there are none."""
    if rows:
        show.print_table(make_table(title, columns_of(rows), rows))
