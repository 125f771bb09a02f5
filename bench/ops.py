"""The op table: every form of an op checked, then timed beside the others, as rows.

A form whose numbers are wrong is not timed unless asked for: its row says why in `failure`. A peer
that is not installed or cannot take a case, and a case that the device has no memory for, have a
row that says so in `skipped`. A form whose error spoils the process ends the work (poison.py).
"""

import math
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial

import torch

from bench.cases import OPS, Case
from bench.numerics import Verdict, form, judge, reference
from bench.peers import NAMES, PEERS, Unavailable, version
from bench.poison import check_poison
from bench.rows import measured, with_speedups
from bench.timing import CandidateError, Timing, measure, sets_for
from kernels.errors import ImplError, one_line
from kernels.runtime.dispatch import IMPLS
from kernels.runtime.dtypes import dtype_name
from model.errors import InputError

MAIN_DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHORT = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
FORMS = (*IMPLS, "triton-invariant", "triton-separate", "triton-fused", *NAMES)
TRACE_CHARACTERS = 4000
NOT_RUN = Verdict(math.nan, math.nan, None)
TIMED_DTYPES = {"cpu": (torch.float32,), "cuda": DTYPES}


def parse_device(name: str | None) -> torch.device:
    """ "cpu" or "cuda"; None is a GPU if there is one. Raises InputError for another or no GPU."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name not in MAIN_DTYPE:
        raise InputError(f"device {name!r}: choose one of {', '.join(MAIN_DTYPE)}")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("device 'cuda': this machine has no GPU that torch can use")
    return torch.device(name)


def parse_dtypes(names: Sequence[str]) -> tuple[torch.dtype, ...]:
    """Dtypes by their names, long or short. Raises InputError for one that ops do not have."""
    known = {dtype_name(dtype): dtype for dtype in DTYPES}
    for name in names:
        if SHORT.get(name, name) not in known:
            raise InputError(f"unknown dtype {name!r}; choose one of {', '.join(known)}")
    return tuple(known[SHORT.get(name, name)] for name in names)


def select(
    cases: Iterable[Case], ops: Sequence[str] = (), shape: str = "", impls: Sequence[str] = ()
) -> list[Case]:
    """The cases of `ops` (of all if empty) whose name is `shape`, or else all that contain it, and
    that have one of `impls` (any if empty).

    Raises InputError for an unknown op or form, listing the known ones, and if no case is left.
    """
    _known("op", ops, OPS)
    _known("form", impls, FORMS)
    of_ops = [case for case in cases if not ops or case.op in ops]
    chosen = [case for case in of_ops if case.name == shape]
    chosen = chosen or [case for case in of_ops if shape in case.name]
    if not chosen:
        names = ", ".join(repr(case.name) for case in of_ops)
        raise InputError(f"no case has {shape!r} in its name; choose one of {names}")
    with_form = [case for case in chosen if not impls or forms_of(case, impls)]
    if not with_form:
        raise InputError(f"none of these cases has a form {' or '.join(map(repr, impls))}")
    return with_form


def forms_of(case: Case, names: Sequence[str]) -> tuple[str, ...]:
    """Those of `names` that the case's op has as a form, mode or peer, or as one of its forms with
    a tile choice."""
    ours = (*IMPLS, *case.modes)
    others = (*case.peers, *PEERS.get(case.op, ()))
    return tuple(name for name in names if name in others or name.partition(" ")[0] in ours)


def forms_here(case: Case, device: torch.device) -> tuple[str, ...]:
    """What is timed of a case unless somebody chooses: its forms and its peers."""
    return (*_forms(case, device), *case.peers)


def _known(what: str, names: Sequence[str], known: Iterable[str]) -> None:
    for name in names:
        if name not in known:
            raise InputError(f"unknown {what} {name!r}; choose one of {', '.join(known)}")


def check_case(
    case: Case, device: torch.device, dtype: torch.dtype, impls: Sequence[str] = ()
) -> list[dict]:
    """Rows with the errors of the case's forms and no times.

    The forms are `impls`, or all that exist. Raises ImplError if one of `impls` does not.
    """
    if reason := _too_large(case, device, dtype):
        return [row_of(case, "all", device, dtype, replace(NOT_RUN, skipped=reason))]
    names = forms_of(case, impls) or _forms(case, device)
    verdicts = verdicts_of(case, device, dtype, names, required=bool(impls))
    return [row_of(case, name, device, dtype, verdict) for name, verdict in verdicts.items()]


def time_case(
    case: Case,
    device: torch.device,
    dtype: torch.dtype,
    impls: Sequence[str] = (),
    budget_s: float = 1.0,
    anyway: bool = False,
) -> list[dict]:
    """Rows with the errors and times of the case's forms and peers.

    The forms are `impls`, or all that exist and all peers; `budget_s` seconds of timing are shared
    by all of them. With `anyway` a form over its tolerance is timed, too; its row still says so in
    `failure`. Raises ImplError if one of `impls` does not exist, PoisonedError as `verdicts_of`.
    """
    if reason := _too_large(case, device, dtype):
        return [row_of(case, "all", device, dtype, replace(NOT_RUN, skipped=reason))]
    names = forms_of(case, impls) or forms_here(case, device)
    verdicts = verdicts_of(case, device, dtype, names, required=bool(impls))
    timings = _timings(case, verdicts, device, dtype, budget_s, anyway)
    rows = [
        row_of(case, name, device, dtype, verdict, timings.get(name))
        for name, verdict in verdicts.items()
    ]
    return with_speedups(rows)


def needed_bytes(case: Case, device: torch.device, dtype: torch.dtype) -> int:
    """Memory that a case takes, peers aside: its inputs with a copy of them in fp32 while numbers
    are checked, then one set of inputs beside the other. A tenth more for what is not counted."""
    once = case.bytes(dtype)
    checked = once * (1 + 4 / dtype.itemsize)
    return int(1.1 * max(checked, sets_for(once, device) * once))


def _too_large(case: Case, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the device cannot hold the case. What a CPU's memory holds is not asked."""
    if device.type != "cuda":
        return None
    needed = needed_bytes(case, device, dtype)
    there = torch.cuda.get_device_properties(device).total_memory
    return f"needs {needed / 1e9:.0f} GB, the GPU has {there / 1e9:.0f}" if needed > there else None


