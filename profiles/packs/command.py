"""Compile all kernels here, without a GPU, and carry them to a GPU node that runs the same Triton.

    python -m profiles kernels pack --out FILE
    python -m profiles kernels unpack FILE

What the pack holds is what the benchmarks and the engine launch.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

from bench.launch_sites import all_sites
from bench.tune import check_compiles
from kernels.runtime.configs import A100, H200
from model.errors import InputError
from profiles.packs.kernel_pack import pack, unpack

# Tables of tile choices are by name: those of an architecture may differ.
GPUS = {80: (A100,), 90: (H200, replace(H200, name="nvidia-h100-80gb-hbm3"))}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="act", required=True, metavar="pack|unpack")
    packing = commands.add_parser("pack", help="compile for GPUs of these architectures")
    packing.add_argument("--out", type=Path, required=True, metavar="FILE")
    packing.add_argument("--arch", nargs="+", type=int, choices=list(GPUS), default=list(GPUS))
    unpacking = commands.add_parser("unpack", help="put a pack's kernels into Triton's cache")
    unpacking.add_argument("file", type=Path, metavar="FILE")
    for command in (packing, unpacking):
        command.add_argument("--json", action="store_true", help="one JSON document")


def run(options: argparse.Namespace) -> int:
    """Pack or unpack; 1 if a kernel did not compile."""
    check_compiles()
    start = time.perf_counter()
    done = _pack(options) if options.act == "pack" else _unpack(options)
    done["seconds"] = round(time.perf_counter() - start, 1)
    print(json.dumps(done) if options.json else _told(done))
    return int(bool(done.get("failures")))


def _pack(options: argparse.Namespace) -> dict:
    if not options.out.parent.is_dir():
        raise InputError(f"--out {options.out}: there is no folder {options.out.parent}")
    gpus = [gpu for arch in options.arch for gpu in GPUS[arch]]
    done = pack(options.out, all_sites(), gpus)
    return {
        "file": str(options.out),
        "kernels": done.compiled,
        "bytes": options.out.stat().st_size,
        "failures": done.failures,
    }


def _unpack(options: argparse.Namespace) -> dict:
    kernels, new = unpack(options.file)
    size = options.file.stat().st_size
    return {"file": str(options.file), "kernels": kernels, "new": new, "bytes": size}


def _told(done: dict) -> str:
    lines = [f"FAILED: {failure}" for failure in done.get("failures", ())]
    new = f", {done['new']} of them new here" if "new" in done else ""
    size = f"{done['bytes'] / 1e6:.1f} MB"
    lines.append(f"{done['file']}: {done['kernels']} kernels{new}, {size}, {done['seconds']} s")
    return "\n".join(lines)
