"""The measured roofline of this machine: copy bandwidth and matrix rate.

The floor of an op is the larger of its bytes over the bandwidth and its operations over the rate;
the roofline percentage is that floor over the measured time. A ceiling is what the machine does
when nothing disturbs it, so both rates come from the 20th percentile of their times.
"""

import warnings
from dataclasses import dataclass
from functools import cache

import torch

from bench.measure.timing import Candidate, Timing, cache_bytes, measure
from kernels import onednn
from kernels.runtime.dtypes import dtype_name

GEMM_SIZE = {"cpu": 1024, "cuda": 8192}  # rows and columns of the matrices
COPY_CACHES = {"cpu": 4, "cuda": 16}  # size of the copied buffer in last-level caches


@dataclass(frozen=True)
class Roofline:
    """Measured ceilings of one device for one dtype."""

    device: str
    dtype: str
    copy_gb_s: float  # bytes read plus bytes written, 1e9 per second
    gemm_tflop_s: float  # 1e12 per second

    def floor_us(self, num_bytes: int, flops: int) -> float:
        """The minimum microseconds in which the device moves `num_bytes` and does `flops`."""
        return max(num_bytes / (self.copy_gb_s * 1e3), flops / (self.gemm_tflop_s * 1e6))

    def percent(self, microseconds: float, num_bytes: int, flops: int) -> float:
        """The floor as a percentage of a measured time."""
        return 100 * self.floor_us(num_bytes, flops) / microseconds


@cache
def roofline(device: torch.device, dtype: torch.dtype) -> Roofline:
    """Measure `device` once per process and dtype."""
    return Roofline(str(device), dtype_name(dtype), _copy_gb_s(device), _gemm(device, dtype))


@cache
def _copy_gb_s(device: torch.device) -> float:
    source = torch.randn(COPY_CACHES[device.type] * cache_bytes(device) // 4, device=device)
    target = torch.empty_like(source)
    timing = _measure({"copy": lambda _: target.copy_(source)}, device)["copy"]
    return 2 * source.nbytes / timing.p20_us / 1e3


def _measure(candidates: dict[str, Candidate], device: torch.device) -> dict[str, Timing]:
    """Times of `candidates`, once again if a GPU slowed down; warns if it did so twice."""
    for _ in range(2):
        timings = measure(candidates, device=device, budget_s=0.5)
        slowed = next((timing.slowed for timing in timings.values() if timing.slowed), None)
        if not slowed:
            return timings
    warnings.warn(f"the measured roofline is too low: {slowed}", stacklevel=2)
    return timings


def _gemm(device: torch.device, dtype: torch.dtype) -> float:
    size = GEMM_SIZE[device.type]
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    products: dict[str, Candidate] = {"plain": lambda _: torch.mm(a, b, out=out)}
    if device.type == "cpu" and onednn.packing_pays(
        dtype
    ):  # another library, perhaps twice as fast
        packed = onednn.pack(b)
        products["packed"] = lambda _: onednn.product(a, packed)
    timings = _measure(products, device)
    return 2 * size**3 / min(timing.p20_us for timing in timings.values()) / 1e6
