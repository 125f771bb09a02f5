"""How wrong the forms of an op are, and how wrong they may be.

A form's results are compared with those of the eager definition evaluated in fp32 on the same
inputs. Errors are relative to max(rms(reference), |reference|), so that neither a large value hides
a small one nor a small one is asked for more digits than its neighbours have.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bench.cases import OPS, WRITTEN, Case
from bench.peers import PEERS, Peer


@dataclass(frozen=True)
class Error:
    """Largest and root-mean-square relative error."""

    max: float
    rms: float


# Allowed, in roundoffs of the result's dtype (2^-8 for bf16, 2^-11 for fp16, 2^-24 for fp32): for a
# result of 16 bits, and for one of 32. Measured over the cases of a CPU and a view of 52 x 52
# tokens, Triton's forms in its interpreter, plus a margin of about a half for 16 bits, where
# roundings dominate, and of two for 32, where only sums differ.
TOLERANCES: dict[str, tuple[Error, Error]] = {
    "prefix_attention": (Error(6, 0.75), Error(320, 32)),
    "rotary_attention": (Error(8, 1.2), Error(220, 30)),
    "qk_norm_rope": (Error(7, 0.85), Error(16, 2)),
    "rms_norm": (Error(4, 0.8), Error(8, 3)),
    "silu_mul": (Error(3, 0.5), Error(8, 1)),
    "sample": (Error(0, 0), Error(33, 29)),
    "vision_attention": (Error(8, 1.1), Error(220, 24)),
    "layer_norm": (Error(3, 0.65), Error(16, 2.5)),
    "quick_gelu": (Error(1.5, 0.35), Error(8, 1)),
    "linear_quick_gelu": (Error(3, 0.9), Error(100, 13)),
    "projector": (Error(5, 1), Error(200, 42)),
}

# Of a whole model's results in fp32: far above rounding, far below a fault. Whole models are not
# judged in 16 bits, where rounding adds up over the layers; their ops are, one by one.
MODEL_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Verdict:
    """The worst errors over an op's results; what is wrong with them, or why there are none."""

    max_err: float
    rms_err: float
    failure: str | None
    skipped: str | None = None


def form(op: str, name: str) -> Peer:
    """An implementation of `op`, or a peer, as a function from inputs to the call.

    "triton-invariant" is the Triton form in its batch-invariant mode, "triton-separate" two ops
    where the fastest form is one, "triton-fused" one where the rule may choose two.
    """
    if name in PEERS:
        return PEERS[name]
    impl, _, mode = name.partition("-")
    modes = {
        "invariant": {"batch_invariant": True},
        "separate": {"fused": False},
        "fused": {"fused": True},
    }
    return lambda inputs: partial(OPS[op], **inputs, impl=impl, **modes.get(mode, {}))


def reference(case: Case, inputs: dict) -> list[Tensor]:
    """Results of the eager definition in fp32."""
    return _results(case, form(case.op, "eager"), inputs, torch.float32)


def judge(case: Case, run: Peer, inputs: dict, expected: list[Tensor]) -> Verdict:
    """Compare all results of `run` with the `reference`; `inputs` stay as they are."""
    results = _results(case, run, inputs)
    errors = [compare(*pair) for pair in zip(results, expected, strict=True)]
    excess = [_excess(case.op, *pair) for pair in zip(results, errors, strict=True)]
    return Verdict(
        max(error.max for error in errors),
        max(error.rms for error in errors),
        next((text for text in excess if text), None),
    )


def judged(error: Error, dtype: torch.dtype) -> Verdict:
    """A whole model's error, judged in fp32."""
    failure = None
    if dtype == torch.float32 and not error.max <= MODEL_TOLERANCE:
        failure = f"max error {error.max:.2e} exceeds {MODEL_TOLERANCE:.0e}"
    return Verdict(error.max, error.rms, failure)


def _excess(op: str, result: Tensor, error: Error) -> str | None:
    """What of `error` is more than `op` is allowed."""
    limits, roundoff = Error(0, 0), 0.0
    if result.is_floating_point():
        limits = TOLERANCES[op][result.dtype.itemsize == 4]
        roundoff = torch.finfo(result.dtype).eps / 2
    for name in ("max", "rms"):
        value, limit = getattr(error, name), getattr(limits, name) * roundoff
        if not value <= limit:
            return f"{name} error {value:.2e} exceeds {limit:.2e}"
    return None


def compare(result: Tensor, expected: Tensor) -> Error:
    """The error of one result. Infinite if NaN or inf stand elsewhere; integers are right or wrong.

    Raises ValueError for a wrong shape, and for integers where floats are expected or vice versa.
    """
    if result.shape != expected.shape:
        raise ValueError(f"result of shape {list(result.shape)}, expected {list(expected.shape)}")
    if result.is_floating_point() != expected.is_floating_point():
        raise ValueError(f"result is {result.dtype}, expected {expected.dtype}")
    if not expected.is_floating_point():
        return _summary((result != expected).double())
    result, expected = result.double(), expected.double()
    if any(not torch.equal(special(result), special(expected)) for special in _SPECIAL):
        return Error(math.inf, math.inf)
    finite = expected.isfinite()
    result, expected = result[finite], expected[finite]
    scale = expected.abs().clamp_min(expected.square().mean().sqrt())
    return _summary((result - expected).abs() / scale.clamp_min(torch.finfo(torch.float64).tiny))


_SPECIAL: tuple[Callable[[Tensor], Tensor], ...] = (torch.isnan, torch.isposinf, torch.isneginf)


def _summary(errors: Tensor) -> Error:
    if not errors.numel():
        return Error(0.0, 0.0)
    return Error(float(errors.max()), float(errors.square().mean().sqrt()))


def _results(case: Case, run: Peer, inputs: dict, dtype: torch.dtype | None = None) -> list[Tensor]:
    """What a call returns and what it wrote into copies of its inputs, floats as `dtype`."""
    copies = {name: _copy(value, dtype) for name, value in inputs.items()}
    with torch.inference_mode(), _exact_fp32(), _poisoned_allocations():
        returned = run(copies)()
    results = list(returned) if isinstance(returned, tuple) else [returned]
    return results + [copies[name] for name in WRITTEN.get(case.op, ())]


def _copy(value: object, dtype: torch.dtype | None) -> object:
    if isinstance(value, tuple):  # of tensors, as folded weights are, or of numbers
        return tuple(_copy(part, dtype) for part in value)
    if not isinstance(value, Tensor):
        return value
    # FP8 pages stay what they are: their values are exact in every wider type.
    wide = value.is_floating_point() and value.dtype.itemsize > 1
    return value.to(dtype if wide else None, copy=True)


@contextmanager
def _exact_fp32() -> Iterator[None]:
    """fp32 products in fp32: cuDNN would round the operands of convolutions to TF32."""
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
def _poisoned_allocations() -> Iterator[None]:
    """torch.empty filled with NaN, so that an output left unwritten shows."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn)
