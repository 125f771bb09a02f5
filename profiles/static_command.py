"""`python -m profiles static`: compile every Triton kernel for sm_80 and sm_90 on any machine, and
fail if one spills, does not fit or is worse than the committed baseline.
"""

import argparse
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path

import triton

from bench import jsonl, show
from bench.cases import OPS
from bench.tune import check_compiles
from model.terminal import InputError
from profiles import static

BASELINE = Path(__file__).parent / "static_baseline.jsonl"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--op", nargs="+", default=(), metavar="OP", help=f"of {', '.join(OPS)}")
    parser.add_argument(
        "--arch", nargs="+", type=int, choices=list(static.GPUS), default=list(static.GPUS)
    )
    parser.add_argument("--quick", action="store_true", help="only bf16, and no candidates")
    parser.add_argument(
        "--sass",
        action="store_true",
        help="instructions by class, those of the hottest loop, and what to look at in them",
    )
    parser.add_argument("--baseline", type=Path, default=BASELINE, metavar="FILE")
    parser.add_argument("--update", action="store_true", help="write the rows to the baseline")
    parser.add_argument("--json", action="store_true", help="no table; one JSON document")


def run(options: argparse.Namespace) -> int:
    """Compile, compare with the baseline or replace it; 1 if a row broke a rule."""
    check_compiles()
    if options.update and options.quick:
        raise InputError("--update replaces all rows of an op: leave --quick out")
    for op in options.op:
        if op not in OPS:
            raise InputError(f"unknown op {op!r}; choose of {', '.join(OPS)}")
    known = jsonl.read(options.baseline)
    with redirect_stdout(sys.stderr):  # Triton prints there what ptxas refuses
        found = static.sweep(options.op, options.arch, quick=options.quick, mix=options.sass)
    if options.update:
        known = static.update(known, found, options.op, options.arch)
        options.baseline.unlink(missing_ok=True)
        jsonl.append(options.baseline, known)
    wrong = static.broken_rules(found, known)
    if options.json:
        print(json.dumps({"rows": found, "broken_rules": wrong}))
        return int(bool(wrong))
    _show(found)
    if options.sass:
        _show_sass(found)
    for text in wrong:
        print(f"BROKEN: {text}")
    spilling = sum(bool(row["spill_bytes"]) for row in found)
    print(f"{len(found)} kernels compiled, {spilling} of them spill, {len(wrong)} broken rules")
    return int(bool(wrong))


def _show(found: list[dict]) -> None:
    header = ("op", "kernel", "sm", "dtype", "configuration", " registers", " spill B", " shared B")
    header += (" programs/SM", "wgmma", "tma", " load B", " by 16 B")
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
        ]
        for row in found
    ]
    show.table(f"kernels, compiled by Triton {triton.__version__}", header, lines)


def _show_sass(found: list[dict]) -> None:
    """A paragraph per kernel: its text and its loop by class, and what to look at."""
    for row in found:
        if "mix" in row:
            print(f"\n{row['kernel']}, sm_{row['arch']}, {row['dtype']}, {row['config']}")
            print(f"  all      {_mix(row['mix'])}")
            print(f"  loop     {_mix(row['loop']) if row['loop'] else 'none'}")
            print(f"  look at  {row['look_at']}")


def _mix(mix: dict[str, int]) -> str:
    classes = ", ".join(f"{count} {name}" for name, count in mix.items())
    return f"{sum(mix.values()):,} instructions: {classes}"
