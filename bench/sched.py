"""What the scheduler costs per step: `python -m bench sched`.

No model runs: a counter stands for it, and rollouts end at drawn lengths, so that steps come in
their usual mixture (the same batch again, a page turn, an end and a start). Rollouts ended are
replaced by new groups at once: as many run and wait all the time. Timed is what an engine would
call: `schedule`, and `finish` for those that have ended; pages are enough for all, or, in the cases
of short memory, for half of what the running ones grow to, so that some are preempted all the time.
"""

import random
import time
from collections.abc import Iterator, Sequence
from itertools import count
from statistics import fmean, quantiles

import torch

from bench.rows import origin
from bench.show import titled
from model.kv_cache import PAGE_SIZE
from model.terminal import track
from pacore_sched.sched.policy import KNOW_LENGTHS, POLICIES
from pacore_sched.sched.request import Group, Rollout, Sampling, Segment
from pacore_sched.sched.scheduler import Scheduler

WIDTH, PROMPT, LENGTH = 16, 800, 2000  # rollouts of a group; tokens of its prompt, of a rollout
STEPS, WARM_UP = 2000, 500
SIZES = ((64, 256), (256, 1024), (1024, 4096), (4096, 16384))  # running, waiting


def run() -> Iterator[dict]:
    """Rows of all policies at one size, then of the default at others."""
    names = [name for name in POLICIES if name not in KNOW_LENGTHS]
    cases = [(name, SIZES[1], short) for short in (False, True) for name in names]
    cases += [("later-round-first", size, False) for size in SIZES if size != SIZES[1]]
    for case in track(cases, "scheduler"):
        yield step_cost(*case)


def step_cost(policy: str, size: tuple[int, int], short: bool = False, steps: int = STEPS) -> dict:
    """Microseconds per step of a scheduler that has (running, waiting) rollouts."""
    running, waiting = size
    load = _Load(policy, running, waiting, short)
    for _ in range(WARM_UP):
        load.step()
    times = sorted(load.step() for _ in range(steps))
    cut = quantiles(times, n=100)
    return {
        "op": "scheduler_step",
        "case": f"{running} running, {waiting} waiting" + (", short memory" if short else ""),
        "policy": policy,
        "median_us": cut[49],
        "p20_us": cut[19],
        "p80_us": cut[79],
        "p99_us": cut[98],
        "mean_us": fmean(times),
        "per_rollout_us": fmean(times) / running,
        "preemptions_per_step": load.scheduler.counts.preemptions / (steps + WARM_UP),
        "failure": None,
        **origin(torch.device("cpu")),
    }


class _Load:
    """A scheduler that always has the same number of rollouts to do."""

    def __init__(self, policy: str, running: int, waiting: int, short: bool) -> None:
        self._draw, self._problem = random.Random(0), count()
        share = 0.5 if short else 4.0  # of the mean rollout at its end, and of its prompt
        pages = int(running * share * (LENGTH + PROMPT / WIDTH) / PAGE_SIZE) + 64
        self.scheduler = Scheduler(
            pages, PAGE_SIZE, POLICIES[policy](), max_running=running, token_budget=8192
        )
        self._lengths: dict[Rollout, int] = {}
        self._rollouts = running + waiting
        self._refill()

    def step(self) -> float:
        """Microseconds of one step."""
        start = time.perf_counter()
        batch = self.scheduler.schedule()
        middle = time.perf_counter()
        ended = [r for r in batch.sampled if r.asked >= self._lengths[r]]
        again = time.perf_counter()
        for rollout in ended:
            self.scheduler.finish(rollout, "stop")
        end = time.perf_counter()
        for rollout in ended:
            del self._lengths[rollout]
        self._refill()
        return (end - again + middle - start) * 1e6

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


def display(rows: Sequence[dict]) -> None:
    """The rows as a table."""
    header = ("policy", "case", " median us", " p20..p80", " p99", " mean", " mean per rollout")
    header += (" preemptions per step",)
    lines = [
        [
            row["policy"],
            row["case"],
            f"{row['median_us']:.0f}",
            f"{row['p20_us']:.0f}..{row['p80_us']:.0f}",
            f"{row['p99_us']:.0f}",
            f"{row['mean_us']:.0f}",
            f"{row['per_rollout_us']:.3f}",
            f"{row['preemptions_per_step']:.2f}",
        ]
        for row in rows
    ]
    titled("scheduler, microseconds per step", rows, header, lines)
