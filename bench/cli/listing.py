"""Dry runs of `bench ops` and `bench numerics`: `--list` prints cases, `--repro` commands."""

import argparse
import json
from collections.abc import Sequence

import torch

from bench.rows import op_tables, repro, show
from bench.rows.columns import make_table
from bench.suite.forms import forms_here, forms_of
from bench.suite.op import Case
from kernels.runtime.dtypes import dtype_name

SelectedCases = Sequence[tuple[Case, torch.dtype]]


def needed(options: argparse.Namespace, impl: str) -> list[str]:
    """The options without which another run does not have the case and the form `impl`."""
    own = [text for text in options.own_forms if text.endswith(f":{impl}")]
    words = ["--with", *own] if own else []
    if getattr(options, "shapes", None):
        words += ["--shapes", str(options.shapes)]
        words += ["--percentiles", *(str(value) for value in options.percentiles)]
        words += ["--width", str(options.width)] if options.width else []
    return words


def run(
    options: argparse.Namespace, device: torch.device, command: str, selected: SelectedCases
) -> int:
    """Print the cases that `command` would measure, or the commands of their rows."""
    listed: list[dict] = [
        {
            "op": case.op,
            "case": case.name,
            "dtype": dtype_name(dtype),
            "bytes": case.bytes(dtype),
            "flops": case.flops,
            "impls": list(forms_of(case, options.impl) or forms_here(case, device)),
        }
        for case, dtype in selected
    ]
    for row in listed:
        row["commands"] = [
            repro.command(
                row["op"], row["case"], impl, row["dtype"], command, needed(options, impl)
            )
            for impl in row["impls"]
        ]
    if options.json:
        print(json.dumps({"cases": listed}))
    elif options.repro:
        print("\n".join(command for row in listed for command in row["commands"]))
    else:
        show.print_table(make_table(f"{len(listed)} cases", op_tables.CASES, listed))
    return 0
