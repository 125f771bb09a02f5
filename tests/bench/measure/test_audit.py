"""Forms that are fast because they do not do the work: each gets no time, and a failure that says
what it does."""

import ctypes
import re
from threading import Event, Thread

import pytest
import torch

from bench.measure import audit, clocks, ops, timing
from bench.measure.audit import Audit, Cheat
from bench.measure.clocks import Clocks
from bench.measure.verdicts import reference
from bench.suite import OPS, PEERS, numerics_cases, rms_norm
from bench.suite.forms import add_form
from kernels.norm import rms_norm as right_rms_norm
from model.cuda_graph import CudaGraph

CPU = torch.device("cpu")
CASE = rms_norm.case(5, 64)
SETS = 2


def right(inputs: dict) -> tuple[torch.Tensor, torch.Tensor]:
    return right_rms_norm(**inputs, impl="eager")


def by_pointer(inputs):
    """Results kept by the addresses of the inputs."""
    kept = {}

    def call():
        key = inputs["x"].data_ptr()
        if key not in kept:
            kept[key] = right(inputs)
        return tuple(x.clone() for x in kept[key])

    return call


def by_call(inputs):
    """The first call's results, in the memory that it returned."""
    kept = []

    def call():
        kept[:] = kept or [right(inputs)]
        return kept[0]

    return call


def thread(inputs):
    """The work is left to another thread; checks see it finished."""
    calls = {"count": 0}

    def call():
        calls["count"] += 1
        if calls["count"] == 1:
            return right(inputs)
        results = tuple(torch.full_like(inputs["x"], torch.nan) for _ in range(2))
        x = inputs | {"x": inputs["x"].clone()}

        @torch.inference_mode()
        def work():
            WAITING.wait(10)
            for result, value in zip(results, right(x), strict=True):
                result.copy_(value)

        Thread(target=work).start()
        return results

    return call


WAITING = Event()  # the audit waits for late results


def half(inputs):
    """The second half of the results is written by the first call only."""
    calls = {"count": 0}

    def call():
        calls["count"] += 1
        y, total = right(inputs)
        out = torch.empty_like(y)
        rows = len(y) if calls["count"] == 1 else len(y) // 2
        out[:rows] = y[:rows]
        return out, total

    return call


def unwritten(inputs):
    """The last row is never written."""

    def call():
        y, total = right(inputs)
        out = torch.empty_like(y)
        out[:-1] = y[:-1]
        return out, total

    return call


def in_place(inputs):
    """The results are written over the inputs."""

    def call():
        y, total = right(inputs)
        return inputs["x"].copy_(y), inputs["residual"].copy_(total)

    return call


def later_in_place(inputs):
    """The same, but not while results are checked."""
    calls = {"count": 0}

    def call():
        calls["count"] += 1
        y, total = right(inputs)
        return (y, total) if calls["count"] == 1 else (y, inputs["weight"].expand_as(total))

    return call


def changing(inputs):
    """Zeros are left in an input, for faster calls after this one."""

    def call():
        results = right(inputs)
        inputs["residual"].zero_()
        return results

    return call


CHEATS = {
    by_pointer: "returns the results of an earlier call",
    by_call: "does not do its work while it is timed: 320 of 320 elements are NaN",
    thread: "arrive after the call has returned: work on another stream or thread",
    half: "does not do its work while it is timed: 192 of 320 elements are NaN",
    unwritten: "^64 of 320 elements are NaN: not written",
    in_place: "^a result shares memory with the input 'x'$",
    later_in_place: "shares memory with the input 'weight' while it is timed",
    changing: "^it changes its input 'residual'$",
}


@pytest.fixture(autouse=True)
def few_repeats(monkeypatch):
    monkeypatch.setattr(timing, "MAX_REPEATS", timing.MIN_REPEATS)
    monkeypatch.setattr(ops, "sets_for", lambda *_: SETS)
    WAITING.clear()
    monkeypatch.setattr(audit.time, "sleep", lambda seconds: WAITING.wait(0.001) or WAITING.set())
    before = dict(PEERS["rms_norm"])
    yield
    PEERS["rms_norm"].clear()
    PEERS["rms_norm"].update(before)


@pytest.mark.parametrize("cheat", CHEATS, ids=lambda cheat: cheat.__name__)
def test_a_cheat_gets_no_time(cheat):
    """Guards the table against a form that is timed without doing its work: it gets a failure that
    says so, and the honest forms next to it keep their times."""
    add_form("rms_norm", "cheat", cheat)
    add_form("rms_norm", "honest", lambda inputs: lambda: right(inputs))
    rows = ops.time_case(CASE, CPU, torch.float32, ("eager", "cheat", "honest"), 0)
    eager, cheated, honest = rows
    assert (cheated["median_us"], cheated["speedup"]) == (None, None)
    assert re.search(CHEATS[cheat], cheated["failure"]), cheated["failure"]
    assert eager["failure"] is honest["failure"] is None
    assert eager["median_us"] and honest["median_us"]


