"""Rows of what was timed and judged."""

import math
from collections.abc import Mapping
from dataclasses import asdict, replace

import torch

from bench.measure.origin import origin
from bench.measure.peaks import peak_of
from bench.measure.roofline import roofline
from bench.measure.timing import Timing
from bench.measure.verdicts import Verdict
from bench.rows.schema import Measured
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
    shape: Mapping[str, object] | None = None,
) -> dict:
    """One row. Without a `timing`, its times, rates and ceilings are None.

    `with_speedups` fills in `speedup`.
    """
    if timing and timing.slowed:
        verdict, timing = replace(verdict, failure=verdict.failure or timing.slowed), None
    row = Measured(
        op=op,
        case=case,
        impl=impl,
        dtype=dtype_name(dtype),
        shape=shape,
        bytes=num_bytes,
        flops=flops,
        max_err=_finite(verdict.max_err),
        rms_err=_finite(verdict.rms_err),
        failure=verdict.failure,
        **(_times(timing, device, dtype, num_bytes, flops) if timing else {}),
    )
    return row.row(origin(device))


def _times(
    timing: Timing, device: torch.device, dtype: torch.dtype, num_bytes: int, flops: int
) -> dict:
    """The fields of Measured that come from a time."""
    best, peak = roofline(device, dtype), peak_of(device)
    fields = asdict(timing)
    del fields["slowed"]
    fields |= {
        "roofline_pct": best.percent(timing.median_us, num_bytes, flops),
        "copy_gb_s": best.copy_gb_s,
        "gemm_tflop_s": best.gemm_tflop_s,
    }
    if peak:
        mfu, mbu = peak.utilisation(timing.median_us, num_bytes, flops, dtype)
        fields |= {"mfu": mfu, "mbu": mbu, "peak_fraction": max(mfu, mbu)}
    return fields


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
