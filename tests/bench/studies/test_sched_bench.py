"""The scheduler's benchmark: that it measures the load it names."""

import pytest

from bench import sched


@pytest.mark.parametrize("policy", ["later-round-first", "one-at-a-time"])
def test_load_stays_constant(policy: str):
    """As many rollouts run and wait at the end as at the start, and none is lost on the way."""
    load = sched._Load(policy, 32, 128, short=False)
    for _ in range(3000):
        load.step()
    scheduler = load.scheduler
    scheduler.check_integrity()
    waiting = sum(len(group.waiting) for group in scheduler.groups)
    assert waiting + len(scheduler.running) >= 160
    assert scheduler.counts.preemptions == 0


def test_short_memory_preempts():
    """The cases of short memory are what they say: some rollout is always giving way."""
    row = sched.step_cost("fcfs", (64, 128), short=True, steps=1500)
    assert row["preemptions_per_step"] > 0
    assert row["p20_us"] <= row["median_us"] <= row["p80_us"] <= row["p99_us"]
