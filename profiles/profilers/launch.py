"""`python -m profiles launch --op OP`: one case of an op between cudaProfilerStart and Stop.

For profilers that watch a process: `profiles ncu` runs it, `profiles nsys --range profiler` can.
Inputs are created and the op is warmed up first, so compilation is not profiled.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch

from bench.measure.devices import MAIN_DTYPE, parse_device, parse_dtypes
from bench.suite import OPS, cases
from bench.suite.forms import FORMS, form, select
from kernels.runtime.dtypes import dtype_name
from model.terminal import integer

WARM_UP = 3
CALLS = integer(1, 100_000)  # type of options


def add_case_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Add the options that select an op, a case and a form."""
    parser.add_argument("--op", required=required, metavar="OP", help=f"one of: {', '.join(OPS)}")
    parser.add_argument(
        "--shape", default="", metavar="TEXT", help="the first case with TEXT in its name"
    )
    parser.add_argument(
        "--dtype", metavar="DTYPE", help="(default: float32 on a CPU, bfloat16 on a GPU)"
    )
    parser.add_argument(
        "--impl", metavar="FORM", help=f"one of: {', '.join(FORMS)} (default: the best)"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_case_arguments(parser)
    parser.add_argument(
        "--calls", type=CALLS, default=1, metavar="N", help="calls to profile (default: 1)"
    )
    parser.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")


def run(options: argparse.Namespace) -> int:
    device = parse_device(options.device)
    name, call = prepared(options, device)
    with torch.inference_mode():
        between_marks(call, options.calls, device)
    print(f"{options.calls} x {name}")
    return 0


def prepared(options: argparse.Namespace, device: torch.device) -> tuple[str, Callable[[], object]]:
    """A case's name, and a call that runs it on new inputs. Raises InputError as `select` does."""
    impls = [options.impl] if options.impl else []
    case = select(cases(device.type), [options.op], options.shape, impls)[0]
    dtypes = parse_dtypes([options.dtype] if options.dtype else [])
    dtype = dtypes[0] if dtypes else MAIN_DTYPE[device.type]
    inputs = case.inputs(0, device, dtype)
    call = (
        form(case.op, options.impl)(inputs) if options.impl else partial(OPS[case.op].run, **inputs)
    )
    text = dtype_name(dtype)
    return f"{case.op}, {case.name}, {options.impl or 'best form'}, {text}", call


def between_marks(call: Callable[[], object], calls: int, device: torch.device) -> None:
    """Warm up, then make `calls` calls between the marks that profilers look for."""
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
