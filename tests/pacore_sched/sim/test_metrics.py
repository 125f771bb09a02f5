"""Metrics of simulated runs, compared with values computed by hand."""

from array import array
from dataclasses import replace
from math import inf

import numpy as np
import pytest

from pacore_sched.sim.calibration import FittedCost
from pacore_sched.sim.cluster import Setting, SimResult, simulate
from pacore_sched.sim.cost_model import StepWork
from pacore_sched.sim.executor import Usage
from pacore_sched.sim.machine import MACHINES
from pacore_sched.sim.metrics import metrics_row, timeline, times_to_answer
from pacore_sched.sim.simulator import Record
from pacore_sched.sim.workload import SimProblem, find_workload

NAMES = [
    "workload",
    "policy",
    "seed",
    "makespan_s",
    "used_tok_s",
    "tta_mean_s",
    "tta_p50_s",
    "tta_p95_s",
    "tta_p99_s",
    "slot_occupancy",
    "kv_utilisation",
    "mbu",
    "preemptions",
    "recomputed_tokens",
    "cancelled_tokens",
    "tail_share",
    "gpus",
    "shared_reads",
    "kv_dtype",
    "prefix_hit_tokens",
    "shared_bytes_saved",
    "mfu",
]


def usage(events, moved=0, flops=0):
    """A GPU's usage from (start, end, running, kv) events."""
    columns = [array("d", column) for column in zip(*events, strict=True)]
    return Usage(*columns, bytes=moved, flops=flops)


def result():
    """Two problems on two GPUs: arrivals at 4 and 8, answers at 14 and 20."""
    records = [
        Record(0, 0, 10, submitted_s=4, first_s=5, ended_s=9.5),
        Record(0, 0, 4, submitted_s=4, first_s=6, ended_s=12),
        Record(0, 0, 50, submitted_s=4, first_s=inf, ended_s=12, cancelled=True),
        Record(0, 1, 1, submitted_s=12, first_s=14, ended_s=14),
        Record(1, 0, 11, submitted_s=10, first_s=10, ended_s=20),
    ]
    return SimResult(
        Setting(
            policy="fcfs", gpus=2, max_running=8, machine=replace(MACHINES["h200"], copy_gb_s=100)
        ),
        [SimProblem(4.0, 0, 1, ((10, 4, 50), (1,))), SimProblem(8.0, 0, 1, ((11,),))],
        records,
        answered_s=[14.0, 20.0],
        usages=[
            usage([(4, 8, 2, 0.5), (8, 14, 1, 0.25)], moved=400e9, flops=10**15),
            usage([(10, 20, 4, 0.8)], moved=400e9),
        ],
        preemptions=3,
        recomputed_tokens=70,
        cancelled_tokens=17,
        prefix_hit_tokens=9,
    )


def test_row_by_hand():
    """A metric that does not follow its definition in the module's docstring."""
    row = metrics_row(result(), "toy", 7, slo_s=11)
    assert set(NAMES) <= row.keys()
    expected = {
        "makespan_s": 16,
        "used_tok_s": (10 + 4 + 1 + 11) / 16,
        "tta_mean_s": 11,
        "tta_p50_s": 11,
        "tta_p99_s": 10 + 0.99 * 2,
        "goodput_per_h": 3600 / 16,
        "ttft_mean_s": (1 + 2 + 2 + 0) / 4,
        "tpot_mean_s": (0.5 + 2 + 1) / 3,
        "barrier_wait_s": 2.5 / 5,
        "slot_occupancy": (8 + 6 + 40) / (2 * 16 * 8),
        "kv_utilisation": (2 + 1.5 + 8) / (2 * 16),
        "mbu": 800 / (2 * 16 * 100),
        "mfu": 1000 / (2 * 16 * 0.7 * 989),
        "preemptions": 3,
        "recomputed_tokens": 70,
        "cancelled_tokens": 17,
        "prefix_hit_tokens": 9,
        "seed": 7,
        "policy": "fcfs",
        "workload": "toy",
    }
    assert {name: row[name] for name in expected} == pytest.approx(expected)
    assert metrics_row(result(), "toy", 7)["goodput_per_h"] is None


def test_tail_share_by_hand():
    """A tail that does not start when a tenth of the rollouts is left, here one of ten."""
    run_result = result()
    run_result.records = [Record(0, 0, 1, 0, 0, ended_s=end) for end in (*range(1, 10), 20)]
    assert metrics_row(run_result, "toy", 0)["tail_share"] == pytest.approx((20 - 9) / 16)


def test_times_to_answer():
    """Times that are not counted from the problem's own arrival."""
    assert times_to_answer(result()).tolist() == [10, 12]


def test_timeline_by_hand():
    """Rollouts that are not summed over GPUs, KV that is not averaged, or idle time left out."""
    ends, running, kv = timeline(result(), 8)
    assert ends.tolist() == [6, 8, 10, 12, 14, 16, 18, 20]
    assert running.tolist() == pytest.approx([2, 2, 1, 5, 5, 4, 4, 4])
    assert kv.tolist() == pytest.approx([0.25, 0.25, 0.125, 0.525, 0.525, 0.4, 0.4, 0.4])


def test_timeline_of_bins_that_cut_events():
    """A wrong integral in the middle of an event, or a failure for a GPU without work."""
    run_result = result()
    run_result.usages = [usage([(5, 20, 3, 1.0)]), Usage()]
    _, running, kv = timeline(run_result, 2)
    assert running.tolist() == pytest.approx([3 * 7 / 8, 3])
    assert kv.tolist() == pytest.approx([0.5 * 7 / 8, 0.5])


def test_timeline_and_row_agree_on_a_real_run():
    """A timeline and a row that disagree on a run with many events."""
    problems = replace(find_workload("vqa"), problems=4).draw(0)
    run = simulate(problems, Setting(gpus=2, max_running=20))
    row = metrics_row(run, "vqa", 0)
    _, running, kv = timeline(run, 37)
    assert row["slot_occupancy"] == pytest.approx(running.mean() / (2 * 20))
    assert row["kv_utilisation"] == pytest.approx(kv.mean())
    assert 0 < row["mbu"] < 0.9 + 1e-9
    tokens = sum(problem.tokens for problem in problems)
    assert row["used_tok_s"] * row["makespan_s"] == pytest.approx(tokens)


def test_a_lone_round_has_the_published_occupancy():
    """A wrong spread of lengths: the mean length in a 16-wide round must be 42 % of the longest, at
    sigma_w 0.55, so a round that runs alone has 42 % occupancy."""
    shares = []
    for problem in replace(find_workload("vqa"), problems=2000, max_tokens=10**9).draw(0):
        lengths = np.array(problem.lengths[0])
        shares.append(lengths.mean() / lengths.max())
    assert np.mean(shares) == pytest.approx(0.42, abs=0.03)


def test_fitted_costs_have_no_ceiling():
    """An MBU of a calibrated CPU, computed with a GPU's bandwidth."""
    run_result = result()
    cost = FittedCost(StepWork(run_result.setting.config.decoder), (1,), (0.1,), 0, 0, 0)
    run_result.setting = replace(run_result.setting, cost=cost)
    row = metrics_row(run_result, "toy", 0)
    assert row["mbu"] is row["mfu"] is None
