"""Audits: whether a form does, while it is timed, what it did when its results were judged.

A form can be fast because it does not do the work: it keeps results by call or by pointer, leaves
work on another stream or thread, was captured as an empty graph, writes only a part. So the timed
calls of input set 0 run on other values of the input that varies from call to call. After the
timing, the judged values are put back at the same addresses, the results are overwritten with NaN,
and one more call through the timed path must give the results that were judged.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from bench.measure.verdicts import (
    NOT_WRITTEN,
    nan_filled_allocations,
    shared_input,
    tensors,
    verdict_on,
)
from bench.suite import OPS
from bench.suite.op import Case

OTHER = -0.5  # the varying input of set 0 times this while it is timed: exact in every float dtype
LATE_S = 0.2  # how long a late result is waited for, to name the reason
LATE = "its results arrive after the call has returned: work on another stream or thread"
KEPT = "it returns the results of an earlier call: they do not follow its inputs"


class Cheat(Exception):
    """What a form does differently while it is timed."""


class Audit:
    """The audit of a case's forms: created before the calls are prepared, over `inputs`, which are
    set 0 of their inputs, `expected` being the judged results."""

    def __init__(self, case: Case, inputs: dict, expected: list[Tensor]) -> None:
        self.case, self.inputs, self.expected = case, inputs, expected
        self.varying: Tensor = inputs[OPS[case.op].varies]
        self.judged = self.varying.clone()
        self.varying.mul_(OTHER)
        self.timed = self.varying.clone()

    def check(self, call: Callable[[], object]) -> None:
        """Raise Cheat unless `call`, one timed call of set 0, does the work."""
        before = tensors(call())
        if name := shared_input(OPS[self.case.op], self.inputs, before):
            raise Cheat(f"a result shares memory with the input {name!r} while it is timed")
        kept = [x.clone() for x in before]
        for x in before:
            x.fill_(torch.nan if x.is_floating_point() else -1)
        self.varying.copy_(self.judged)
        try:
            with nan_filled_allocations():
                results = tensors(call())
            at_return = [x.clone() for x in results]  # on the stream that is timed
            reason = self._reason(at_return, results, kept)
        finally:
            self.varying.copy_(self.timed)
        if reason:
            raise Cheat(reason)

    def _reason(
        self, at_return: list[Tensor], results: list[Tensor], kept: list[Tensor]
    ) -> str | None:
        failure = self._failure(at_return)
        if not failure:
            return None
        if self._arrives(results):
            return LATE
        if all(map(torch.equal, at_return, kept)):
            return KEPT
        if NOT_WRITTEN in failure:
            return f"it does not do its work while it is timed: {failure}"
        return f"its results differ while it is timed: {failure}"

    def _arrives(self, results: list[Tensor]) -> bool:
        """Whether right results arrive within LATE_S."""
        end = time.monotonic() + LATE_S
        while time.monotonic() < end:
            if results and results[0].is_cuda:
                torch.cuda.synchronize()
            if not self._failure(results):
                return True
            time.sleep(LATE_S / 50)
        return False

    def _failure(self, results: list[Tensor]) -> str | None:
        stored = list(self.inputs["pages"][:2]) if OPS[self.case.op].stores else []
        return verdict_on(self.case, [*results, *stored], self.expected).failure
