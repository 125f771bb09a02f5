"""The scheduler's benchmark: that it measures the load that it names."""

import pytest

from bench.studies import sched


@pytest.mark.parametrize("policy", ["later-round-first", "one-at-a-time"])
def test_load_stays_constant(policy: str):
    """The same number of rollouts run and wait at the end as at the start, and none is lost."""
    load = sched._Load(policy, 32, 128, short=False)
    for _ in range(3000):
        load.step()
    scheduler = load.scheduler
    scheduler.check_integrity()
    waiting = sum(len(group.waiting) for group in scheduler.groups)
    assert waiting + len(scheduler.running) >= 160
    assert scheduler.counts.preemptions == 0


def test_short_memory_preempts():
    """In the short-memory cases, some rollout is always being preempted."""
    row = sched.step_cost("fcfs", (64, 128), short=True, steps=1500)
    assert row["preemptions_per_step"] > 0
    assert row["p20_us"] <= row["median_us"] <= row["p80_us"] <= row["p99_us"]
