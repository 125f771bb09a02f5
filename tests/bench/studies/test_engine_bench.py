"""The engine's benchmarks on a small model: what they run, and what their rows contain."""

import pytest
import torch

from bench.rows import show
from bench.studies import engine, packing, replay
from bench.studies.decode import DecodeCase, forms_on
from model import cuda_graph
from model.step3vl import Step3VL
from pacore_sched.sched.request import Sampling
from pacore_sched.sim.workload import Workload

SETUPS = (packing.Setup("one-at-a-time", 8), packing.Setup("later-round-first", 8))


@pytest.fixture(scope="module")
def tiny() -> Step3VL:
    return Step3VL.from_preset("tiny", seed=1)


def test_packing(tiny: Step3VL):
    """The same rollouts under every setup, and fewer steps when problems run together."""
    questions = ("One?", "Two?", "Three?")
    greedy = Sampling(max_tokens=30, temperature=0.0)  # siblings agree, so drafts are accepted
    setups = (*SETUPS, packing.Setup("later-round-first", 8, speculate=8))
    alone, together, drafted = packing.compare(
        tiny, setups, questions=questions, widths=(2,), sampling=greedy
    )
    assert drafted["same_texts"] == 1
    assert 0 < drafted["accepted"] <= drafted["drafted"] > together["drafted"] == 0
    assert drafted["steps"] < together["steps"]
    assert alone["same_texts"] == together["same_texts"] == 1
    assert alone["steps"] > 1.8 * together["steps"]
    assert alone["tokens_per_step"] < 2 < together["tokens_per_step"]
    assert alone["prefilled"] == together["prefilled"] > 0
    for row in (alone, together):
        assert 0 < row["tta_mean_s"] <= row["makespan_s"]
    show.packing([alone, together, drafted])


def test_replay(tiny: Step3VL):
    """Engine and simulator take the same steps under every policy: they share the scheduler. The
    cost model is fitted to other problems than those that it is judged on."""
    judged = Workload("judged", 3, (3,), 12, (), 20, max_tokens=30)
    fitted = [(Workload("fitted", 2, (4,), 8, (), 30, max_tokens=20), SETUPS[1])]
    rows = replay.validate(tiny, judged, fitted, SETUPS)
    for row in rows:
        assert row["steps"] == row["steps_simulated"] > 0
        assert row["makespan_simulated_s"] > row["tta_mean_simulated_s"] > 0
        assert row["makespan_error"] == pytest.approx(
            row["makespan_simulated_s"] / row["makespan_s"] - 1
        )
    assert rows[0]["steps"] > rows[1]["steps"]
    show.replay(rows)


def test_replay_of_photos(tiny: Step3VL, monkeypatch):
    """Requests that are not all answered, errors of other figures than shown, or a cost model that
    is fitted to the photos that it is judged on."""
    fitted = [(Workload("fitted", 2, (4,), 8, (), 30, max_tokens=20), SETUPS[1])]
    assert replay.PHOTO_SIZE not in replay.FITTED_SIZES
    monkeypatch.setattr(replay, "FITTED_SIZES", ((640, 480), (728, 800)))
    row = replay.validate_photos(tiny, 2, fitted, repeats=1)
    for name in ("makespan", "tta_mean", "ttft_mean"):
        assert row[f"{name}_s"] > 0 and row[f"{name}_simulated_s"] > 0
    assert row["makespan_s"] >= row["tta_mean_s"] >= row["ttft_mean_s"]
    assert row["makespan_simulated_s"] >= row["tta_mean_simulated_s"]
    assert row["ttft_error"] == pytest.approx(row["ttft_mean_simulated_s"] / row["ttft_mean_s"] - 1)
    assert row["steps"] > 0 and row["steps_simulated"] > 0
    show.replay([row])


def test_an_engine_without_its_graphs_says_so(tiny: Step3VL, monkeypatch):
    """Guards the headline: steps that could not be captured must not pass as captured ones, and the
    eager form, which is never captured, must not fail for it."""
    monkeypatch.setattr(cuda_graph, "_failures", ["failed capture: no memory"])
    eager, default = engine.time_engine(tiny, DecodeCase(2, 70, 3), steps=2, blocks=1)
    assert eager["failure"] is None
    assert default["failure"] == "failed capture: no memory" and default["median_us"]


def test_engine_steps(tiny: Step3VL):
    """Guards what is timed, a full batch: every step gives each rollout a token, every byte that it
    must move is counted, and all forms generate the same."""
    case = DecodeCase(4, 70, 3)
    rows = engine.time_engine(tiny, case, steps=4, blocks=2, names=forms_on("cuda"))
    assert [row["impl"] for row in rows] == ["eager", "default", "default, FP8 KV"]
    first, last = case.suffix + engine.SETTLE, case.suffix + 2 * (engine.SETTLE + 4)
    min_bytes, max_bytes = (
        DecodeCase(4, 70, suffix).bytes(tiny.config.decoder, torch.float32)
        for suffix in (first, last)
    )
    for row in rows[:2]:
        assert min_bytes < row["bytes"] < max_bytes
        assert row["same_tokens"] == 1
        assert row["failure"] is None
        assert row["max_err"] < 1e-4
        assert row["repeats"] == 8
        assert row["padding_pct"] == row["idle_pct"] == 0
        assert row["host_us"] > 0
        assert row["graphs"] is False
    assert rows[1]["max_err"] > 0  # two forms are compared, not one with itself
    assert rows[2]["max_err"] > rows[1]["max_err"]
    assert rows[2]["bytes"] < rows[1]["bytes"]
    show.engine_steps(rows)
