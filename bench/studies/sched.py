"""The scheduler's time per step: `python -m bench sched`.

No model runs: a counter replaces it, and rollouts end at random lengths, so that steps have
their usual mixture (an unchanged batch, a new page, an end and a start). New groups replace ended
rollouts at once: the numbers of running and waiting rollouts stay constant. The timed calls are the
engine's: `schedule`, and `finish` for rollouts that have ended. There are enough pages for all; in
the short-memory cases, for half of what the running rollouts grow to, so that some are always being
preempted.
"""

import random
import time
from collections.abc import Iterator
from itertools import count
from statistics import fmean, quantiles

import torch

from bench.measure.origin import origin
from model.kv_cache import PAGE_SIZE
from model.terminal import track
from pacore_sched.sched.policy import ORACLES, POLICIES
from pacore_sched.sched.request import Group, Rollout, Sampling, Segment
from pacore_sched.sched.scheduler import Scheduler

WIDTH, PROMPT, LENGTH = 16, 800, 2000  # rollouts per group; tokens per prompt, per rollout
STEPS, WARM_UP = 2000, 500
SIZES = ((64, 256), (256, 1024), (1024, 4096), (4096, 16384))  # running, waiting


def run() -> Iterator[dict]:
    """Rows of all policies at one size, then of the default policy at other sizes."""
    names = [name for name in POLICIES if name not in ORACLES]
    cases = [(name, SIZES[1], short) for short in (False, True) for name in names]
    cases += [("later-round-first", size, False) for size in SIZES if size != SIZES[1]]
    for case in track(cases, "scheduler"):
        yield step_cost(*case)


def step_cost(policy: str, size: tuple[int, int], short: bool = False, steps: int = STEPS) -> dict:
    """Microseconds per step of a scheduler with (running, waiting) rollouts."""
    running, waiting = size
    load = _Load(policy, running, waiting, short)
    for _ in range(WARM_UP):
        load.step()
    times = sorted(load.step() for _ in range(steps))
    percentiles = quantiles(times, n=100)
    return {
        "op": "scheduler_step",
        "case": f"{running} running, {waiting} waiting" + (", short memory" if short else ""),
        "policy": policy,
        "median_us": percentiles[49],
        "p20_us": percentiles[19],
        "p80_us": percentiles[79],
        "p99_us": percentiles[98],
        "mean_us": fmean(times),
        "per_rollout_us": fmean(times) / running,
        "preemptions_per_step": load.scheduler.counts.preemptions / (steps + WARM_UP),
        "failure": None,
        **origin(torch.device("cpu")),
    }


class _Load:
    """A scheduler with a constant number of rollouts."""

    def __init__(self, policy: str, running: int, waiting: int, short: bool) -> None:
        self._draw, self._problem = random.Random(0), count()
        share = 0.5 if short else 4.0  # of a mean rollout's pages at its end, prompt included
        pages = int(running * share * (LENGTH + PROMPT / WIDTH) / PAGE_SIZE) + 64
        self.scheduler = Scheduler(
            pages, PAGE_SIZE, POLICIES[policy](), max_running=running, token_budget=8192
        )
        self._lengths: dict[Rollout, int] = {}
        self._rollouts = running + waiting
        self._refill()

    def step(self) -> float:
        """Run one step and return its microseconds."""
        start = time.perf_counter()
        batch = self.scheduler.schedule()
        scheduled = time.perf_counter()
        assert batch is not None  # `_refill` leaves something to do
        ended = [r for r in batch.sampled if r.scheduled >= self._lengths[r]]
        finish_start = time.perf_counter()
        for rollout in ended:
            self.scheduler.finish(rollout, "stop")
        end = time.perf_counter()
        for rollout in ended:
            del self._lengths[rollout]
        self._refill()
        return (end - finish_start + scheduled - start) * 1e6

    def _refill(self) -> None:
        while len(self._lengths) < self._rollouts:
            self._submit()

    def _submit(self) -> None:
        group = Group([Segment(PROMPT)], 1, Sampling(), next(self._problem), need=WIDTH)
        for index in range(WIDTH):
            rollout = Rollout(group, index, index, 16 * LENGTH)
            group.rollouts.append(rollout)
            length = self._draw.lognormvariate(0, 0.8) * LENGTH / 1.38  # exp(0.8 ** 2 / 2)
            self._lengths[rollout] = min(max(1, int(length)), rollout.max_tokens)
        self.scheduler.submit(group)
