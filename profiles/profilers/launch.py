"""`python -m profiles launch --op OP`: a case of an op between cudaProfilerStart and Stop.

For profilers that watch a process: `profiles ncu` runs it, `profiles nsys --range profiler` can.
Inputs are made and the op is called before, so that compilation is not in the picture.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch

from bench.cases import OPS, cases
from bench.numerics import form
from bench.ops import FORMS, MAIN_DTYPE, parse_device, parse_dtypes, select
from kernels.runtime.dtypes import dtype_name

WARM_UP = 3


def add_case_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Which case of which op, and in which form."""
    parser.add_argument("--op", required=required, metavar="OP", help=f"of {', '.join(OPS)}")
    parser.add_argument("--shape", default="", metavar="TEXT", help="first case with TEXT in it")
    parser.add_argument("--dtype", metavar="DTYPE", help="(default: bf16 on a GPU, fp32 on a CPU)")
    parser.add_argument("--impl", metavar="FORM", help=f"of {', '.join(FORMS)} (default: the best)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_case_arguments(parser)
    parser.add_argument("--calls", type=int, default=1, metavar="N", help="(default: 1)")
    parser.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")


def run(options: argparse.Namespace) -> int:
    device = parse_device(options.device)
    name, call = prepared(options, device)
    with torch.inference_mode():
        between_marks(call, options.calls, device)
    print(f"{options.calls} x {name}")
    return 0


def prepared(options: argparse.Namespace, device: torch.device) -> tuple[str, Callable[[], object]]:
    """A case's name, and what runs it on inputs of its own. Raises InputError as `select` does."""
    impls = [options.impl] if options.impl else []
    case = select(cases(device.type), [options.op], options.shape, impls)[0]
    given = parse_dtypes([options.dtype] if options.dtype else [])
    dtype = given[0] if given else MAIN_DTYPE[device.type]
    inputs = case.inputs(0, device, dtype)
    call = form(case.op, options.impl)(inputs) if options.impl else partial(OPS[case.op], **inputs)
    shown = dtype_name(dtype)
    return f"{case.op}, {case.name}, {options.impl or 'best form'}, {shown}", call


def between_marks(call: Callable[[], object], calls: int, device: torch.device) -> None:
    """Call it until it is warm, then `calls` times between the marks that profilers look for."""
    for _ in range(WARM_UP):
        call()
    if device.type != "cuda":
        for _ in range(calls):
            call()
        return
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStart()
    for _ in range(calls):
        call()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStop()
