"""`python -m profiles nsys -- CMD ...`: a timeline of a command by Nsight Systems, and its summary.

CMD runs with its spans as NVTX ranges. The report DIR/NAME.nsys-rep is kept for the tool's own
window; the summary is read from what `nsys stats` exports of it.
"""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path

from model.errors import InputError
from profiles.profilers import nsys_summary
from profiles.profilers.tools import exported, reported, show, spans_in_nvtx, tool

EPILOG = """\
CPUs are not sampled (--sample=none --cpuctxsw=none): that takes rights and time. Kernels in CUDA
graphs are traced one by one (--cuda-graph-trace=node), which makes replays slower; --graphs whole
traces a replay as one piece instead. A span around a replay has all of its kernels.

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
    parser.add_argument("--name", default="nsys", help="of the report (default: nsys)")
    parser.add_argument("--trace", default="cuda,nvtx,cublas", metavar="APIS", help="of nsys")
    parser.add_argument(
        "--range",
        choices=("all", "profiler"),
        default="all",
        help="all of CMD, or from its cudaProfilerStart to cudaProfilerStop (default: all)",
    )
    parser.add_argument("--graphs", choices=("node", "whole"), default="node")
    parser.add_argument("--no-spans", action="store_true", help="no NVTX ranges of ours")
    parser.add_argument("--summarise", type=Path, metavar="REPORT", help="a report, or its CSV")
    parser.add_argument("--dry-run", action="store_true", help="print the command line")
    parser.add_argument("--json", action="store_true", help="no tables; one JSON document")


def run(options: argparse.Namespace) -> int:
    """Profile and summarise; 1 if CMD failed. Raises InputError without CMD, report or nsys."""
    if options.summarise:
        if options.command:
            raise InputError("--summarise reads a report: leave CMD out")
        _summarise(options.summarise, options.json)
        return 0
    if not options.command:
        raise InputError("say what to profile after --, as in `nsys -- python -m bench e2e`")
    environment = None if options.no_spans else spans_in_nvtx()
    report = options.out / f"{options.name}.nsys-rep"
    if options.dry_run:
        print(show(command_line("nsys", options), environment))
        return 0
    command = command_line(tool("nsys"), options)
    code = reported(command, report, environment)
    _summarise(report, options.json)
    return int(code != 0)


def command_line(nsys: str, options: argparse.Namespace) -> list[str]:
    """What profiles CMD. nsys takes it right after its options: it knows no --."""
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
    """The CSV that the summary is read from. Raises InputError if there is none."""
    if not report.exists():
        raise InputError(f"there is no report {report}")
    if report.suffix not in (".nsys-rep", ".sqlite"):
        return report.read_text(errors="replace")
    nsys = tool("nsys")
    names = reports_known(exported([nsys, "stats", "--help-reports"], fails=True))
    asked = ["--report", ",".join(names), "--format", "csv"]
    again = ["--force-export=true"] if report.suffix == ".nsys-rep" else []
    return exported([nsys, "stats", *asked, *again, str(report)])


def reports_known(help_text: str) -> Sequence[str]:
    """What this version of nsys calls the reports."""
    offered = set(re.findall(r"^ *(\w+)", help_text, re.MULTILINE))
    return [new if new in offered else old for new, old in nsys_summary.REPORTS.items()]


def _summarise(report: Path, as_json: bool) -> None:
    summary = nsys_summary.summarise(export(report), report.name)
    if as_json:
        print(json.dumps({"report": str(report)} | summary))
    else:
        nsys_summary.display(summary, report.name)
