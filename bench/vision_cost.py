"""How evenly the vision ops' Triton launches fill a GPU, by arithmetic: part of `bench cost`.

The ops' own launchers run on unfilled tensors of a CPU, and what they would launch is read: for
every program the multiply-adds of its tiles, padding included. Programs go to the SMs in order,
each to the one that is free first, one at a time; launches follow each other. `balance` is the
busiest SMs' work over the mean, `padding` all work over the useful, "scheduled" the busiest SMs'
time at the datasheet's rate. Launches without products (a rotation, a merge) are left out.
"""

import heapq
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from bench import show
from bench.cases import Case, cases, in_modes
from bench.cost import GPUS
from bench.numerics import form
from bench.ops import select
from bench.roofline import Roofline
from bench.tune import check_compiles
from kernels.compile.launches import Launch, launches_recorded
from kernels.compile.unfilled import unfilled
from kernels.gemm.stream_k import StreamK
from kernels.runtime.arithmetic import cdiv
from kernels.runtime.configs import Gpu, KernelConfig, record_configs

OPS = ("vision_attention", "projector", "linear_quick_gelu")
Work = Callable[
    [dict, KernelConfig, Gpu], np.ndarray
]  # multiply-adds of each program, in their order


def table(ops: Sequence[str], gpu_name: str, copy_gb_s: float | None, name: str) -> Iterator[dict]:
    """A row for every case of `ops` with `name` in its name, in each mode that has products.

    Raises InputError if there is no such case, or where Triton interprets.
    """
    check_compiles()
    gpu, datasheet, tflop_s, _ = GPUS[gpu_name]
    best = Roofline(gpu.name, "bfloat16", copy_gb_s or datasheet, tflop_s)
    for case in in_modes(select(cases("cuda"), ops, name)):
        works = work_of(case, gpu)
        if works:
            yield cost(case, works, gpu, best)


def work_of(case: Case, gpu: Gpu) -> list[np.ndarray]:
    """Of each launch with products, the multiply-adds of its programs in their order."""
    with unfilled():
        inputs = case.inputs(0, torch.device("cpu"), torch.bfloat16)
    with launches_recorded(gpu) as launches, record_configs() as asked:
        form(case.op, case.form)(inputs)()
    modelled = [launch for launch in launches if launch.kernel.fn.__name__ in WORK]
    tiles = [chosen for (part, _), chosen in asked.items() if part in PARTS]
    return [
        WORK[launch.kernel.fn.__name__](_named(launch), chosen, gpu)
        for launch, chosen in zip(modelled, tiles, strict=True)
    ]


def cost(case: Case, works: Sequence[np.ndarray], gpu: Gpu, best: Roofline) -> dict:
    """The row of one case and mode."""
    num_bytes, done = case.bytes(torch.bfloat16), sum(int(work.sum()) for work in works)
    busiest = sum(int(assigned(work, gpu.sms).max()) for work in works)
    return {
        "op": case.op,
        "case": case.name,
        "impl": case.form,
        "gpu": gpu.name,
        "programs": [len(work) for work in works],
        "balance": busiest * gpu.sms / done,
        "padding": 2 * done / case.flops,
        "scheduled_us": 2 * busiest * gpu.sms / best.gemm_tflop_s / 1e6,
        "floor_us": best.floor_us(num_bytes, case.flops),
        "bytes": num_bytes,
        "flops": case.flops,
        "copy_gb_s": best.copy_gb_s,
        "gemm_tflop_s": best.gemm_tflop_s,
        "failure": None,
    }


def assigned(work: np.ndarray, sms: int) -> np.ndarray:
    """Work of each SM when programs go, in order, to whichever is free first."""
    free = [(0, sm) for sm in range(sms)]
    total = np.zeros(sms, dtype=np.int64)
    for one in work.tolist():
        busy, sm = heapq.heappop(free)
        total[sm] = busy + one
        heapq.heappush(free, (busy + one, sm))
    return total


def display(rows: Sequence[dict]) -> None:
    """The rows as a table."""
    header = ("op", "case", "impl", " programs", " balance", " padding")
    header += (" scheduled us", " floor us")
    lines = [
        [
            *(row[name] for name in ("op", "case", "impl")),
            " + ".join(f"{count:,}" for count in row["programs"]),
            *(f"{row[name]:.3f}" for name in ("balance", "padding")),
            *(f"{row[name]:,.1f}" for name in ("scheduled_us", "floor_us")),
        ]
        for row in rows
    ]
    show.table(f"vision ops by arithmetic ({rows[0]['gpu']}, datasheet)", header, lines)


def _attention(given: dict, tiles: KernelConfig, gpu: Gpu) -> np.ndarray:
    first, start, end = given["tiles"].long().numpy().T
    tokens, block = end - start, given["BLOCK"]
    rows = np.where(end - first <= given["SHORT"], given["SHORT"], given["ROWS"])
    keys = tokens // block * block + np.where(tokens % block, given["TAIL"], 0)
    return np.repeat(2 * rows * keys * (given["FIRST"] + given["REST"]), given["HEADS"])


def _gemm(given: dict, tiles: KernelConfig, gpu: Gpu) -> np.ndarray:
    steps = given["TAPS"] * cdiv(given["C"], given["BLOCK_K"])
    programs = gpu.sms * tiles["programs"]
    names = ("band", "whole", "rest", "lanes", "share")
    cut = StreamK(steps, programs, **{name: given[name] for name in names})
    step = given["BLOCK_M"] * given["BLOCK_N"] * given["BLOCK_K"]
    return np.array([cut.work(program) * step for program in range(programs)])


PARTS = ("vision_attention", "gemm")  # what asks for the tiles of these launches
WORK: dict[str, Work] = {"vision_attention_kernel": _attention, "gemm_kernel": _gemm}


def _named(launch: Launch) -> dict:
    return dict(zip(launch.kernel.arg_names, launch.args, strict=False)) | launch.kwargs
