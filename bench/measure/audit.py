"""Audits: whether a form does, while it is timed, what it did when its results were judged.

A form can be fast because it does not do the work: it keeps results by call, pointer or value,
leaves work on another stream or thread, was captured as an empty graph, writes only a part, changes
inputs. So timed calls run on other values of the input that varies from call to call, on a GPU on
new ones in every repeat. After the timing, one input set, chosen at random, gets its first values
back at the same addresses, its results are overwritten with NaN, and calls through the timed path
must give the right results and leave the other inputs as they were.
"""

import random
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bench.measure.timing import Repeat
from bench.measure.verdicts import (
    NOT_WRITTEN,
    addresses,
    changed_input,
    nan_filled_allocations,
    reference,
    shared_input,
    tensors,
    verdict_on,
)
from bench.suite import OPS
from bench.suite.op import Case

LATE_S = 0.2  # how long a late result is waited for, to name the reason
LATE = "its results arrive after the call has returned: work on another stream or thread"
KEPT = "it returns the results of an earlier call: they do not follow its inputs"


class Cheat(Exception):
    """What a form does differently while it is timed."""


@dataclass(frozen=True)
class AuditedSet:
    """An input set, its first values, and the right results for them."""

    inputs: dict
    original: dict
    expected: list[Tensor]


class Audit:
    """The audit of a case's forms; `sets` are their input sets, `sets[i]` with seed i."""

    def __init__(self, case: Case, sets: Sequence[dict]) -> None:
        self.case, self.op, self.sets = case, OPS[case.op], sets
        self.chosen = random.randrange(len(sets))
        self.audited: dict[int, AuditedSet] = {}
        # Written through `data`, which leaves the version by which a form could notice the change.
        self.varying = [inputs[self.op.varies].data for inputs in sets]
        self.drawn = [x.clone() for x in self.varying]
        for index in range(len(sets)):
            self.refresh(index)

    def refresh(self, index: int) -> None:
        """Give the varying input of a set new values: its first ones times a random factor."""
        torch.mul(self.drawn[index], random.uniform(0.5, 1), out=self.varying[index])

    def check(self, repeat: Repeat) -> None:
        """Raise Cheat unless a form does its work on the chosen set by the path that is timed."""
        index, last = self.chosen, len(self.sets) - 1
        if repeat.timer == "graph":
            results = (addresses(tensors(repeat.result(at))) for at in (index, last))
            if set.intersection(*results):
                index = last  # of results in the same memory, a replay leaves the last
        try:
            self._check(self._audited(index), partial(repeat.result, index))
        finally:
            self.refresh(index)

    def _audited(self, index: int) -> AuditedSet:
        """The set, its first values drawn again, and the right results; kept for other forms."""
        if index not in self.audited:
            varying = self.varying[index]
            original = self.case.inputs(index, varying.device, varying.dtype)
            expected = reference(self.case, original)
            self.audited[index] = AuditedSet(self.sets[index], original, expected)
        return self.audited[index]

    def _check(self, state: AuditedSet, call: Callable[[], object]) -> None:
        before = tensors(call())
        if name := shared_input(self.op, state.inputs, before):
            raise Cheat(f"a result shares memory with the input {name!r} while it is timed")
        kept = [x.clone() for x in before]
        for x in before:
            x.fill_(torch.nan if x.is_floating_point() else -1)
        for name in (self.op.varies, *("pages",) * self.op.stores):
            _restore(state, name)
        reason = None
        # Twice: memory left unwritten shows only among NaN, which a form could notice.
        for context in (nullcontext(), nan_filled_allocations()):
            with context:
                results = tensors(call())
            at_return = [x.clone() for x in results]  # on the stream that is timed
            reason = reason or self._reason(state, at_return, results, kept)
        while name := changed_input(self.op, state.original, state.inputs):
            _restore(state, name)  # for the forms that follow
            reason = f"it changes its input {name!r} while it is timed"
        if reason:
            raise Cheat(reason)

    def _reason(
        self,
        state: AuditedSet,
        at_return: list[Tensor],
        results: list[Tensor],
        kept: list[Tensor],
    ) -> str | None:
        failure = self._failure(state, at_return)
        if not failure:
            return None
        if self._arrives(state, results):
            return LATE
        if all(map(torch.equal, at_return, kept)):
            return KEPT
        if NOT_WRITTEN in failure:
            return f"it does not do its work while it is timed: {failure}"
        return f"its results differ while it is timed: {failure}"

    def _arrives(self, state: AuditedSet, results: list[Tensor]) -> bool:
        """Whether right results arrive within LATE_S."""
        end = time.monotonic() + LATE_S
        while time.monotonic() < end:
            if results and results[0].is_cuda:
                torch.cuda.synchronize()
            if not self._failure(state, results):
                return True
            time.sleep(LATE_S / 50)
        return False

    def _failure(self, state: AuditedSet, results: list[Tensor]) -> str | None:
        stored = list(state.inputs["pages"][:2]) if self.op.stores else []
        dtype = state.inputs[self.op.varies].dtype
        return verdict_on(self.case, [*results, *stored], state.expected, dtype).failure


def _restore(state: AuditedSet, name: str) -> None:
    pairs = zip(tensors(state.inputs[name]), tensors(state.original[name]), strict=True)
    for now, first in pairs:
        now.data.copy_(first)
