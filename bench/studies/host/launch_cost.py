"""The cost of one launch inside a CUDA graph, from a chain of launches with almost no work."""

from dataclasses import replace

import torch

from bench.measure.rows import measured
from bench.measure.timing import measure
from bench.measure.verdicts import NOT_RUN
from kernels.norm import rms_norm

LAUNCHES, WIDTH = 100, 4096
CASE = f"{LAUNCHES} x rms_norm T1 C{WIDTH}"


def time_launches(device: torch.device, dtype: torch.dtype, impl: str, budget_s: float) -> dict:
    """A row with the microseconds per launch; on a CPU, which has no graphs, per call."""
    x = torch.randn(1, WIDTH, device=device, dtype=dtype)
    weight = torch.randn(WIDTH, device=device, dtype=dtype)

    def chain(_: int) -> torch.Tensor:
        y = x
        for _ in range(LAUNCHES):
            y = rms_norm(y, weight, eps=1e-6, impl=impl)
        return y

    timing = measure({impl: chain}, device=device, budget_s=budget_s)[impl]
    times = (timing.p20_us, timing.median_us, timing.p80_us)
    p20, median, p80 = (us / LAUNCHES for us in times)
    return measured(
        "launch",
        CASE,
        impl,
        device=device,
        dtype=dtype,
        num_bytes=dtype.itemsize * 3 * WIDTH,
        flops=5 * WIDTH,
        verdict=NOT_RUN,  # errors are in the op table
        timing=replace(timing, p20_us=p20, median_us=median, p80_us=p80),
    )
