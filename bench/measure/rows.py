"""Rows of what was timed and judged."""

import math

import torch

from bench.measure.origin import origin
from bench.measure.roofline import roofline
from bench.measure.timing import Timing
from bench.measure.verdicts import Verdict
from kernels.runtime.dtypes import dtype_name


def measured(
    op: str,
    case: str,
    impl: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    num_bytes: int,
    flops: int,
    verdict: Verdict,
    timing: Timing | None = None,
) -> dict:
    """One row. Without a `timing`, its times, rates and ceilings are None.

    `with_speedups` fills in `speedup`; `failure` says what is wrong with the results, or why
    there are no times; else it is None.
    """
    best = roofline(device, dtype) if timing else None
    return {
        "op": op,
        "case": case,
        "impl": impl,
        "dtype": dtype_name(dtype),
        "p20_us": timing and timing.p20_us,
        "median_us": timing and timing.median_us,
        "p80_us": timing and timing.p80_us,
        "bytes": num_bytes,
        "flops": flops,
        "roofline_pct": best and best.percent(timing.median_us, num_bytes, flops),
        "max_err": _finite(verdict.max_err),
        "rms_err": _finite(verdict.rms_err),
        "speedup": None,
        "failure": verdict.failure,
        "timer": timing and timing.timer,
        "repeats": timing and timing.repeats,
        "copy_gb_s": best and best.copy_gb_s,
        "gemm_tflop_s": best and best.gemm_tflop_s,
        **origin(device),
    }


def ceiling(device: torch.device, dtype: torch.dtype) -> dict:
    """The row of a measured roofline."""
    best = roofline(device, dtype)
    return {
        "op": "roofline",
        "case": "copy, matrix product",
        "dtype": best.dtype,
        "copy_gb_s": best.copy_gb_s,
        "gemm_tflop_s": best.gemm_tflop_s,
        "failure": None,
        **origin(device),
    }


def with_speedups(rows: list[dict]) -> list[dict]:
    """The rows of one case, timed together, each with its speed-up over "eager"."""
    eager = next((row["median_us"] for row in rows if row["impl"] == "eager"), None)
    for row in rows:
        if eager and row["median_us"]:
            row["speedup"] = eager / row["median_us"]
    return rows


def _finite(value: float) -> float | None:
    """JSON has no NaN and no inf; `failure` reports them."""
    return value if math.isfinite(value) else None
