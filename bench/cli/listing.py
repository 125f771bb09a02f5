"""Dry runs of `bench ops` and `bench numerics`: `--list` prints cases, `--repro` commands."""

import argparse
import json
from collections.abc import Sequence

import torch

from bench.rows import repro
from bench.suite.forms import forms_here, forms_of
from bench.suite.op import Case
from kernels.runtime.dtypes import dtype_name
from model.terminal import table

SelectedCases = Sequence[tuple[Case, torch.dtype]]


def run(
    options: argparse.Namespace, device: torch.device, command: str, selected: SelectedCases
) -> int:
    """Print the cases that `command` would measure, or the commands of their rows."""
    listed = [
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
            repro.command(row["op"], row["case"], impl, row["dtype"], command)
            for impl in row["impls"]
        ]
    if options.json:
        print(json.dumps({"cases": listed}))
    elif options.repro:
        print("\n".join(command for row in listed for command in row["commands"]))
    else:
        header = ("op", "case", "dtype", " MB", " MFLOP", "forms and peers")
        lines = [
            [
                row["op"],
                row["case"],
                row["dtype"],
                f"{row['bytes'] / 1e6:,.2f}",
                f"{row['flops'] / 1e6:,.2f}",
                " ".join(row["impls"]),
            ]
            for row in listed
        ]
        table(f"{len(listed)} cases", header, lines)
    return 0
