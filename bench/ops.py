"""The op table: all forms of an op are checked, then timed together, as rows.

A form with wrong numbers is timed only on request: its row says why in `failure`. A peer that is
not installed or cannot take a case, and a case that the device has no memory for, get a row that
says so in `skipped`. A form whose error poisons the process ends the work (poison.py).
"""

import math
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain

import torch

from bench.cases import OPS, Case
from bench.numerics import Verdict, form, judge, reference
from bench.peers import NAMES, PEERS, Prepare, Unavailable, version
from bench.peers.peer import Library, Peer
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
ADDED = Library("added", "bench.ops.add_form", lambda: None)


def parse_device(name: str | None) -> torch.device:
    """ "cpu" or "cuda"; None is a GPU if there is one. Raises InputError for other names and for
    "cuda" without a GPU."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name not in MAIN_DTYPE:
        raise InputError(f"device {name!r}: choose one of {', '.join(MAIN_DTYPE)}")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("device 'cuda': this machine has no GPU that torch can use")
    return torch.device(name)


def parse_dtypes(names: Sequence[str]) -> tuple[torch.dtype, ...]:
    """Dtypes by their long or short names. Raises InputError for a dtype that ops do not have."""
    known = {dtype_name(dtype): dtype for dtype in DTYPES}
    for name in names:
        if SHORT.get(name, name) not in known:
            raise InputError(f"unknown dtype {name!r}; choose one of {', '.join(known)}")
    return tuple(known[SHORT.get(name, name)] for name in names)


def select(
    cases: Iterable[Case], ops: Sequence[str] = (), shape: str = "", impls: Sequence[str] = ()
) -> list[Case]:
    """The cases of `ops` (all if empty) named `shape`, or else all with `shape` in their names,
    that have one of `impls` (any if empty).

    Raises InputError for an unknown op or form, listing the known ones, and if no case is left.
    """
    _check_known("op", ops, OPS)
    _check_known("form", impls, dict.fromkeys((*FORMS, *chain(*PEERS.values()))))
    of_ops = [case for case in cases if not ops or case.op in ops]
    matching = [case for case in of_ops if case.name == shape]
    matching = matching or [case for case in of_ops if shape in case.name]
    if not matching:
        names = ", ".join(repr(case.name) for case in of_ops)
        raise InputError(f"no case has {shape!r} in its name; choose one of {names}")
    with_form = [case for case in matching if not impls or forms_of(case, impls)]
    if not with_form:
        raise InputError(f"none of these cases has a form {' or '.join(map(repr, impls))}")
    return with_form


def add_form(op: str, name: str, prepare: Prepare) -> None:
    """Add an implementation of `op` to the op table of this process: checked and timed like a peer.

    `prepare` takes the op's arguments as a dict and returns the call to time. Cases built after
    this include the form, on CPUs too. Adding a name again replaces its form. Raises InputError for
    an unknown op and for the name of a built-in form.
    """
    _check_known("op", (op,), OPS)
    if name in FORMS:
        raise InputError(f"form {name!r} is built in: choose a name other than {', '.join(FORMS)}")
    PEERS.setdefault(op, {})[name] = Peer(name, op, prepare, ADDED, on_cpu=True)


def forms_of(case: Case, names: Sequence[str]) -> tuple[str, ...]:
    """Those of `names` that the case's op has as a form, mode or peer, or as a form with config
    values."""
    ours = (*IMPLS, *case.modes)
    others = (*case.peers, *PEERS.get(case.op, ()))
    return tuple(name for name in names if name in others or name.partition(" ")[0] in ours)


def forms_here(case: Case, device: torch.device) -> tuple[str, ...]:
    """The forms and peers of a case that are timed by default."""
    return (*_forms(case, device), *case.peers)


def _check_known(what: str, names: Sequence[str], known: Iterable[str]) -> None:
    for name in names:
        if name not in known:
            raise InputError(f"unknown {what} {name!r}; choose one of {', '.join(known)}")


def check_case(
    case: Case, device: torch.device, dtype: torch.dtype, impls: Sequence[str] = ()
) -> list[dict]:
    """Rows with the errors of the case's forms, without times.

    The forms are `impls`, or all that exist. Raises ImplError if one of `impls` does not exist.
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

    The forms are `impls`, or all that exist and all peers; all of them share `budget_s` seconds of
    timing. With `anyway`, a form over its tolerance is timed, too; its row still says so in
    `failure`. Raises ImplError if one of `impls` does not exist, and PoisonedError as `verdicts_of`
    does.
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
    """Memory that a case needs, without peers: the larger of its inputs with an fp32 copy, as for
    checks, and all sets of its inputs, as for timing. Adds a tenth for what is not counted."""
    once = case.bytes(dtype)
    checked = once * (1 + 4 / dtype.itemsize)
    return int(1.1 * max(checked, sets_for(once, device) * once))


