"""The audit after the timing: cheating forms get no time and a failure that says what they do;
honest ones pass. And a GPU's clocks."""

import ctypes
import re

import pytest
import torch

from bench.measure import audit, clocks, ops, timing
from bench.measure.audit import Audit, Cheat
from bench.measure.clocks import Clocks
from bench.suite import OPS, PEERS, rms_norm
from bench.suite.forms import add_form
from model.cuda_graph import CudaGraph
from tests.bench.measure.cheats import CHEATS, PREPARED, WAITING, by_pointer, right, weights

CPU = torch.device("cpu")
CASE = rms_norm.case(5, 64)
SETS = 2


@pytest.fixture(autouse=True)
def few_repeats(monkeypatch):
    monkeypatch.setattr(timing, "MAX_REPEATS", timing.MIN_REPEATS)
    monkeypatch.setattr(ops, "sets_for", lambda *_: SETS)
    WAITING.clear()
    PREPARED["count"] = 0
    monkeypatch.setattr(audit.random, "randrange", lambda sets: sets - 1)
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


def repeat(result, timer="clock"):
    """A timed form whose calls return `result(index)`."""
    return timing.Repeat(run=lambda: 0.0, timer=timer, result=result)


def test_forms_after_a_cheat_are_judged_by_themselves():
    """Guards the forms that follow one that changes inputs: an honest one gets them as they were,
    and a second cheat is found as well."""
    add_form("rms_norm", "first", weights)
    add_form("rms_norm", "honest", lambda inputs: lambda: right(inputs))
    add_form("rms_norm", "second", by_pointer)
    rows = ops.time_case(CASE, CPU, torch.float32, ("first", "honest", "second"), 0)
    first, honest, second = (row["failure"] for row in rows)
    assert "changes its input 'weight'" in first
    assert honest is None
    assert CHEATS[by_pointer] in second


def test_storing_nothing_is_found():
    """Guards ops that write K and V into pages, which an earlier form has written already."""
    op = OPS["qk_norm_rope"]
    case = next(iter(op.checks()))

    def elsewhere(inputs):
        own = inputs | {"pages": inputs["pages"].map(torch.clone)}
        calls = {"count": 0}

        def call():
            calls["count"] += 1
            return op.run(**(inputs if calls["count"] == 1 else own), impl="eager")

        return call

    before = dict(PEERS["qk_norm_rope"])
    try:
        add_form("qk_norm_rope", "cheat", elsewhere)
        rows = ops.time_case(case, CPU, torch.float32, ("eager", "portable", "cheat"), 0)
    finally:
        PEERS["qk_norm_rope"].clear()
        PEERS["qk_norm_rope"].update(before)
    assert "NaN" in rows[2]["failure"]
    assert rows[0]["failure"] is rows[1]["failure"] is None


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_every_op_is_audited(op):
    """Guards the audit against an op whose varying input does not change its results: then it
    would not see kept results. Honest calls pass, again and again."""
    case = next(iter(op.checks()))
    sets = [case.inputs(seed, CPU, torch.float32) for seed in range(SETS)]
    checked = Audit(case, sets)
    for _ in range(2):
        checked.check(repeat(lambda index: op.run(**sets[index], impl="eager")))
    results = [op.run(**inputs, impl="eager") for inputs in sets]
    kept = [result if isinstance(result, tuple) else (result,) for result in results]
    copies = [tuple(x.clone() for x in result) for result in kept]
    with pytest.raises(Cheat, match="earlier call"):
        checked.check(repeat(lambda index: tuple(x.clone() for x in copies[index])))


def audited(calls=3):
    sets = [CASE.inputs(seed, CPU, torch.float32) for seed in range(calls)]
    return sets, Audit(CASE, sets)


def test_an_empty_graph_is_found():
    """Guards against a captured graph that does nothing: its outputs hold what the call before the
    capture wrote."""
    sets, checked = audited()
    outputs = [right(inputs) for inputs in sets]
    with pytest.raises(Cheat, match="does not do its work while it is timed: 320 of 320"):
        checked.check(repeat(lambda index: outputs[index], "graph"))


def test_results_of_a_graph_in_the_same_memory(monkeypatch):
    """Guards honest forms with one output for all calls: after a replay it holds those of the last
    set, whichever was chosen."""
    monkeypatch.setattr(audit.random, "randrange", lambda sets: 0)
    sets, checked = audited()
    outputs = right(sets[0])

    def replay(index):
        for inputs in sets:
            for out, value in zip(outputs, right(inputs), strict=True):
                out.copy_(value)
        return outputs

    checked.check(repeat(replay, "graph"))


def test_results_that_round_otherwise_pass():
    """Guards honest forms: within the op's tolerance, timed results may differ from judged ones."""
    sets, checked = audited()
    checked.check(repeat(lambda index: tuple(x * (1 + 2**-23) for x in right(sets[index]))))


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
    """The work is on a stream that the timed one does not wait for."""
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
        """Guards graphs against work that is captured on no stream, or never joined."""
        add_form("rms_norm", "cheat", side_stream)
        device = torch.device("cuda")
        rows = ops.time_case(CASE, device, torch.float32, ("eager", "cheat"), 0)
        assert rows[1]["median_us"] is None
        assert rows[1]["failure"]

    def test_an_empty_graph(self):
        """Guards the audit of a real graph."""
        device = torch.device("cuda")
        sets = [CASE.inputs(0, device, torch.float32)]
        checked = Audit(CASE, sets)
        outputs = [right(sets[0])]
        graph = CudaGraph(lambda: outputs, device)
        with pytest.raises(Cheat, match="does not do its work"):
            checked.check(repeat(lambda index: graph.replay()[index], "graph"))

    def test_honest_forms_of_every_op(self):
        """Guards all forms against false alarms, captured."""
        device = torch.device("cuda")
        for op in OPS.values():
            case = next(iter(op.checks()))
            for row in ops.time_case(case, device, torch.bfloat16, budget_s=0):
                assert row["failure"] is None, row

    def test_every_repeat_gets_new_values(self):
        """Guards against results kept by value: inputs change between replays."""
        sets = [CASE.inputs(seed, "cuda", torch.float32) for seed in range(SETS)]
        checked, seen = Audit(CASE, sets), []
        ready = ops.Prepared(CASE, {}, {}, checked)
        call = {"x": lambda index: right(sets[index])}
        repeats = timing.prepare(call, device="cuda", sets=SETS, refresh=ready.refresh)
        for _ in range(5):
            repeats["x"].run()
            seen.append(float(sets[0]["x"][0, 0]))
        assert len(set(seen)) == 5

    def test_nvml_knows_this_gpu(self):
        """Guards the binding: a plausible clock in MHz."""
        sampled = Clocks("cuda")
        sampled.sample()
        if sampled.sm_mhz is None:
            pytest.skip("NVML is missing or does not know this GPU")
        assert 100 <= sampled.sm_mhz[0] <= 4000
