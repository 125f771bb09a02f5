"""`python -m profiles record --out DIR`: measure all that this machine can, as rows in DIR."""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from bench import show
from bench.ops import device_named
from model.terminal import InputError, Parser, run_command
from profiles.record import Outcome, record, select, tasks


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 1 if a row failed, else 0."""
    options = _parser().parse_args(argv)
    if options.budget <= 0:
        raise InputError(f"--budget must be a positive number of seconds, not {options.budget}")
    device = device_named(options.device)
    work = select(list(tasks(device)), options.section, options.case)
    outcome = record(options.out, device, work, options.budget)
    if options.json:
        left_out = [str(task) for task in outcome.left_out]
        print(json.dumps({"rows": outcome.rows, "kept": outcome.kept, "left_out": left_out}))
    else:
        _show(outcome, options.out)
    return int(any(row["failure"] for row in outcome.rows))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m profiles", description=__doc__)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser(
        "record", help="roofline, errors, decode step and op table, written to a folder"
    )
    command.add_argument("--out", type=Path, required=True, metavar="DIR")
    command.add_argument(
        "--budget",
        type=float,
        default=450.0,
        metavar="SECONDS",
        help="start no new case after this time (default: 450)",
    )
    command.add_argument("--section", nargs="+", default=(), help="these only (default: all)")
    command.add_argument("--case", default="", metavar="TEXT", help="TEXT in the op or case only")
    command.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    command.add_argument(
        "--json", action="store_true", help="no tables; end with one JSON document"
    )
    return parser


def _show(outcome: Outcome, out: Path) -> None:
    timed = [row for row in outcome.rows if row.get("median_us")]
    if timed:
        show.times(timed)
    failed = [row for row in outcome.rows if row["failure"]]
    for row in failed:
        print(
            f"FAILED: {row['op']}, {row['case']}, {row['impl']}, {row['dtype']}: {row['failure']}"
        )
    print(
        f"{len(outcome.rows)} rows written to {out}, {len(failed)} of them failed;"
        f" {outcome.kept} cases were already there"
    )
    if outcome.left_out:
        counts = Counter(task.section for task in outcome.left_out)
        text = ", ".join(f"{count} of {section}" for section, count in counts.items())
        print(f"the budget left out {text}; run again to go on", file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
