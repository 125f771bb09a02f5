"""`python -m profiles proton --op OP`: time of each kernel by Proton, which is in Triton's wheel.

It traces back-to-back calls, whereas ncu runs each kernel alone. Needs a GPU. The file
DIR/OP.hatchet is for `proton-viewer`; the table is read from it as Triton 3.6.0's viewer reads it:
a tree of frames with metrics, among them "time (ns)" and "count". Not yet tested on a file from a
GPU.
"""

import argparse
import json
from collections.abc import Iterator
from math import inf
from pathlib import Path

import torch

from bench.measure.devices import parse_device
from model.errors import InputError
from model.terminal import table
from model.text.files import check_target
from profiles.profilers.launch import CALLS, WARM_UP, add_case_arguments, prepared
from profiles.profilers.tools import INSTEAD, check_gpu

TIME, COUNT = "time (ns)", "count"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_case_arguments(parser)
    parser.add_argument("--out", type=Path, default=Path("traces"), metavar="DIR")
    parser.add_argument(
        "--calls", type=CALLS, default=20, metavar="N", help="calls to profile (default: 20)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document, no table")


def run(options: argparse.Namespace) -> int:
    """Profile and summarise. Raises InputError without a GPU or Proton."""
    check_gpu("Proton")
    try:
        from triton import profiler
    except ImportError as error:
        raise InputError(f"this Triton has no Proton; {INSTEAD}") from error
    path = options.out / options.op
    check_target(path.with_suffix(".hatchet"))
    name, call = prepared(options, parse_device("cuda"))
    options.out.mkdir(parents=True, exist_ok=True)
    with torch.inference_mode():
        for _ in range(WARM_UP):
            call()
        torch.cuda.synchronize()
        profiler.start(str(path))
        for _ in range(options.calls):
            call()
        torch.cuda.synchronize()
        profiler.finalize()
    rows = kernels(path.with_suffix(".hatchet"))
    if options.json:
        print(json.dumps({"case": name, "calls": options.calls, "kernels": rows}))
    else:
        display(rows, f"{options.calls} x {name}")
    return 0


def kernels(path: Path) -> list[dict]:
    """Launches, total_us and mean_us of every kernel, longest first.

    Raises InputError for a file that is not Proton's tree.
    """
    try:
        roots = json.loads(path.read_text(encoding="utf-8"))
        by_name: dict[str, list[float]] = {}
        for name, metrics in _leaves(roots[0]):
            if not (0 <= metrics[TIME] < inf and metrics.get(COUNT, 1) > 0):
                raise ValueError("an impossible time or count")
            launches, time = by_name.setdefault(name, [0, 0.0])
            by_name[name] = [launches + metrics.get(COUNT, 1), time + metrics[TIME] / 1e3]
    except (
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ) as error:
        raise InputError(f"{path} is not a tree of kernels and times by Proton") from error
    rows = [
        {"kernel": name, "launches": launches, "total_us": time, "mean_us": time / launches}
        for name, (launches, time) in by_name.items()
    ]
    return sorted(rows, key=lambda row: -row["total_us"])


def display(rows: list[dict], title: str) -> None:
    lines = [
        [
            row["kernel"][:80],
            f"{row['launches']:,}",
            f"{row['total_us']:,.1f}",
            f"{row['mean_us']:.2f}",
        ]
        for row in rows
    ]
    table(title, ("kernel", " launches", " us", " mean us"), lines)


def _leaves(node: dict) -> Iterator[tuple[str, dict]]:
    """The frames that have a time: kernels."""
    if TIME in node.get("metrics", {}):
        yield node["frame"]["name"], node["metrics"]
    for child in node.get("children", []):
        yield from _leaves(child)
