"""The op table: all forms of an op are checked, then timed together, as rows.

A form with wrong numbers is timed only on request: its row says why in `failure`. A peer that is
not installed or cannot take a case, and a case that the device has no memory for, get a row that
says so in `skipped`. A form whose error poisons the process ends the work (poison.py).
"""

import math
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from bench.measure.audit import Audit, Cheat
from bench.measure.poison import check_poison
from bench.measure.rows import measured, with_speedups
from bench.measure.timing import CandidateError, Repeat, Timing, measure, sets_for
from bench.measure.verdicts import NOT_RUN, Verdict, judge, reference
from bench.peers.peer import Unavailable
from bench.suite import PEERS
from bench.suite.forms import form, forms_here, forms_of, own_forms, version
from bench.suite.op import Case
from kernels.errors import ImplError, one_line

TRACE_CHARACTERS = 4000


@dataclass
class Prepared:
    """The calls of every form of a case, one per set of inputs, and their audit."""

    case: Case
    verdicts: dict[str, Verdict]
    calls: dict[str, list[Callable]]
    audit: Audit | None = None

    def refresh(self, index: int) -> None:
        if self.audit:
            self.audit.refresh(index)

    def check(self, name: str, repeat: Repeat) -> None:
        """Audit a form, unless its results were wrong before; raises Cheat."""
        peer = PEERS.get(self.case.op, {}).get(name)
        audited = name != "eager" and (peer is None or peer.audited)
        if self.audit and audited and not self.verdicts[name].failure:
            self.audit.check(repeat)


def check_case(
    case: Case, device: torch.device, dtype: torch.dtype, impls: Sequence[str] = ()
) -> list[dict]:
    """Rows with the errors of the case's forms, without times.

    The forms are `impls`, or all that exist. Raises ImplError if one of `impls` does not exist.
    """
    if reason := _too_large(case, device, dtype):
        return [row_of(case, "all", device, dtype, replace(NOT_RUN, skipped=reason))]
    names = forms_of(case, impls) or own_forms(case, device)
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
    ready = prepared(case, verdicts, device, dtype, anyway)
    timings = _timings(ready, device, budget_s)
    rows = [
        row_of(case, name, device, dtype, verdict, timings.get(name))
        for name, verdict in verdicts.items()
    ]
    return with_speedups(rows)


def needed_bytes(case: Case, device: torch.device, dtype: torch.dtype) -> int:
    """Memory that a case needs, without peers: all sets of its inputs for the timing, one more and
    its copy in fp32 for the audit. Adds a tenth for what is not counted."""
    once = case.bytes(dtype)
    return int(1.1 * once * (sets_for(once, device) + 1 + 4 / dtype.itemsize))


def _too_large(case: Case, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the device cannot hold the case, or None. A CPU's memory is not checked."""
    if device.type != "cuda":
        return None
    needed = needed_bytes(case, device, dtype)
    total = torch.cuda.get_device_properties(device).total_memory
    return f"needs {needed / 1e9:.0f} GB, the GPU has {total / 1e9:.0f}" if needed > total else None


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


def _timings(ready: Prepared, device: torch.device, budget_s: float) -> dict[str, Timing]:
    """Times of the prepared forms. Puts the reason into their verdicts if one cannot be timed."""
    calls, verdicts = ready.calls, ready.verdicts
    while calls:
        candidates = {name: partial(_call, set_calls) for name, set_calls in calls.items()}
        sets = len(next(iter(calls.values())))
        try:
            return measure(candidates, device=device, sets=sets, budget_s=budget_s, audit=ready)
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
) -> Prepared:
    """The calls of every form, one per set of inputs. On a GPU each is called once: what a form
    prepares at its first call for an input (a schedule, a compiled kernel) must not be captured.

    The forms are those with right numbers; with `anyway`, also those that ran with wrong ones.
    """
    names = [name for name, verdict in verdicts.items() if _can_be_timed(verdict, anyway)]
    if not names:
        return Prepared(case, verdicts, {})
    sets = sets_for(case.bytes(dtype), device)
    inputs = [case.inputs(seed, device, dtype) for seed in range(sets)]
    audit = Audit(case, inputs)
    calls = {}
    for name in names:
        try:
            with torch.inference_mode():
                set_calls = [form(case.op, name)(input_set) for input_set in inputs]
                for call in set_calls if device.type == "cuda" else ():  # else by the timer
                    call()
            calls[name] = set_calls
        except Exception as error:
            check_poison(name, error)
            verdicts[name] = _verdict_of_error(error, verdicts[name])
    return Prepared(case, verdicts, calls, audit)


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
    if isinstance(error, Cheat):
        return replace(verdict, failure=str(error))
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
        shape=case.shape or None,
    )
    row |= {"skipped": verdict.skipped, "version": version(case.op, name)}
    return row | {"trace": verdict.trace} if verdict.trace else row
