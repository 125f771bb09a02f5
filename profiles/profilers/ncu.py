"""`python -m profiles ncu --op OP`: one case of an op under Nsight Compute, and its summary.

ncu replays every kernel of one warm call several times, with different counters. The report
DIR/OP.ncu-rep is kept for ncu's own GUI; the summary is read from the export of `ncu --import`.
"""

import argparse
import json
import sys
from pathlib import Path

from model.errors import InputError
from model.terminal import integer
from model.text.files import check_regular
from profiles.profilers import ncu_summary
from profiles.profilers.exports import read_text
from profiles.profilers.launch import add_case_arguments
from profiles.profilers.tools import (
    c_locale_argument,
    check_gpu,
    run_and_capture,
    run_profiler,
    show,
    tool,
)

EPILOG = """\
Only the kernels between cudaProfilerStart and cudaProfilerStop are profiled: those of one call
(`python -m profiles launch`), after warm-up. Caches are flushed before every pass (--cache all).
Clocks are left alone, as in `bench ops`; --clocks base locks them to their base for the run, which
is ncu's default: times of different days are then comparable, but longer. If ncu reports
ERR_NVGPUCTRPERM, an administrator must allow performance counters for users, or run it.

examples:
  python -m profiles ncu --op prefix_attention --shape "B16 P2048"
  python -m profiles ncu --op rms_norm --impl eager --kernel "^(?!.*copy)" --dry-run
  python -m profiles ncu --summarise traces/prefix_attention.ncu-rep
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    add_case_arguments(parser, required=False)
    parser.add_argument("--out", type=Path, default=Path("traces"), metavar="DIR")
    parser.add_argument(
        "--set",
        default="full",
        help="set of sections, as ncu names it (default: full; see `ncu --list-sets`)",
    )
    parser.add_argument("--kernel", metavar="REGEX", help="only these kernels of the call")
    parser.add_argument(
        "--skip", type=integer(0, 10**9), default=0, metavar="N", help="launches to skip"
    )
    parser.add_argument(
        "--count", type=integer(1, 10**9), metavar="N", help="launches to profile (default: all)"
    )
    parser.add_argument("--cache", choices=("all", "none"), default="all", help="(default: all)")
    parser.add_argument(
        "--clocks",
        choices=("none", "base"),
        default="none",
        help="base: lock the clocks to their base during the run (default: none)",
    )
    parser.add_argument(
        "--summarise", type=Path, metavar="REPORT", help="only summarise a report, or its raw CSV"
    )
    c_locale_argument(parser)
    parser.add_argument("--dry-run", action="store_true", help="only print the command line")
    parser.add_argument("--json", action="store_true", help="print one JSON document, no table")


def run(options: argparse.Namespace) -> int:
    """Profile and summarise. Raises InputError without op or report, ncu or a GPU."""
    if options.summarise:
        _summarise(options.summarise, options)
        return 0
    if not options.op:
        raise InputError("say what to profile: --op OP, or --summarise REPORT")
    if options.dry_run:
        print(show(command_line("ncu", options)))
        return 0
    command = command_line(tool("ncu"), options)
    check_gpu("ncu")
    report = options.out / f"{options.op}.ncu-rep"
    code = run_profiler(command, report)
    _summarise(report, options)
    return int(code != 0)


def command_line(ncu: str, options: argparse.Namespace) -> list[str]:
    """The command line that profiles the case."""
    launches = [f"--launch-skip={options.skip}"] if options.skip else []
    launches += [f"--launch-count={options.count}"] if options.count else []
    selected = {"shape": options.shape, "dtype": options.dtype, "impl": options.impl}
    case = [part for name, value in selected.items() if value for part in (f"--{name}", value)]
    return [
        ncu,
        f"--set={options.set}",
        "--target-processes=all",
        "--profile-from-start=off",
        *([f"--kernel-name=regex:{options.kernel}"] if options.kernel else []),
        *launches,
        f"--cache-control={options.cache}",
        f"--clock-control={options.clocks}",
        "--force-overwrite",
        f"--export={options.out / options.op}",
        *(sys.executable, "-m", "profiles", "launch", "--op", options.op, *case),
        "--device=cuda",
    ]


def export(report: Path) -> str:
    """The CSV from which the summary is read. Raises InputError if there is none."""
    if not report.exists():
        raise InputError(f"there is no report {report}")
    check_regular(report)
    if report.suffix != ".ncu-rep":
        return read_text(report)
    return run_and_capture([tool("ncu"), "--import", str(report), "--page", "raw", "--csv"])


def _summarise(report: Path, options: argparse.Namespace) -> None:
    c_locale = options.c_locale or report.suffix == ".ncu-rep"
    launches = ncu_summary.summarise(export(report), report.name, c_locale)
    if options.json:
        print(json.dumps({"report": str(report), "launches": launches}))
    else:
        ncu_summary.display(launches, report.name)
