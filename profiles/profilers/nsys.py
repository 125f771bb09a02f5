"""`python -m profiles nsys -- CMD ...`: a timeline of a command by Nsight Systems, and its summary.

CMD runs with spans as NVTX ranges. The report DIR/NAME.nsys-rep is kept for nsys's own GUI; the
summary is read from the export of `nsys stats`.
"""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path

from model.errors import InputError
from model.text.files import check_regular
from profiles.profilers import nsys_summary
from profiles.profilers.exports import read_text
from profiles.profilers.tools import (
    c_locale_argument,
    run_and_capture,
    run_profiler,
    show,
    spans_in_nvtx,
    tool,
)

EPILOG = """\
CPUs are not sampled (--sample=none --cpuctxsw=none), which would need permissions and time. Kernels
in CUDA graphs are traced one by one (--cuda-graph-trace=node), which makes replays slower; --graphs
whole traces a replay as one unit instead. A span around a replay contains all of its kernels.

examples:
  python -m profiles nsys -- python -m bench e2e
  python -m profiles nsys --range profiler -- python -m profiles launch --op prefix_attention
  python -m profiles nsys --summarise trace.nsys-rep --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("command", nargs="*", metavar="CMD", help="what to profile, after --")
    parser.add_argument("--out", type=Path, default=Path("traces"), metavar="DIR")
    parser.add_argument("--name", default="nsys", help="name of the report (default: nsys)")
    parser.add_argument(
        "--trace", default="cuda,nvtx,cublas", metavar="APIS", help="what nsys traces"
    )
    parser.add_argument(
        "--range",
        choices=("all", "profiler"),
        default="all",
        help="all of CMD, or from cudaProfilerStart to cudaProfilerStop (default: all)",
    )
    parser.add_argument(
        "--graphs",
        choices=("node", "whole"),
        default="node",
        help="trace a CUDA graph's kernels one by one, or each replay as a unit (default: node)",
    )
    parser.add_argument("--no-spans", action="store_true", help="do not add our NVTX ranges")
    parser.add_argument(
        "--summarise", type=Path, metavar="REPORT", help="only summarise a report, or its CSV"
    )
    c_locale_argument(parser)
    parser.add_argument("--dry-run", action="store_true", help="only print the command line")
    parser.add_argument("--json", action="store_true", help="print one JSON document, no tables")


def run(options: argparse.Namespace) -> int:
    """Profile and summarise; 1 if CMD failed. Raises InputError without CMD, report or nsys."""
    if options.summarise:
        if options.command:
            raise InputError("--summarise reads a report: leave CMD out")
        _summarise(options.summarise, options)
        return 0
    if not options.command:
        raise InputError("say what to profile after --, as in `nsys -- python -m bench e2e`")
    variables = {} if options.no_spans else spans_in_nvtx()
    report = options.out / f"{options.name}.nsys-rep"
    if options.dry_run:
        print(show(command_line("nsys", options), variables))
        return 0
    command = command_line(tool("nsys"), options)
    code = run_profiler(command, report, variables)
    _summarise(report, options)
    return int(code != 0)


def command_line(nsys: str, options: argparse.Namespace) -> list[str]:
    """The command line that profiles CMD, which follows the options directly: nsys has no --."""
    capture = []
    if options.range == "profiler":
        capture = ["--capture-range=cudaProfilerApi", "--capture-range-end=stop"]
    return [
        nsys,
        "profile",
        f"--trace={options.trace}",
        "--sample=none",
        "--cpuctxsw=none",
        f"--cuda-graph-trace={'graph' if options.graphs == 'whole' else 'node'}",
        *capture,
        "--force-overwrite=true",
        f"--output={options.out / options.name}",
        *options.command,
    ]


def export(report: Path) -> str:
    """The CSV from which the summary is read. Raises InputError if there is none."""
    if not report.exists():
        raise InputError(f"there is no report {report}")
    check_regular(report)
    if report.suffix not in (".nsys-rep", ".sqlite"):
        return read_text(report)
    nsys = tool("nsys")
    names = report_names(run_and_capture([nsys, "stats", "--help-reports"], may_fail=True))
    reports = ["--report", ",".join(names), "--format", "csv"]
    force = ["--force-export=true"] if report.suffix == ".nsys-rep" else []
    return run_and_capture([nsys, "stats", *reports, *force, str(report)])


def report_names(help_text: str) -> Sequence[str]:
    """The names of the reports in this version of nsys."""
    offered = set(re.findall(r"^ *(\w+)", help_text, re.MULTILINE))
    return [new if new in offered else old for new, old in nsys_summary.REPORTS.items()]


def _summarise(report: Path, options: argparse.Namespace) -> None:
    c_locale = options.c_locale or report.suffix in (".nsys-rep", ".sqlite")
    summary = nsys_summary.summarise(export(report), report.name, c_locale)
    if options.json:
        print(json.dumps({"report": str(report)} | summary))
    else:
        nsys_summary.display(summary, report.name)
