"""The simulator's GPUs: rates from measured rows, or else from stated assumptions.

Assumptions for every GPU without measured rows: copies reach 0.90 of the data sheet's bandwidth and
matrix products 0.70 of its dense rate; a step reaches 0.90 of that bandwidth, 0.85 of that rate in
its linear layers and 0.60 of it in attention; launches, norms, sampling and the host take 0.4 ms
per step; KV may use 0.90 of the memory, less the weights and 6 GB of workspace.

Assumptions for images, which no measured rows replace: a host decodes, resizes and cuts 8 at a
time, each on one core at 36 ns per pixel (33 ms for 1280 x 720); pixels reach the device at
25 GB/s; the tower reaches a step's shares of the rates, and it and steps take turns on the GPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from model.errors import InputError
from model.text.rows import read_rows

RESULTS = Path(__file__).resolve().parents[2] / "profiles" / "results"
COPY_SHARE = 0.90  # of the data sheet's bandwidth
GEMM_SHARE = 0.70  # of the data sheet's dense bf16 rate
MODEL = "step3-vl-10b"  # a step's efficiency comes from this model's decode rows
BEST_FORM = "default"  # `impl` of the decode rows that match what the engine runs


@dataclass(frozen=True)
class Machine:
    """One GPU. `measured` says whether its rates come from measured rows."""

    name: str
    copy_gb_s: float  # 1e9 bytes/s, read plus written by a copy
    gemm_tflop_s: float  # 1e12 FLOP/s, bf16, dense
    memory_bytes: float
    bandwidth_efficiency: float = 0.90  # a step's share of copy_gb_s
    linear_efficiency: float = 0.85  # share of gemm_tflop_s
    attention_efficiency: float = 0.60
    overhead_s: float = 0.4e-3  # per step
    memory_share: float = 0.90
    workspace_bytes: float = 6e9
    host_workers: int = 8  # images that are read at the same time
    host_pixel_s: float = 36e-9  # seconds of one core per pixel of an image's file
    link_gb_s: float = 25.0  # 1e9 bytes/s from the host to the device
    overlap: float = 0.0  # of the shorter of a step and encoding beside it: the share that is free
    measured: bool = False

    @property
    def bytes_per_s(self) -> float:
        return self.copy_gb_s * 1e9 * self.bandwidth_efficiency

    @property
    def linear_flops_per_s(self) -> float:
        return self.gemm_tflop_s * 1e12 * self.linear_efficiency

    @property
    def attention_flops_per_s(self) -> float:
        return self.gemm_tflop_s * 1e12 * self.attention_efficiency


def _from_data_sheet(name: str, gb_s: float, tflop_s: float, memory_gb: float) -> Machine:
    return Machine(name, COPY_SHARE * gb_s, GEMM_SHARE * tflop_s, memory_gb * 1e9)


MACHINES = {
    machine.name: machine
    for machine in (
        _from_data_sheet("h200", 4800, 989, 141),
        _from_data_sheet("b200", 8000, 2250, 180),  # HGX
        _from_data_sheet("h100", 3350, 989, 80),  # SXM
        _from_data_sheet("a100", 2039, 312, 80),  # SXM, 80 GB
    )
}


def find_machine(name: str, results: Path = RESULTS) -> Machine:
    """The GPU called `name`, with rates from rows in folders of `results` named after it.

    Raises InputError for an unknown name, listing the known ones, and for a file without rows.
    """
    if name not in MACHINES:
        raise InputError(f"unknown GPU {name!r}; choose one of {', '.join(MACHINES)}")
    rows = [
        row
        for folder in sorted(results.glob("*"))
        if folder.is_dir() and name in folder.name.lower()
        for path in sorted(folder.glob("*.jsonl"))
        for row in read_rows(path)
        if not row.get("failure") and row.get("dtype") == "bfloat16"
    ]
    return _measured(MACHINES[name], rows)


def _measured(machine: Machine, rows: Sequence[dict]) -> Machine:
    """The machine with the latest measured ceilings, and the median efficiency of measured decode
    steps, which includes the overhead per step."""
    ceilings = [row for row in rows if row["op"] == "roofline"]
    if ceilings:
        latest = ceilings[-1]
        rates = {name: latest[name] for name in ("copy_gb_s", "gemm_tflop_s")}
        machine = replace(machine, **rates, measured=True)
    shares = [
        row["roofline_pct"] / 100
        for row in rows
        if row["op"] == "decode_step"
        and row["impl"] == BEST_FORM
        and row["case"].startswith(MODEL)
        and row["roofline_pct"]
    ]
    if shares:
        share = min(1.0, median(shares))
        machine = replace(machine, bandwidth_efficiency=share, overhead_s=0.0, measured=True)
    return machine
