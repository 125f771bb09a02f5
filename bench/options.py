"""Options shared by several commands of `python -m bench`."""

import argparse
from pathlib import Path

from bench.suite import OPS
from bench.suite.forms import FORMS
from model.terminal import add_threads, real

SECONDS = real(0, 86_400, exclusive=True)  # type of options: up to a day


def case_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that select cases: `--op` and `--shape`."""
    parser.add_argument(
        "--op", nargs="+", default=(), metavar="OP", help=f"any of {', '.join(OPS)}"
    )
    parser.add_argument(
        "--shape", default="", metavar="TEXT", help="the case of this name, or all with TEXT in it"
    )


def filter_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that select cases, forms and dtypes."""
    case_arguments(parser)
    parser.add_argument(
        "--impl",
        nargs="+",
        default=(),
        metavar="FORM",
        help=f"only these forms, modes and peers (default: all that run here): {', '.join(FORMS)}",
    )
    parser.add_argument(
        "--dtype",
        nargs="+",
        default=(),
        metavar="DTYPE",
        help="bfloat16, float16, float32 (default: numerics checks all; timings use float32 on a"
        " CPU, bfloat16 on a GPU)",
    )


def shared_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of every measuring command."""
    output_arguments(parser)
    parser.add_argument("--out", type=Path, metavar="FILE", help="add the rows to a JSONL file")
    parser.add_argument(
        "--report", type=Path, metavar="DIR", help="write an HTML page and pictures of the rows"
    )


def output_arguments(parser: argparse.ArgumentParser) -> None:
    """Options for the device, its threads and the output format."""
    parser.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    add_threads(parser)
    parser.add_argument(
        "--json", action="store_true", help="print one JSON document of all rows, no tables"
    )
