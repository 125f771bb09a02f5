"""Errors of an op's forms, and how large they may be.

A form's results are compared with those of the eager definition evaluated in fp32 on the same
inputs. Errors are relative to max(rms(reference), |reference|): a large value does not hide the
error of a small one, and a small one need not have more correct digits than its neighbours.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bench.cases import OPS, STORING, Case
from bench.peers import PEERS, Prepare
from kernels.kv_pages import KVPages
from kernels.runtime.configs import KernelConfig, use_config


@dataclass(frozen=True)
class Error:
    """Largest and root-mean-square relative error."""

    max: float
    rms: float


# Tolerances for a 16-bit and a 32-bit result, in roundoffs of its dtype (2^-8 for bf16, 2^-11 for
# fp16, 2^-24 for fp32). Measured over a CPU's cases and a view of 52 x 52 tokens, with Triton's
# forms interpreted, plus a margin of about a half for 16 bits, where roundings dominate, and of two
# for 32 bits, where only sums differ.
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

# Additional tolerance in fp32, in roundoffs, for a GPU's approximate instructions, which the
# interpreter computes exactly. From their documented errors (tests/kernels/runtime/ptx_errors.py)
# over inputs as the cases draw them; results below the rms count for less.
APPROXIMATE: dict[str, Error] = {
    "qk_norm_rope": Error(4.2, 3),
    "rms_norm": Error(4.2, 3),
    "layer_norm": Error(4.4, 3.1),
    "silu_mul": Error(11.5, 3.4),
    "quick_gelu": Error(5.4, 3),
}

TUNED_PART = {"rotary_attention": "prefix_attention"}  # where most of an op's config values apply

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


def form(op: str, name: str) -> Prepare:
    """A form of `op`, an implementation or a peer, as a function from inputs to the call.

    "triton-invariant" is the Triton form in its batch-invariant mode, "triton-separate" two ops
    where the fastest form is one, "triton-fused" one where the rule may choose two. "triton tma=1"
    is the Triton form with that config value instead of the rule's; there may be several.
    """
    if name in PEERS.get(op, {}):
        return PEERS[op][name]
    name, _, config_text = name.partition(" ")
    impl, _, mode = name.partition("-")
    modes = {
        "invariant": {"batch_invariant": True},
        "separate": {"fused": False},
        "fused": {"fused": True},
    }

    def prepare(inputs: dict) -> Callable[[], object]:
        return partial(OPS[op], **inputs, impl=impl, **modes.get(mode, {}))

    return _with_config(prepare, op, config_text) if config_text else prepare


def _with_config(prepare: Prepare, op: str, config_text: str) -> Prepare:
    """The calls of `prepare` with config values such as "tma=1 grain=64", which override those of
    `op` and of the op that it is built on."""
    config = parse_config(config_text)

    def prepared(inputs: dict) -> Callable[[], object]:
        call = prepare(inputs)

        def run() -> object:
            with use_config(op, **config), use_config(TUNED_PART.get(op, op), **config):
                return call()

        return run

    return prepared


def parse_config(text: str) -> KernelConfig:
    """The config values in a form's name, such as "tma=1 grain=64"."""
    pairs = (pair.partition("=") for pair in text.split())
    return {name: int(value) for name, _, value in pairs}


def reference(case: Case, inputs: dict) -> list[Tensor]:
    """The results of the eager definition in fp32."""
    return results(case, form(case.op, "eager"), inputs, torch.float32)


def judge(case: Case, run: Prepare, inputs: dict, expected: list[Tensor]) -> Verdict:
    """Compare all results of `run` with the `reference`; leaves `inputs` unchanged."""
    pairs = list(zip(results(case, run, inputs), expected, strict=True))
    measured = [compare(*pair) for pair in pairs]
    failures = [
        excess(error, tolerance(case.op, result.dtype))
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


def tolerance(op: str, dtype: torch.dtype) -> Error:
    """The errors that a result of `op` in `dtype` may have; none for integers."""
    if not dtype.is_floating_point:
        return Error(0, 0)
    wide, unit = dtype.itemsize == 4, roundoff(dtype)
    limits = TOLERANCES[op][wide]
    more = APPROXIMATE.get(op, Error(0, 0)) if wide else Error(0, 0)
    return Error((limits.max + more.max) * unit, (limits.rms + more.rms) * unit)


def roundoff(dtype: torch.dtype) -> float:
    """The largest relative error of rounding to a float `dtype`."""
    return torch.finfo(dtype).eps / 2


def excess(error: Error, allowed: Error) -> str | None:
    """By how much `error` exceeds `allowed`, as text, or None."""
    for name in ("max", "rms"):
        value, limit = getattr(error, name), getattr(allowed, name)
        if not value <= limit:
            return f"{name} error {value:.2e} exceeds {limit:.2e}"
    return None


def compare(result: Tensor, expected: Tensor) -> Error:
    """The error of one result; raises ValueError as `errors` does."""
    return summary(errors(result, expected))


def errors(result: Tensor, expected: Tensor) -> Tensor:
    """The error of each element, fp64 in the result's shape; an integer's is 0 if right, else 1.

    NaN where both are NaN or both the same infinity, inf where only one of them is. Raises
    ValueError for a wrong shape, and for integers where floats are expected or vice versa.
    """
    if result.shape != expected.shape:
        raise ValueError(f"result of shape {list(result.shape)}, expected {list(expected.shape)}")
    if result.is_floating_point() != expected.is_floating_point():
        raise ValueError(f"result is {result.dtype}, expected {expected.dtype}")
    if not expected.is_floating_point():
        return (result != expected).double()
    result, expected = result.double(), expected.double()
    finite = expected.isfinite()
    squares = expected.square().where(finite, 0)
    rms = (squares.sum() / finite.sum()).sqrt()
    scale = expected.abs().clamp_min(rms).clamp_min(torch.finfo(torch.float64).tiny)
    relative = ((result - expected).abs() / scale).where(finite, torch.nan)
    misplaced = [special(result) != special(expected) for special in _SPECIAL]
    return relative.masked_fill(torch.stack(misplaced).any(0), torch.inf)


def summary(errors: Tensor) -> Error:
    """Largest and root-mean-square of `errors`, ignoring NaN."""
    errors = errors[~errors.isnan()]
    if not errors.numel():
        return Error(0.0, 0.0)
    return Error(float(errors.max()), float(errors.square().mean().sqrt()))


_SPECIAL: tuple[Callable[[Tensor], Tensor], ...] = (torch.isnan, torch.isposinf, torch.isneginf)


def results(
    case: Case, run: Prepare, inputs: dict, dtype: torch.dtype | None = None
) -> list[Tensor]:
    """The return values of a call and what it wrote into copies of its inputs, with floats as
    `dtype`."""
    copies = copied(inputs, dtype)
    with torch.inference_mode(), exact_fp32(), _nan_filled_allocations():
        returned = run(copies)()
    outputs = list(returned) if isinstance(returned, tuple) else [returned]
    return outputs + list(copies["pages"][:2] if case.op in STORING else ())


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
