"""The timer and the measured roofline."""

import gc
import platform
import resource

import pytest
import torch

from bench.measure import roofline, timing
from bench.measure.clocks import Clocks
from bench.measure.roofline import Roofline

CPU = torch.device("cpu")


class TestTiming:
    def test_candidates_alternate_over_rotating_inputs(self, monkeypatch):
        """Guards against timing candidates one after the other, where drift favours one, and
        against a candidate that finds in the cache what another has just read."""
        monkeypatch.setattr(timing, "MAX_REPEATS", timing.MIN_REPEATS)
        calls = []
        candidates = {name: lambda index, name=name: calls.append((name, index)) for name in "ab"}
        timing.measure(candidates, device="cpu", sets=3, budget_s=0)
        assert calls[:6] == [(name, index) for name in "ab" for index in range(3)]  # warm-up
        assert [name for name, _ in calls[6:]] == list("abbaabbaab")
        assert [index for _, index in calls[6:]] == [i % 3 for i in range(10)]

    def test_warm_up_is_not_counted(self):
        """Guards the median against the first call, which compiles and allocates."""
        calls = {"count": 0}

        def slow_at_first(_):
            calls["count"] += 1
            if calls["count"] == 1:
                torch.randn(2_000_000).sort()

        result = timing.measure({"x": slow_at_first}, device="cpu", budget_s=0)["x"]
        assert result.repeats == timing.MIN_REPEATS == calls["count"] - 1
        assert result.p80_us < 10_000

    def test_budget_ends_the_repeats(self, monkeypatch):
        """Guards against a slow candidate making a table take hours."""
        now = [0.0]
        monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

        def take_a_second(_):
            now[0] += 1

        result = timing.measure({"x": take_a_second}, device="cpu", budget_s=20)["x"]
        assert result.repeats == 21
        assert result.timer == "clock"

    def test_summary(self):
        """Guards the meaning of the three times: neither mean nor best."""
        assert timing._summary(
            [10.0, 1.0, 2.0, 3.0, 1000.0, 4.0], "clock", Clocks("cpu")
        ) == timing.Timing(2.0, 3.5, 10.0, 6, "clock")

    def test_sets_exceed_the_cache(self, monkeypatch):
        """Guards cold inputs: five caches together, within the limit on the number of sets."""
        monkeypatch.setattr(timing, "cache_bytes", lambda device: 1000)
        assert [timing.sets_for(size, "cpu") for size in (1, 700, 2500, 10**6)] == [64, 8, 2, 1]

    def test_collector_is_restored(self):
        """Guards the rest of the process: a benchmark that fails must not leave it without gc."""
        with pytest.raises(
            timing.CandidateError, match="^x: ZeroDivisionError: division by zero$"
        ) as failed:
            timing.measure({"fine": lambda _: None, "x": lambda _: 1 / 0}, device="cpu")
        assert failed.value.candidate == "x"
        assert gc.isenabled()


class TestRoofline:
    def test_floor_is_the_larger_term(self):
        """Guards the units: GB/s and TFLOP/s against bytes, operations and microseconds."""
        best = Roofline("gpu", "bfloat16", copy_gb_s=4000, gemm_tflop_s=800)
        assert best.floor_us(8_000_000, 0) == pytest.approx(2)
        assert best.floor_us(8_000_000, 8_000_000_000) == pytest.approx(10)
        assert best.percent(20, 8_000_000, 8_000_000_000) == pytest.approx(50)

    def test_measured(self):
        """Guards the measured ceilings against a factor of a thousand either way."""
        best = roofline.roofline(CPU, torch.float32)
        assert 0.1 < best.copy_gb_s < 10_000
        assert 1e-5 < best.gemm_tflop_s < 1000
        assert roofline.roofline(CPU, torch.float32) is best


@pytest.mark.gpu
class TestGpu:
    def test_graph_and_events(self):
        """Guards the choice of timer, and the random numbers, which a failed capture breaks."""
        xs = [torch.randn(4096, 4096, device="cuda") for _ in range(4)]
        candidates = {
            "captured": lambda index: xs[index].mul_(1.0),
            "waits": lambda index: xs[index].mul_(1.0).sum().item(),
        }
        result = timing.measure(candidates, device="cuda", sets=4, budget_s=0.2)
        assert [result[name].timer for name in candidates] == ["graph", "events"]
        assert torch.randn(3, device="cuda").isfinite().all()
        assert torch.cuda.get_sync_debug_mode() == 0

    @pytest.mark.slow_gpu
    def test_graph_time_is_that_of_one_call(self):
        """Guards the division by the calls in a graph: a copy cannot beat the roofline by half."""
        device = torch.device("cuda")
        best = roofline.roofline(device, torch.bfloat16)
        xs = [torch.randn(64 << 20, device=device) for _ in range(3)]
        result = timing.measure({"x": lambda i: xs[i].neg()}, device=device, sets=3, budget_s=0.2)
        percent = best.percent(result["x"].median_us, 2 * xs[0].nbytes, 0)
        assert 60 < percent < 130
        assert result["x"].p20_us <= result["x"].median_us <= result["x"].p80_us


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc returns memory like that")
def test_freed_memory_is_kept():
    """Guards CPU times against pages that the system takes back and zeroes again, or not."""
    timing.keep_freed_memory()

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(16 << 20)  # 64 MiB, which glibc would return at once
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    # After a few calls, blocks are reused. Fresh pages would be 32 faults each time if of 2 MiB,
    # 16,384 if of 4 KiB.
    assert min(faults() for _ in range(20)) < 16
