"""`python -m profiles static`: compile every Triton kernel for sm_80 and sm_90 on any machine, and
fail if one spills, does not fit or is worse than the committed baseline.

Figures of loops are lists, loop by loop (`loop_stats`).
"""

import argparse
import json
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

import triton

from bench import jsonl, show
from bench.cases import OPS
from bench.tune import check_compiles
from model.errors import InputError
from profiles.static import analysis as static
from profiles.static import loop_stats

BASELINE = Path(__file__).with_name("baseline.jsonl")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--op", nargs="+", default=(), metavar="OP", help=f"of {', '.join(OPS)}")
    parser.add_argument(
        "--arch", nargs="+", type=int, choices=list(static.GPUS), default=list(static.GPUS)
    )
    parser.add_argument("--quick", action="store_true", help="only bf16, and no candidates")
    parser.add_argument(
        "--sass",
        action="store_true",
        help="instructions by class, hot loops with what they copy ahead, and what to look at",
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
    if not static.same_triton(known):
        versions = ", ".join(sorted({row["triton"] for row in known})) or "no version"
        print(
            f"the baseline is of Triton {versions}: by {triton.__version__}, all must compile, fit"
            " an SM, and keep wgmma and TMA; spills, loads and loops are not compared"
        )
    spilling = sum(bool(row["spill_bytes"]) for row in found)
    print(f"{len(found)} kernels compiled, {spilling} of them spill, {len(wrong)} broken rules")
    return int(bool(wrong))


def _show(found: list[dict]) -> None:
    header = ["op", "kernel", "sm", "dtype", "configuration", " registers", " spill B", " shared B"]
    header += [" programs/SM", "wgmma", "tma", " load B", " by 16 B"]
    header += ["buffers", "wait", "KB in flight", "barriers", "instructions/block"]
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
            *(_each(row[name]) for name in ("buffers", "async_wait")),
            _each(row["bytes_in_flight"], lambda size: f"{size / 1e3:.0f}"),
            *(_each(row[name]) for name in ("barriers", "instructions_per_block")),
        ]
        for row in found
    ]
    show.table(f"kernels, compiled by Triton {triton.__version__}", header, lines)
    for arch in {row["arch"]: None for row in found}:
        for gpu, (least, most) in loop_stats.bytes_to_cover(arch).items():
            print(f"an SM of an {gpu} needs {least / 1e3:.0f} to {most / 1e3:.0f} KB in flight")


def _show_sass(found: list[dict]) -> None:
    """A paragraph per kernel: its text and its loops by class, and what to look at."""
    for row in found:
        if "mix" in row:
            print(f"\n{row['kernel']}, sm_{row['arch']}, {row['dtype']}, {row['config']}")
            print(f"  all      {_mix(row['mix'])}")
            for loop in row["loops"]:
                print(f"  loop     {_mix(loop)}")
            for pipeline in row["pipelines"]:
                print(f"  copies   {_ahead(pipeline, row['programs_per_sm'])}")
            print(f"  look at  {row['look_at']}")


def _each(figure: list | None, text: Callable[[int], str] = str) -> str:
    return " ".join("-" if value is None else text(value) for value in figure or ())


def _ahead(pipeline: dict, programs: int) -> str:
    """What one loop copies ahead, operand by operand."""
    if not pipeline["buffers"]:
        return "nothing by copies" if pipeline["buffers"] is not None else "not known"
    buffers = f"buffers {_each(pipeline['buffers'])}, async_wait {_each([pipeline['async_wait']])}"
    return f"{buffers}, {pipeline['bytes_ahead']:,} B x {programs} programs per SM"


def _mix(mix: dict[str, int]) -> str:
    classes = ", ".join(f"{count} {name}" for name, count in mix.items())
    return f"{sum(mix.values()):,} instructions: {classes}"
