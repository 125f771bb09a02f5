"""What `bench ops` and `bench numerics` would measure: `--list` cases, `--repro` commands."""

import argparse
import json
from collections.abc import Sequence

import torch

from bench import repro
from bench.cases import Case
from bench.ops import forms_here, forms_of
from kernels.runtime.dtypes import dtype_name
from model.terminal import table

SelectedCases = Sequence[tuple[Case, torch.dtype]]


def run(
    options: argparse.Namespace, device: torch.device, command: str, chosen: SelectedCases
) -> int:
    """Print one or the other of what `command` would measure."""
    found = [
        {
            "op": case.op,
            "case": case.name,
            "dtype": dtype_name(dtype),
            "bytes": case.bytes(dtype),
            "flops": case.flops,
            "impls": list(forms_of(case, options.impl) or forms_here(case, device)),
        }
        for case, dtype in chosen
    ]
    for row in found:
        row["commands"] = [
            repro.command(row["op"], row["case"], impl, row["dtype"], command)
            for impl in row["impls"]
        ]
    if options.json:
        print(json.dumps({"cases": found}))
    elif options.repro:
        print("\n".join(command for row in found for command in row["commands"]))
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
            for row in found
        ]
        table(f"{len(found)} cases", header, lines)
    return 0
