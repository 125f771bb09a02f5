"""`python -m profiles record --out DIR`: measure all that this machine can, as rows in DIR.

`python -m profiles static`: compile every Triton kernel for sm_80 and sm_90 on any machine, and
fail if one spills, does not fit or is worse than the committed baseline.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

import triton

from bench import rows, show
from bench.cases import OPS
from bench.ops import device_named
from bench.tune import check_compiles
from model.terminal import InputError, Parser, run_command
from profiles import static
from profiles.record import Outcome, record, select, tasks

BASELINE = Path(__file__).parent / "static_baseline.jsonl"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 1 if a row failed or broke a rule, else 0."""
    options = _parser().parse_args(argv)
    return options.run(options)


def run_record(options: argparse.Namespace) -> int:
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


def run_static(options: argparse.Namespace) -> int:
    """Compile, compare with the baseline or replace it; 1 if a row broke a rule."""
    check_compiles()
    if options.update and options.quick:
        raise InputError("--update replaces all rows of an op: leave --quick out")
    for op in options.op:
        if op not in OPS:
            raise InputError(f"unknown op {op!r}; choose of {', '.join(OPS)}")
    known = rows.read(options.baseline)
    with redirect_stdout(sys.stderr):  # Triton prints there what ptxas refuses
        found = static.sweep(options.op, options.arch, quick=options.quick, mix=options.sass)
    if options.update:
        known = static.update(known, found, options.op, options.arch)
        options.baseline.unlink(missing_ok=True)
        rows.append(options.baseline, known)
    wrong = static.broken_rules(found, known)
    if options.json:
        print(json.dumps({"rows": found, "broken_rules": wrong}))
    else:
        _show_static(found, wrong)
    return int(bool(wrong))


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
    command.set_defaults(run=run_record)
    _add_static(commands.add_parser("static", help="registers, spills, occupancy without a GPU"))
    return parser


def _add_static(command: argparse.ArgumentParser) -> None:
    command.add_argument("--op", nargs="+", default=(), metavar="OP", help=f"of {', '.join(OPS)}")
    command.add_argument(
        "--arch", nargs="+", type=int, choices=list(static.GPUS), default=list(static.GPUS)
    )
    command.add_argument("--quick", action="store_true", help="only bf16, and no candidates")
    command.add_argument("--sass", action="store_true", help="count the instructions by class")
    command.add_argument("--baseline", type=Path, default=BASELINE, metavar="FILE")
    command.add_argument("--update", action="store_true", help="write the rows to the baseline")
    command.add_argument("--json", action="store_true", help="no table; one JSON document")
    command.set_defaults(run=run_static)


def _show_static(found: list[dict], wrong: list[str]) -> None:
    header = ("op", "kernel", "sm", "dtype", "configuration", " registers", " spill B", " shared B")
    header += (" programs/SM", "wgmma", "tma", " load B", " by 16 B", "")
    figures = ("registers", "spill_bytes", "shared_bytes", "programs_per_sm")
    lines = [
        [
            row["op"],
            row["kernel"],
            str(row["arch"]),
            row["dtype"],
            row["config"],
            *("" if row[name] is None else f"{row[name]:,}" for name in figures),
            "yes" * bool(row["wgmma"]),
            "yes" * bool(row["tma"]),
            str(row["min_load_bytes"] or ""),
            "" if row["wide_loads"] is None else f"{row['wide_loads']:.0%}",
            ", ".join(f"{count} {name}" for name, count in row.get("mix", {}).items()),
        ]
        for row in found
    ]
    show.table(f"kernels, compiled by Triton {triton.__version__}", header, lines)
    for text in wrong:
        print(f"BROKEN: {text}")
    spilling = sum(bool(row["spill_bytes"]) for row in found)
    print(f"{len(found)} kernels compiled, {spilling} of them spill, {len(wrong)} broken rules")


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
