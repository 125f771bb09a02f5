"""What the benchmarks know of one op, and of a case: the op at one shape."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench.errors import Error, roundoff
from bench.formats.traffic import Point
from bench.peers.peer import Peer
from model.config import Config

NONE = Error(0, 0)

# Sizes and settings by name, of various types: keyword arguments of an op's `inputs`.
Shape = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One op at one shape.

    At least `values` elements of the case's dtype and `fixed_bytes` of other types (FP8 pages and
    their scales) must cross the memory bus. `shape` has the sizes by name, for reports; JSON can
    hold it.
    """

    op: str
    name: str
    inputs: Callable[[int, torch.device, torch.dtype], dict]  # (seed, device, dtype) -> kwargs
    values: int
    flops: int
    fixed_bytes: int = 0
    shape: Mapping[str, object] = field(default_factory=dict, hash=False)
    peers: tuple[str, ...] = ()  # names of the op's peers that are timed by default
    modes: tuple[str, ...] = ()  # the Triton form's modes besides the fastest
    form: str = "triton"  # the Triton form's mode, set by `in_modes`

    def bytes(self, dtype: torch.dtype) -> int:
        return self.values * dtype.itemsize + self.fixed_bytes


@dataclass(frozen=True)
class Op:
    """All that the benchmarks know of an op. Ops with a lower `rank` come first in tables.

    Tolerances are in roundoffs of the result's dtype (2^-8 for bf16, 2^-11 for fp16, 2^-24 for
    fp32), against the eager definition in fp32.
    """

    name: str
    rank: int
    run: Callable[..., object]  # the public op; its `impl` selects a form
    varies: str  # the input that changes from call to call in a model, unlike weights
    cases: Callable[[str], Iterable[Case]]  # what is timed on a "cuda" or "cpu" device
    checks: Callable[[], Iterable[Case]]  # small and irregular, for checks in every dtype
    formula: Callable[..., tuple[Tensor, ...]]  # in fp64: arguments -> results, then stored pages
    tolerance_16: Error
    tolerance_32: Error
    # Added in fp32 for a GPU's approximate instructions, which the interpreter computes exactly.
    # From their documented errors (tests/kernels/runtime/ptx_errors.py) over inputs as the cases
    # draw them; results below the rms count for less.
    approximate: Error = NONE
    results: tuple[str, ...] = ("out",)
    fp32_results: tuple[str, ...] = ()  # those that are fp32 in every dtype
    stores: bool = False  # writes K and V into `pages`
    writes: tuple[str, ...] = ()  # inputs that it may change
    peers: Sequence[Peer] = ()
    grid: Callable[[str], Iterable[Case]] = lambda device_type: ()  # more cases, on request
    compiled: Callable[[], Iterable[Case]] = lambda: ()  # more cases, only compiled ahead
    of_traffic: Callable[[Point, Config], Iterable[Case]] = lambda point, model: ()
    tuned_part: str = ""  # the op that most of its config values belong to, if not itself

    def dtype_of(self, result: str, dtype: torch.dtype) -> torch.dtype:
        """The dtype of a result, if it is a float, in a case of this dtype."""
        return torch.float32 if result in self.fp32_results else dtype

    def tolerance(self, dtype: torch.dtype) -> Error:
        """The errors that a result in `dtype` may have; none for integers."""
        if not dtype.is_floating_point:
            return NONE
        wide, unit = dtype.itemsize == 4, roundoff(dtype)
        limits = self.tolerance_32 if wide else self.tolerance_16
        more = self.approximate if wide else NONE
        return Error((limits.max + more.max) * unit, (limits.rms + more.rms) * unit)