def _too_large(case: Case, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the device cannot hold the case, or None. A CPU's memory is not checked."""
    if device.type != "cuda":
        return None
    needed = needed_bytes(case, device, dtype)
    total = torch.cuda.get_device_properties(device).total_memory
    return f"needs {needed / 1e9:.0f} GB, the GPU has {total / 1e9:.0f}" if needed > total else None


def _forms(case: Case, device: torch.device) -> tuple[str, ...]:
    """The op's forms; on a CPU only two: Triton's interpreter is for tests, its bf16 is wrong."""
    return (*IMPLS, *case.modes) if device.type == "cuda" else IMPLS[:2]


def verdicts_of(
    case: Case,
    device: torch.device,
    dtype: torch.dtype,
    names: Sequence[str],
    required: bool,
    expected: tuple[dict, list[torch.Tensor]] | None = None,
) -> dict[str, Verdict]:
    """The `judge` verdict on each form; forms that do not exist are left out unless `required`.

    expected: the inputs and their `reference` results, if they exist already.
    Raises PoisonedError for a form that makes the process unusable.
    """
    if expected is None:
        inputs = case.inputs(0, device, dtype)
        expected = inputs, reference(case, inputs)
    inputs, results = expected
    verdicts = {}
    for name in names:
        try:
            verdicts[name] = judge(case, form(case.op, name), inputs, results)
        except ImplError:
            if required:
                raise
        except Exception as error:  # a broken form must not hide the others
            check_poison(name, error)
            verdicts[name] = _verdict_of_error(error)
    return verdicts


def _timings(
    case: Case,
    verdicts: dict[str, Verdict],
    device: torch.device,
    dtype: torch.dtype,
    budget_s: float,
    anyway: bool,
) -> dict[str, Timing]:
    """Times of the forms and peers with right numbers; with `anyway`, of all that ran. Puts the
    reason into `verdicts` if one cannot be timed."""
    calls = prepared(case, verdicts, device, dtype, anyway)
    while calls:
        candidates = {name: partial(_call, set_calls) for name, set_calls in calls.items()}
        sets = len(next(iter(calls.values())))
        try:
            return measure(candidates, device=device, sets=sets, budget_s=budget_s)
        except CandidateError as failed:  # the others must still get their times
            name = failed.candidate
            verdicts[name] = _verdict_of_error(failed.error, verdicts[name])
            del calls[name]
    return {}


def prepared(
    case: Case,
    verdicts: dict[str, Verdict],
    device: torch.device,
    dtype: torch.dtype,
    anyway: bool = False,
) -> dict[str, list[Callable]]:
    """The calls of every form, one per set of inputs, each called once: what a form prepares at its
    first call for an input (a schedule, a compiled kernel) is neither timed nor captured.

    The forms are those with right numbers; with `anyway`, also those that ran with wrong ones.
    """
    names = [name for name, verdict in verdicts.items() if _can_be_timed(verdict, anyway)]
    if not names:
        return {}
    sets = sets_for(case.bytes(dtype), device)
    inputs = [case.inputs(seed, device, dtype) for seed in range(sets)]
    calls = {}
    for name in names:
        try:
            with torch.inference_mode():
                set_calls = [form(case.op, name)(input_set) for input_set in inputs]
                for call in set_calls:
                    call()
            calls[name] = set_calls
        except Exception as error:
            check_poison(name, error)
            verdicts[name] = _verdict_of_error(error, verdicts[name])
    return calls


def _can_be_timed(verdict: Verdict, anyway: bool) -> bool:
    ran = not math.isnan(verdict.max_err)
    return not verdict.skipped and (not verdict.failure or (anyway and ran))


def _call(set_calls: Sequence[Callable], index: int) -> object:
    return set_calls[index]()


def _verdict_of_error(error: Exception, verdict: Verdict = NOT_RUN) -> Verdict:
    """The verdict on a form that raised: out of memory and unavailable are skips, not failures."""
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
