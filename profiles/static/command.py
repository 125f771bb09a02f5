"""`python -m profiles static`: compile every Triton kernel for sm_80 and sm_90 on any machine.

It fails if a kernel spills, does not fit an SM or is worse than the committed baseline. Figures of
loops are lists with one value per loop (`loop_stats`).
"""

import argparse
import json
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import triton

from bench.measure.tune import check_compiles
from bench.rows import jsonl, show
from bench.rows.columns import Column, Kind
from bench.rows.formats import whole
from bench.suite import OPS
from model.errors import InputError
from model.terminal import integer
from profiles.static import analysis as static
from profiles.static import loop_stats

BASELINE = Path(__file__).with_name("baseline.jsonl")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--op", nargs="+", default=(), metavar="OP", help=f"only these of: {', '.join(OPS)}"
    )
    parser.add_argument(
        "--arch",
        nargs="+",
        type=integer(1, 999),
        choices=list(static.GPUS),
        default=list(static.GPUS),
    )
    parser.add_argument("--quick", action="store_true", help="only bf16, without tuning candidates")
    parser.add_argument(
        "--sass",
        action="store_true",
        help="also instructions by class, hot loops and their pipelines, and what to look at",
    )
    parser.add_argument("--baseline", type=Path, default=BASELINE, metavar="FILE")
    parser.add_argument("--update", action="store_true", help="write the rows to the baseline")
    parser.add_argument("--json", action="store_true", help="print one JSON document, no table")


def run(options: argparse.Namespace) -> int:
    """Compile, and compare with the baseline or replace it. Returns 1 if a row breaks a rule."""
    check_compiles()
    if options.update and options.quick:
        raise InputError(
            "--update replaces all rows of an op, so it cannot be combined with --quick"
        )
    for op in options.op:
        if op not in OPS:
            raise InputError(f"unknown op {op!r}; choose from: {', '.join(OPS)}")
    known: list[dict] = [*jsonl.read(options.baseline)]
    if options.update:
        jsonl.append(options.baseline, [])  # fails now for another file, which would be deleted
    with redirect_stdout(sys.stderr):  # Triton prints the errors of ptxas there
        compiled = static.sweep(options.op, options.arch, quick=options.quick, mix=options.sass)
    if options.update:
        known = static.update(known, compiled, options.op, options.arch)
        options.baseline.unlink(missing_ok=True)
        jsonl.append(options.baseline, known)
    wrong = static.broken_rules(compiled, known)
    if options.json:
        print(json.dumps({"rows": compiled, "broken_rules": wrong}))
        return int(bool(wrong))
    _show(compiled)
    if options.sass:
        _show_sass(compiled)
    for text in wrong:
        print(f"BROKEN: {text}")
    if not static.same_triton(known):
        versions = ", ".join(sorted({row["triton"] for row in known})) or "no version"
        print(
            f"the baseline is of Triton {versions}; with {triton.__version__} kernels must compile,"
            " fit an SM and keep wgmma and TMA; spills, loads and loops are not compared"
        )
    spilling = sum(bool(row["spill_bytes"]) for row in compiled)
    print(f"{len(compiled)} kernels compiled, {spilling} of them spill, {len(wrong)} broken rules")
    return int(bool(wrong))


def _values(figures: list, text: Callable[[int], str] = str) -> str:
    """The figures of all hot loops, in the order of the code; "-" where one is unknown."""
    return " ".join("-" if value is None else text(value) for value in figures)


KERNELS = Kind(
    f"kernels, compiled by Triton {triton.__version__}",
    (
        *(Column("op", "op"), Column("kernel", "kernel"), Column("sm", "arch")),
        *(Column("dtype", "dtype"), Column("config", "config")),
        Column(" registers", "registers", whole),
        Column(" spill B", "spill_bytes", whole),
        Column(" shared B", "shared_bytes", whole),
        Column(" programs/SM", "programs_per_sm", whole),
        Column("wgmma", lambda row: "yes" * bool(row["wgmma"])),
        Column("tma", lambda row: "yes" * bool(row["tma"])),
        Column(" load B", lambda row: row["min_load_bytes"] or None),
        Column(" 16 B loads", "wide_loads", lambda share: f"{share:.0%}"),
        Column("buffers", "buffers", _values),
        Column("wait", "async_wait", _values),
        Column(
            "KB in flight",
            "bytes_in_flight",
            partial(_values, text=lambda size: f"{size / 1e3:.0f}"),
        ),
        Column("barriers", "barriers", _values),
        Column("instructions/block", "instructions_per_block", _values),
    ),
)


def _show(rows: list[dict]) -> None:
    show.show(KERNELS, rows)
    for arch in {row["arch"]: None for row in rows}:
        for gpu, (low, high) in loop_stats.bytes_to_cover(arch).items():
            print(f"an SM of an {gpu} needs {low / 1e3:.0f} to {high / 1e3:.0f} KB in flight")


def _show_sass(rows: list[dict]) -> None:
    """Print a paragraph per kernel: instructions by class, its loops, and what to look at."""
    for row in rows:
        if "mix" in row:
            print(f"\n{row['kernel']}, sm_{row['arch']}, {row['dtype']}, {row['config']}")
            print(f"  all      {_mix(row['mix'])}")
            for loop in row["loops"]:
                print(f"  loop     {_mix(loop)}")
            for pipeline in row["pipelines"]:
                print(f"  copies   {_pipeline_text(pipeline, row['programs_per_sm'])}")
            print(f"  look at  {row['look_at']}")


def _pipeline_text(pipeline: dict, programs: int) -> str:
    """What one loop copies ahead, per operand."""
    if not pipeline["buffers"]:
        return "none" if pipeline["buffers"] is not None else "unknown"
    buffers = (
        f"buffers {_values(pipeline['buffers'])}, async_wait {_values([pipeline['async_wait']])}"
    )
    return f"{buffers}, {pipeline['bytes_ahead']:,} B x {programs} programs per SM"


def _mix(mix: dict[str, int]) -> str:
    classes = ", ".join(f"{count} {name}" for name, count in mix.items())
    return f"{sum(mix.values()):,} instructions: {classes}"
