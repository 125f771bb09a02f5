"""Verdicts on the forms of an op: their results against the eager definition's in fp32."""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bench.errors import Error, compare, excess
from bench.peers.peer import Prepare
from bench.suite import OPS
from bench.suite.forms import form
from bench.suite.op import Case, Op
from kernels.kv_pages import KVPages

# Maximum error of a whole model's results in fp32: far above rounding, far below a fault. Whole
# models are not judged in 16 bits, where rounding accumulates over layers; each of their ops is.
MODEL_TOLERANCE = 1e-3
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes
NOT_WRITTEN = "are NaN: not written, or computed so"


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
    """Compare all results of `run` with the `reference`; leaves `inputs` unchanged.

    Results that share memory with inputs, and changed inputs, are failures, too.
    """
    copies = copied(inputs)
    outputs = results_of(case, run, copies)
    verdict = verdict_on(case, outputs, expected, inputs[OPS[case.op].varies].dtype)
    misuse = _misused(case, inputs, copies, outputs)
    return replace(verdict, failure=misuse) if misuse and not verdict.failure else verdict


def verdict_on(
    case: Case, outputs: list[Tensor], expected: list[Tensor], dtype: torch.dtype
) -> Verdict:
    """The verdict on all results of a call, in the order of `results`; `dtype` is the case's."""
    pairs = list(zip(outputs, expected, strict=True))
    for name, (result, right) in zip(OPS[case.op].results, pairs, strict=False):
        _check_kind(name, result, right, OPS[case.op].dtype_of(name, dtype))
    errors = [compare(*pair) for pair in pairs]
    failures = [
        (_not_written(*pair) or text)
        for error, pair in zip(errors, pairs, strict=True)
        if (text := excess(error, OPS[case.op].tolerance(pair[0].dtype)))
    ]
    return Verdict(
        max(error.max for error in errors),
        max(error.rms for error in errors),
        next(iter(failures), None),
    )


def _check_kind(name: str, result: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Raise ValueError for a result that may compute its values later, elsewhere, or in a dtype of
    fewer bytes."""
    if type(result) not in (Tensor, torch.nn.Parameter):
        raise ValueError(f"{name} is a {type(result).__name__}, not a plain tensor")
    if result.device != expected.device:
        raise ValueError(f"{name} is on {result.device}, expected {expected.device}")
    if expected.is_floating_point() and result.dtype != dtype:
        raise ValueError(f"{name} is {result.dtype}, expected {dtype}")


def _not_written(result: Tensor, expected: Tensor) -> str | None:
    """How many elements are NaN that should not be; None if none is."""
    missing = int((result.isnan() & ~expected.isnan()).sum())
    return f"{missing:,} of {result.numel():,} elements {NOT_WRITTEN}" if missing else None


def _misused(case: Case, inputs: dict, copies: dict, outputs: list[Tensor]) -> str | None:
    """What a call did to inputs that its op must not write to; `copies` are those it got."""
    op = OPS[case.op]
    returned = outputs[: len(outputs) - 2 * op.stores]
    if name := shared_input(op, copies, returned):
        return f"a result shares memory with the input {name!r}"
    if name := changed_input(op, inputs, copies):
        return f"it changes its input {name!r}"
    return None


def changed_input(op: Op, before: dict, now: dict) -> str | None:
    """The name of an input that the op only reads and that has changed; None if none has."""
    for name in _read_only(op, now):
        if not all(map(_unchanged, tensors(before[name]), tensors(now[name]))):
            return name
    return None


def shared_input(op: Op, inputs: dict, outputs: list[Tensor]) -> str | None:
    """The name of an input that the op only reads and whose memory an output uses; None if none."""
    for name in _read_only(op, inputs):
        if addresses(outputs) & addresses(tensors(inputs[name])):
            return name
    return None


def addresses(tensors: list[Tensor]) -> set[int]:
    """Where the memory of tensors starts, without empty ones."""
    return {x.untyped_storage().data_ptr() for x in tensors if x.numel()}


def _read_only(op: Op, inputs: dict) -> list[str]:
    return [name for name in inputs if name not in (*op.writes, *("pages",) * op.stores)]


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
    return results_of(case, run, copied(inputs, dtype))


def results_of(case: Case, run: Prepare, copies: dict) -> list[Tensor]:
    """The return values of a call on `copies`, and the pages that it wrote to."""
    with torch.inference_mode(), exact_fp32(), nan_filled_allocations():
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
    # At run time cudnn is an object with more members than the module that mypy reads.
    conv = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    settings = (torch.backends.cuda.matmul, conv)
    before = [setting.fp32_precision for setting in settings]
    for setting in settings:
        setting.fp32_precision = "ieee"
    try:
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value


@contextmanager
def nan_filled_allocations() -> Iterator[None]:
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


def tensors(value: object) -> list[Tensor]:
    """The tensors of an argument or of a result, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, tuple):  # such as KVPages and folded weights
        return [x for part in value for x in tensors(part)]
    return []


def _unchanged(before: Tensor, now: Tensor) -> bool:
    """Whether two tensors are equal, except where `before` is NaN: that is memory without a value,
    such as slots after a node's last token, which peers may clear."""
    bits = BITS[before.dtype.itemsize]
    if torch.equal(before.view(bits), now.view(bits)):  # one pass, also over NaN
        return True
    if before.dtype.itemsize == 1:  # FP8 cannot be compared
        before, now = before.float(), now.float()
    return bool(((before == now) | before.isnan()).all())