def _forms(case: Case, device: torch.device) -> tuple[str, ...]:
    """The op's forms; not Triton's interpreter on a CPU, which is for tests: its bf16 is wrong."""
    return (*IMPLS, *case.modes) if device.type == "cuda" else IMPLS[:2]


def verdicts_of(
    case: Case,
    device: torch.device,
    dtype: torch.dtype,
    names: Sequence[str],
    required: bool,
    expected: tuple[dict, list[torch.Tensor]] | None = None,
) -> dict[str, Verdict]:
    """What `judge` says of each form; forms that do not exist are left out unless `required`.

    expected: the inputs and what `reference` makes of them, if they are there already.
    Raises PoisonedError for a form after which the process is of no use.
    """
    if expected is None:
        inputs = case.inputs(0, device, dtype)
        expected = inputs, reference(case, inputs)
    inputs, results = expected
    found = {}
    for name in names:
        try:
            found[name] = judge(case, form(case.op, name), inputs, results)
        except ImplError:
            if required:
                raise
        except Exception as error:  # a broken form must not hide the others
            check_poison(name, error)
            found[name] = _stopped(error)
    return found


def _timings(
    case: Case,
    found: dict[str, Verdict],
    device: torch.device,
    dtype: torch.dtype,
    budget_s: float,
    anyway: bool,
) -> dict[str, Timing]:
    """Times of the forms and peers with right numbers, of all that ran with `anyway`; why one has
    none is put into `found`."""
    calls = prepared(case, found, device, dtype, anyway)
    while calls:
        candidates = {name: partial(_call, of_sets) for name, of_sets in calls.items()}
        sets = len(next(iter(calls.values())))
        try:
            return measure(candidates, device=device, sets=sets, budget_s=budget_s)
        except CandidateError as failed:  # it must not cost the others their times
            name = failed.candidate
            found[name] = _stopped(failed.error, found[name])
            del calls[name]
    return {}


def prepared(
    case: Case,
    found: dict[str, Verdict],
    device: torch.device,
    dtype: torch.dtype,
    anyway: bool = False,
) -> dict[str, list[Callable]]:
    """The call of every form for every set of inputs, each made once: what a form prepares at its
    first call for an input (a schedule, a compiled kernel) is neither timed nor captured.

    The forms are those that are right, with `anyway` also those that are merely wrong."""
    good = [name for name, verdict in found.items() if _can_be_timed(verdict, anyway)]
    if not good:
        return {}
    sets = sets_for(case.bytes(dtype), device)
    inputs = [case.inputs(seed, device, dtype) for seed in range(sets)]
    calls = {}
    for name in good:
        try:
            with torch.inference_mode():
                of_sets = [form(case.op, name)(one) for one in inputs]
                for call in of_sets:
                    call()
            calls[name] = of_sets
        except Exception as error:
            check_poison(name, error)
            found[name] = _stopped(error, found[name])
    return calls


def _can_be_timed(verdict: Verdict, anyway: bool) -> bool:
    ran = not math.isnan(verdict.max_err)
    return not verdict.skipped and (not verdict.failure or (anyway and ran))


def _call(of_sets: Sequence[Callable], index: int) -> object:
    return of_sets[index]()


def _stopped(error: Exception, verdict: Verdict = NOT_RUN) -> Verdict:
    """Of a form that raised: no memory, or not here, is no fault of its numbers."""
    if isinstance(error, Unavailable):
        return replace(verdict, skipped=str(error))
    if isinstance(error, torch.OutOfMemoryError):
        return replace(verdict, skipped="out of memory")
    trace = "".join(traceback.format_exception(error))[-TRACE_CHARACTERS:]
    return replace(verdict, failure=one_line(error), trace=trace)


def row_of(
    case: Case,
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    verdict: Verdict,
    timing: Timing | None = None,
) -> dict:
    """The row of one form of a case."""
    row = measured(
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
    row |= {"skipped": verdict.skipped, "version": version(case.op, name)}
    return row | {"trace": verdict.trace} if verdict.trace else row
