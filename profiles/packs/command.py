"""`python -m profiles kernels`: compile kernels without a GPU, for a GPU node with the same Triton.

    python -m profiles kernels pack --out FILE
    python -m profiles kernels unpack FILE

A pack holds the kernels that the benchmarks and the engine launch.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

from bench.launch_sites import all_sites
from bench.measure.tune import check_compiles
from kernels.runtime.configs import A100, H200
from model.errors import InputError
from model.terminal import integer
from profiles.packs.kernel_pack import pack, unpack

# Tuned kernel configs go by GPU name, so GPUs of one architecture may need different kernels.
GPUS = {80: (A100,), 90: (H200, replace(H200, name="nvidia-h100-80gb-hbm3"))}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="act", required=True, metavar="pack|unpack")
    packing = commands.add_parser("pack", help="compile for GPUs of these architectures")
    packing.add_argument("--out", type=Path, required=True, metavar="FILE")
    packing.add_argument(
        "--arch", nargs="+", type=integer(1, 999), choices=GPUS, default=list(GPUS)
    )
    unpacking = commands.add_parser("unpack", help="put a pack's kernels into Triton's cache")
    unpacking.add_argument("file", type=Path, metavar="FILE")
    for command in (packing, unpacking):
        command.add_argument("--json", action="store_true", help="print one JSON document")


def run(options: argparse.Namespace) -> int:
    """Pack or unpack. Returns 1 if a kernel did not compile."""
    check_compiles()
    start = time.perf_counter()
    result = _pack(options) if options.act == "pack" else _unpack(options)
    result["seconds"] = round(time.perf_counter() - start, 1)
    print(json.dumps(result) if options.json else _text(result))
    return int(bool(result.get("failures")))


def _pack(options: argparse.Namespace) -> dict:
    if not options.out.parent.is_dir():
        raise InputError(f"--out {options.out}: the folder {options.out.parent} does not exist")
    gpus = [gpu for arch in options.arch for gpu in GPUS[arch]]
    summary = pack(options.out, all_sites(), gpus)
    return {
        "file": str(options.out),
        "kernels": summary.compiled,
        "bytes": options.out.stat().st_size,
        "failures": summary.failures,
    }


def _unpack(options: argparse.Namespace) -> dict:
    kernels, new = unpack(options.file)
    size = options.file.stat().st_size
    return {"file": str(options.file), "kernels": kernels, "new": new, "bytes": size}


def _text(result: dict) -> str:
    lines = [f"FAILED: {failure}" for failure in result.get("failures", ())]
    new = f", {result['new']} of them new here" if "new" in result else ""
    size = f"{result['bytes'] / 1e6:.1f} MB"
    kernels = f"{result['kernels']} kernels"
    lines.append(f"{result['file']}: {kernels}{new}, {size}, {result['seconds']} s")
    return "\n".join(lines)