def test_every_op_is_audited():
    """Guards the audit against an op whose varying input does not change its results: then it
    would not see kept results."""
    for op in OPS.values():
        case = next(case for case in numerics_cases() if case.op == op.name)
        inputs = case.inputs(0, CPU, torch.float32)
        expected = reference(case, inputs)
        checked = Audit(case, inputs, expected)
        honest = op.run
        checked.check(lambda honest=honest, inputs=inputs: honest(**inputs, impl="eager"))
        kept = honest(**inputs, impl="eager")
        clones = [x.clone() for x in (kept if isinstance(kept, tuple) else (kept,))]
        with pytest.raises(Cheat, match="earlier call"):
            checked.check(lambda clones=clones: tuple(x.clone() for x in clones))


def test_an_empty_graph_is_found():
    """Guards against a captured graph that does nothing: its outputs hold what the call before the
    capture wrote."""
    inputs = CASE.inputs(0, CPU, torch.float32)
    checked = Audit(CASE, inputs, reference(CASE, inputs))
    outputs = right(inputs)
    with pytest.raises(Cheat, match="does not do its work while it is timed: 320 of 320"):
        checked.check(lambda: outputs)


def test_results_that_round_otherwise_pass():
    """Guards honest forms: within the op's tolerance, timed results may differ from judged ones."""
    inputs = CASE.inputs(0, CPU, torch.float32)
    checked = Audit(CASE, inputs, reference(CASE, inputs))
    checked.check(lambda: tuple(x * (1 + 2**-23) for x in right(inputs)))


class FakeNvml:
    """NVML of one GPU, whose clock and slowdown reasons are scripted."""

    def __init__(self, mhz, reasons):
        self.mhz, self.reasons = iter(mhz), iter(reasons)

    def nvmlDeviceGetClockInfo(self, handle, kind, out):  # noqa: N802
        out._obj.value = next(self.mhz)
        return 0

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle, out):  # noqa: N802
        out._obj.value = next(self.reasons)
        return 0


class TestClocks:
    def times(self, monkeypatch, mhz, reasons):
        samples = timing.MIN_REPEATS
        library = FakeNvml([*mhz, *[mhz[-1]] * samples], [*reasons, *[0] * samples])
        monkeypatch.setattr(clocks, "nvml", lambda device: (library, ctypes.c_void_p()))
        return ops.time_case(CASE, CPU, torch.float32, ("eager", "portable"), 0)

    def test_times_of_a_hot_gpu_do_not_count(self, monkeypatch):
        """Guards against times of a GPU that slowed down in the middle of a run."""
        for row in self.times(monkeypatch, [1980, 1980, 1200], [0, 0, 0x40]):
            assert row["median_us"] is None
            assert row["failure"] == (
                "the GPU slowed down while it was timed: hardware thermal slowdown,"
                " 1200 to 1980 MHz"
            )

    def test_a_power_limit_is_no_failure(self, monkeypatch):
        """Guards times of large products, which always reach the power limit; clocks are shown."""
        for row in self.times(monkeypatch, [1980, 1755], [0x4, 0x5]):
            assert row["failure"] is None
            assert row["sm_mhz"] == (1755, 1980)

    def test_a_cpu_has_none(self):
        """Guards rows of CPUs against a field without meaning."""
        sampled = Clocks(CPU)
        sampled.sample()
        assert (sampled.sm_mhz, sampled.slowed) == (None, None)
        rows = ops.time_case(CASE, CPU, torch.float32, ("eager",), 0)
        assert "sm_mhz" not in rows[0]


def side_stream(inputs):
    """The work is on a stream that nobody waits for."""
    stream = torch.cuda.Stream()

    def call():
        if not torch.cuda.is_current_stream_capturing():
            return right(inputs)
        with torch.cuda.stream(stream):
            return right(inputs)

    return call


@pytest.mark.gpu
class TestGpu:
    def test_work_on_another_stream(self):
        """Guards graphs against work that is captured on no stream, or on one nobody joins."""
        add_form("rms_norm", "cheat", side_stream)
        device = torch.device("cuda")
        rows = ops.time_case(CASE, device, torch.float32, ("eager", "cheat"), 0)
        assert rows[1]["median_us"] is None
        assert rows[1]["failure"]

    def test_an_empty_graph(self):
        """Guards the audit of a real graph."""
        device = torch.device("cuda")
        inputs = CASE.inputs(0, device, torch.float32)
        checked = Audit(CASE, inputs, reference(CASE, inputs))
        outputs = right(inputs)
        graph = CudaGraph(lambda: outputs, device)
        with pytest.raises(Cheat, match="does not do its work"):
            checked.check(graph.replay)

    def test_nvml_knows_this_gpu(self):
        """Guards the binding: a plausible clock in MHz."""
        sampled = Clocks("cuda")
        sampled.sample()
        if sampled.sm_mhz is None:
            pytest.skip("NVML is missing or does not know this GPU")
        assert 100 <= sampled.sm_mhz[0] <= 4000
