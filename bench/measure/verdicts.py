"""Verdicts on the forms of an op: their results against the eager definition's in fp32."""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.errors import Error, compare, excess
from bench.peers.peer import Prepare
from bench.suite import OPS
from bench.suite.forms import form
from bench.suite.op import Case
from kernels.kv_pages import KVPages

# Maximum error of a whole model's results in fp32: far above rounding, far below a fault. Whole
# models are not judged in 16 bits, where rounding accumulates over layers; each of their ops is.
MODEL_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Verdict:
    """The largest errors over an op's results; what is wrong with them, or why there are none.

    trace: the end of the traceback, if the form raised
    """

    max_err: float
    rms_err: float
    failure: str | None
    skipped: str | None = None
    trace: str | None = None


NOT_RUN = Verdict(math.nan, math.nan, None)


def reference(case: Case, inputs: dict) -> list[Tensor]:
    """The results of the eager definition in fp32."""
    return results(case, form(case.op, "eager"), inputs, torch.float32)


def judge(case: Case, run: Prepare, inputs: dict, expected: list[Tensor]) -> Verdict:
    """Compare all results of `run` with the `reference`; leaves `inputs` unchanged."""
    pairs = list(zip(results(case, run, inputs), expected, strict=True))
    measured = [compare(*pair) for pair in pairs]
    failures = [
        excess(error, OPS[case.op].tolerance(result.dtype))
        for error, (result, _) in zip(measured, pairs, strict=True)
    ]
    return Verdict(
        max(error.max for error in measured),
        max(error.rms for error in measured),
        next((text for text in failures if text), None),
    )


def judged(error: Error, dtype: torch.dtype) -> Verdict:
    """The verdict on a whole model's error, which counts in fp32 only."""
    failure = None
    if dtype == torch.float32 and not error.max <= MODEL_TOLERANCE:
        failure = f"max error {error.max:.2e} exceeds {MODEL_TOLERANCE:.0e}"
    return Verdict(error.max, error.rms, failure)


def results(
    case: Case, run: Prepare, inputs: dict, dtype: torch.dtype | None = None
) -> list[Tensor]:
    """The return values of a call and what it wrote into copies of its inputs, with floats as
    `dtype`."""
    copies = copied(inputs, dtype)
    with torch.inference_mode(), exact_fp32(), _nan_filled_allocations():
        returned = run(copies)()
    outputs = list(returned) if isinstance(returned, tuple) else [returned]
    return outputs + list(copies["pages"][:2] if OPS[case.op].stores else ())


def copied(inputs: dict, dtype: torch.dtype | None = None) -> dict:
    """An op's arguments with copies of its tensors, with floats as `dtype`."""
    return {name: _copy(value, dtype) for name, value in inputs.items()}


def _copy(value: object, dtype: torch.dtype | None) -> object:
    def copy(x: Tensor) -> Tensor:
        # FP8 pages stay FP8: their values are exact in every wider type.
        wide = x.is_floating_point() and x.dtype.itemsize > 1
        return x.to(dtype if wide else None, copy=True)

    if isinstance(value, Tensor):
        return copy(value)
    if isinstance(value, KVPages):
        return value.map(copy)
    if isinstance(value, tuple):  # of tensors, such as folded weights, or of numbers
        return tuple(_copy(part, dtype) for part in value)
    return value


@contextmanager
def exact_fp32() -> Iterator[None]:
    """Compute fp32 products in fp32: cuDNN would round the operands of convolutions to TF32."""
    settings = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [setting.fp32_precision for setting in settings]
    for setting in settings:
        setting.fp32_precision = "ieee"
    try:
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value


@contextmanager
def _nan_filled_allocations() -> Iterator[None]:
    """Fill torch.empty with NaN, so that an output left unwritten shows."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn)
