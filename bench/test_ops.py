"""`pytest bench/`: the cases of `bench ops` with pytest-benchmark's tables, comparisons and JSON.

Cases, inputs, checks and timer are those of the command: on a GPU a round is one replay of a
captured CUDA graph after the L2 has been emptied, divided by its number of calls. A form with wrong
numbers fails, a missing peer is skipped. The forms of a case share a group, but are timed one after
the other; for close comparisons use `python -m bench ops`, which alternates them. In the JSON,
`extra_info` of a benchmark is its row, which `python -m bench convert` extracts.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from bench.measure.devices import MAIN_DTYPE, parse_device
from bench.measure.ops import prepared, row_of, verdicts_of
from bench.measure.timing import MAX_REPEATS, MIN_REPEATS, Timing, prepare
from bench.measure.verdicts import reference
from bench.suite import cases
from bench.suite.forms import forms_here
from bench.suite.op import Case
from kernels.runtime.dtypes import dtype_name

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

pytest.importorskip("pytest_benchmark")

DEVICE = parse_device(None)
DTYPE = MAIN_DTYPE[DEVICE.type]
BUDGET_S = 0.3  # of timing per form and case
PAIRS = [
    pytest.param(case, name, id=f"{case.op}: {case.name}: {name}: {dtype_name(DTYPE)}")
    for case in cases(DEVICE.type)
    for name in forms_here(case, DEVICE)
]


class Clock:
    """A clock advanced by samples: a call takes the time that the project's timer measured."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


CLOCK = Clock()


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize(("case", "name"), PAIRS)
def test_op(benchmark: "BenchmarkFixture", case: Case, name: str) -> None:
    """Times one form of an op, or a peer, on one case."""
    verdicts = verdicts_of(case, DEVICE, DTYPE, [name], required=False, expected=_expected(case))
    ready = prepared(case, verdicts, DEVICE, DTYPE)
    verdict = verdicts.get(name)
    if verdict is None:
        pytest.skip("no such form on this device")
    if verdict.skipped:
        pytest.skip(verdict.skipped)
    assert verdict.failure is None, verdict.failure
    set_calls = ready.calls[name]
    with torch.inference_mode():
        call = {name: lambda index: set_calls[index]()}
        repeats = prepare(call, device=DEVICE, sets=len(set_calls), refresh=ready.refresh)
        repeat = repeats[name]
        rounds = min(MAX_REPEATS, max(MIN_REPEATS, int(BUDGET_S * 1e6 / repeat.run())))
        benchmark.group = f"{case.op}: {case.name}"
        benchmark.pedantic(partial(_sample, repeat.run), rounds=rounds)
        ready.check(name, repeat)
    if benchmark.stats:  # None with --benchmark-disable
        samples = benchmark.stats.stats.data
        p20, median, p80 = (float(s) * 1e6 for s in np.percentile(samples, [20, 50, 80]))
        timing = Timing(p20, median, p80, len(samples), repeat.timer)
        benchmark.extra_info |= row_of(case, name, DEVICE, DTYPE, verdict, timing)


def _sample(run: Callable[[], float]) -> None:
    CLOCK.seconds += run() / 1e6


@lru_cache(maxsize=1)  # the forms of a case are consecutive
def _expected(case: Case) -> tuple[dict, list[torch.Tensor]]:
    inputs = case.inputs(0, DEVICE, DTYPE)
    return inputs, reference(case, inputs)
