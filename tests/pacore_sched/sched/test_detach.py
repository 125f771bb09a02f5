"""Rollouts that move between schedulers end as if they had stayed."""

import random

import pytest

from pacore_sched.sched.policy import LaterRoundFirst
from pacore_sched.sched.request import Group, Rollout, Sampling, Segment
from pacore_sched.sched.scheduler import Scheduler

MAX_TOKENS = 30


def scheduler_of(pages: int = 40) -> Scheduler:
    return Scheduler(pages, 4, LaterRoundFirst(), max_running=6, token_budget=16)


def submit(scheduler: Scheduler, scheduled: dict[int, int], need: int | None = None) -> Group:
    """A group of the rollouts `scheduled`: index -> tokens that it already has."""
    group = Group([Segment(9)], 0, Sampling(MAX_TOKENS, ignore_eos=True))
    group.need = len(scheduled) if need is None else need
    group.rollouts = [Rollout(group, index, index, MAX_TOKENS) for index in scheduled]
    for rollout in group.rollouts:
        rollout.scheduled = scheduled[rollout.index]
    scheduler.submit(group)
    return group


def step(scheduler: Scheduler, lengths: dict[int, int]) -> list[Rollout]:
    """One step; returns the rollouts that it ended."""
    batch = scheduler.schedule()
    scheduler.check_integrity()
    ended = []
    for rollout in batch.sampled if batch else ():
        if not rollout.finish_reason and rollout.scheduled == lengths[rollout.index]:
            ended += [rollout, *scheduler.finish(rollout, "stop")]
    return ended


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("pages", [15, 40])  # 15: rollouts are also preempted
def test_moves_change_no_length(seed: int, pages: int) -> None:
    draw = random.Random(seed)
    lengths = {index: draw.randint(1, MAX_TOKENS) for index in range(8)}
    home, away = scheduler_of(pages), scheduler_of(pages)
    group = submit(home, dict.fromkeys(lengths, 0))
    ended: dict[int, int] = {}
    moved = 0
    while len(ended) < len(lengths):
        for rollout in step(home, lengths):
            ended[rollout.index] = rollout.scheduled
        for rollout in step(away, lengths):
            ended[rollout.index] = rollout.scheduled
            assert home.ended_elsewhere(group) == []
        unfinished = [rollout for rollout in group.rollouts if not rollout.finish_reason]
        if unfinished and draw.random() < 0.3:
            rollout = draw.choice(unfinished)
            home.detach(rollout)
            home.check_integrity()
            assert (rollout.finish_reason, rollout.node) == ("moved", -1)
            submit(away, {rollout.index: rollout.scheduled})
            moved += 1
    assert moved and ended == lengths
    for scheduler in (home, away):
        assert not scheduler.groups and scheduler.tree.free_pages == scheduler.tree.num_pages


def test_a_group_waits_for_detached_rollouts() -> None:
    home = scheduler_of()
    group = submit(home, {0: 0, 1: 0, 2: 0}, need=2)
    lengths = {0: 3, 1: 9, 2: 9}
    while not any(rollout.scheduled for rollout in group.rollouts):
        step(home, lengths)
    written = sum(home.tree.length(rollout.node) for rollout in group.rollouts[1:2])
    home.detach(group.rollouts[1])
    assert home.counts.recomputed == written > 0  # its KV is lost
    (first,) = _until_end(home, lengths)
    assert (first.index, group.ended) == (0, 1)
    (cancelled,) = home.ended_elsewhere(group)
    assert (cancelled.index, cancelled.finish_reason) == (2, "cancelled")
    assert group not in home.groups and home.ended_elsewhere(group) == []


def test_a_group_whose_rollouts_have_all_moved_keeps_its_prompt() -> None:
    home = scheduler_of()
    group = submit(home, {0: 0})
    step(home, {0: 9})
    step(home, {0: 9})
    home.detach(group.rollouts[0])
    assert home.schedule() is None and group in home.groups
    home.check_integrity()
    assert home.tree.free_pages < home.tree.num_pages
    assert home.ended_elsewhere(group) == [] and group not in home.groups
    assert home.tree.free_pages == home.tree.num_pages


def _until_end(scheduler: Scheduler, lengths: dict[int, int]) -> list[Rollout]:
    while True:
        if ended := step(scheduler, lengths):
            return ended
