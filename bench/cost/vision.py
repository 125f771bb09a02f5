"""How evenly the vision ops' Triton launches fill a GPU, by arithmetic: part of `bench cost`.

The ops' own launchers run on unfilled CPU tensors, and their launches are recorded: for every
program, the multiply-adds of its tiles, padding included. Programs go to the SMs in order, each to
the first SM that is free, one at a time; launches follow each other. `balance` is the busiest SMs'
work over the mean, `padding` all work over the useful work, "scheduled" the busiest SMs' time at
the data sheet's rate. Launches without products (a rotation, a merge) are left out.
"""

import heapq
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from bench.cost.attention import GPUS
from bench.measure.roofline import Roofline
from bench.measure.tune import check_compiles
from bench.suite import cases, in_modes
from bench.suite.forms import form, select
from bench.suite.op import Case
from kernels.compile.launches import Launch, launches_recorded
from kernels.compile.unfilled import unfilled
from kernels.gemm.stream_k import StreamK
from kernels.runtime.arithmetic import cdiv
from kernels.runtime.configs import Gpu, KernelConfig, record_configs

OPS = ("vision_attention", "projector", "linear_quick_gelu")
# A launch's arguments, its config and the GPU -> multiply-adds of each program, in order.
Work = Callable[[dict, KernelConfig, Gpu], np.ndarray]


def table(ops: Sequence[str], gpu_name: str, copy_gb_s: float | None, name: str) -> Iterator[dict]:
    """A row for every case of `ops` with `name` in its name, in each mode that has products.

    Raises InputError if there is no such case, or if Triton interprets.
    """
    check_compiles()
    gpu, peak = GPUS[gpu_name]
    best = Roofline(gpu.name, "bfloat16", copy_gb_s or peak.memory_gb_s, peak.tflop_s)
    for case in in_modes(select(cases("cuda"), ops, name)):
        works = work_of(case, gpu)
        if works:
            yield cost(case, works, gpu, best)


def work_of(case: Case, gpu: Gpu) -> list[np.ndarray]:
    """For each launch with products, the multiply-adds of its programs in order."""
    with unfilled():
        inputs = case.inputs(0, torch.device("cpu"), torch.bfloat16)
    with launches_recorded(gpu) as launches, record_configs() as requested:
        form(case.op, case.form)(inputs)()
    modelled = [launch for launch in launches if launch.kernel.fn.__name__ in WORK]
    configs = [config for (part, _), config in requested.items() if part in PARTS]
    return [
        WORK[launch.kernel.fn.__name__](_arguments(launch), config, gpu)
        for launch, config in zip(modelled, configs, strict=True)
    ]


def cost(case: Case, works: Sequence[np.ndarray], gpu: Gpu, best: Roofline) -> dict:
    """The row of one case and mode."""
    num_bytes, total = case.bytes(torch.bfloat16), sum(int(work.sum()) for work in works)
    busiest = sum(int(assigned(work, gpu.sms).max()) for work in works)
    return {
        "op": case.op,
        "case": case.name,
        "impl": case.form,
        "gpu": gpu.name,
        "programs": [len(work) for work in works],
        "balance": busiest * gpu.sms / total,
        "padding": 2 * total / case.flops,
        "scheduled_us": 2 * busiest * gpu.sms / best.gemm_tflop_s / 1e6,
        "floor_us": best.floor_us(num_bytes, case.flops),
        "bytes": num_bytes,
        "flops": case.flops,
        "copy_gb_s": best.copy_gb_s,
        "gemm_tflop_s": best.gemm_tflop_s,
        "failure": None,
    }


def assigned(work: np.ndarray, sms: int) -> np.ndarray:
    """The work of each SM when programs go, in order, to the first SM that is free."""
    free = [(0, sm) for sm in range(sms)]
    total = np.zeros(sms, dtype=np.int64)
    for program_work in work.tolist():
        busy, sm = heapq.heappop(free)
        total[sm] = busy + program_work
        heapq.heappush(free, (busy + program_work, sm))
    return total


def _attention(args: dict, config: KernelConfig, gpu: Gpu) -> np.ndarray:
    first, start, end = args["tiles"].long().numpy().T
    tokens, block = end - start, args["BLOCK"]
    rows = np.where(end - first <= args["SHORT"], args["SHORT"], args["ROWS"])
    keys = tokens // block * block + np.where(tokens % block, args["TAIL"], 0)
    return np.repeat(2 * rows * keys * (args["FIRST"] + args["REST"]), args["HEADS"])


def _gemm(args: dict, config: KernelConfig, gpu: Gpu) -> np.ndarray:
    steps = args["TAPS"] * cdiv(args["C"], args["BLOCK_K"])
    programs = gpu.sms * config["programs"]
    names = ("band", "whole", "rest", "lanes", "share")
    division = StreamK(steps, programs, **{name: args[name] for name in names})
    step = args["BLOCK_M"] * args["BLOCK_N"] * args["BLOCK_K"]
    return np.array([division.work(program) * step for program in range(programs)])


PARTS = ("vision_attention", "gemm")  # whose configs these launches use
WORK: dict[str, Work] = {"vision_attention_kernel": _attention, "gemm_kernel": _gemm}


def _arguments(launch: Launch) -> dict:
    return dict(zip(launch.kernel.arg_names, launch.args, strict=False)) | launch.kwargs
