"""The op table: every form of an op checked, then timed beside the others, as rows.

A form whose numbers are wrong is not timed: its row says why in `failure` and has no times.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch

from bench.cases import OPS, Case
from bench.numerics import Verdict, form, judge, reference
from bench.rows import measured, with_speedups
from bench.timing import Timing, measure, sets_for
from kernels._launch import IMPLS, ImplError
from model.terminal import InputError

MAIN_DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TIMED_DTYPES = {"cpu": (torch.float32,), "cuda": DTYPES}


def device_named(name: str | None) -> torch.device:
    """ "cpu" or "cuda"; None is a GPU if there is one. Raises InputError for another or no GPU."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name not in MAIN_DTYPE:
        raise InputError(f"device {name!r}: choose one of {', '.join(MAIN_DTYPE)}")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("device 'cuda': this machine has no GPU that torch can use")
    return torch.device(name)


def select(cases: Iterable[Case], ops: Sequence[str] = (), name: str = "") -> list[Case]:
    """The cases of `ops` (of all if empty) that have `name` in their names.

    Raises InputError for an unknown op, listing the known ones, and if no case is left.
    """
    for op in ops:
        if op not in OPS:
            raise InputError(f"unknown op {op!r}; choose of {', '.join(OPS)}")
    of_ops = [case for case in cases if not ops or case.op in ops]
    chosen = [case for case in of_ops if name in case.name]
    if not chosen:
        names = ", ".join(repr(case.name) for case in of_ops)
        raise InputError(f"no case has {name!r} in its name; choose of {names}")
    return chosen


def check_case(
    case: Case, device: torch.device, dtype: torch.dtype, impls: Sequence[str] = ()
) -> list[dict]:
    """Rows with the errors of the case's forms and no times.

    The forms are `impls`, or all that exist. Raises ImplError if one of `impls` does not.
    """
    verdicts = _verdicts(case, device, dtype, impls or IMPLS, required=bool(impls))
    return [_row(case, name, device, dtype, verdict) for name, verdict in verdicts.items()]


def time_case(
    case: Case,
    device: torch.device,
    dtype: torch.dtype,
    impls: Sequence[str] = (),
    budget_s: float = 1.0,
) -> list[dict]:
    """Rows with the errors and times of the case's forms and peers.

    The forms are `impls`, or all that exist and all peers; `budget_s` seconds of timing are shared
    by all of them. Raises ImplError if one of `impls` does not exist.
    """
    names = impls or (*IMPLS, *case.peers)
    verdicts = _verdicts(case, device, dtype, names, required=bool(impls))
    good = [name for name, verdict in verdicts.items() if not verdict.failure]
    timings: dict[str, Timing] = {}
    try:
        timings = _timings(case, good, device, dtype, budget_s)
    except Exception as error:  # say so in the rows of all: they were timed together
        verdicts |= {name: replace(verdicts[name], failure=one_line(error)) for name in good}
    rows = [
        _row(case, name, device, dtype, verdict, timings.get(name))
        for name, verdict in verdicts.items()
    ]
    return with_speedups(rows)


def _verdicts(
    case: Case, device: torch.device, dtype: torch.dtype, names: Sequence[str], required: bool
) -> dict[str, Verdict]:
    """What `judge` says of each form; forms that do not exist are left out unless `required`."""
    inputs = case.inputs(0, device, dtype)
    expected = reference(case, inputs)
    verdicts = {}
    for name in names:
        try:
            verdicts[name] = judge(case, form(case.op, name), inputs, expected)
        except ImplError:
            if required:
                raise
        except Exception as error:  # a broken form must not hide the others
            verdicts[name] = Verdict(math.nan, math.nan, one_line(error))
    return verdicts


def _timings(
    case: Case, names: Sequence[str], device: torch.device, dtype: torch.dtype, budget_s: float
) -> dict[str, Timing]:
    if not names:
        return {}
    sets = sets_for(case.bytes(dtype), device)
    inputs = [case.inputs(seed, device, dtype) for seed in range(sets)]
    calls = {name: [form(case.op, name)(one) for one in inputs] for name in names}
    candidates = {name: lambda index, of=of: of[index]() for name, of in calls.items()}
    return measure(candidates, device=device, sets=sets, budget_s=budget_s)


def _row(
    case: Case,
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    verdict: Verdict,
    timing: Timing | None = None,
) -> dict:
    return measured(
        case.op,
        case.name,
        name,
        device=device,
        dtype=dtype,
        num_bytes=case.bytes(dtype),
        flops=case.flops,
        verdict=verdict,
        timing=timing,
    )


def one_line(error: Exception) -> str:
    """Type and first line of an error, for a row's `failure`."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
