"""Scheduling policies: order, admission and preemption of each."""

from itertools import pairwise

import pytest

from pacore_sched.sched.policy import ORACLES, POLICIES, Fcfs, LaterRoundFirst, Predicted, peak
from pacore_sched.sched.request import Group, Rollout, Segment
from pacore_sched.sched.scheduler import Scheduler
from tests.pacore_sched.sched.test_scheduler import PAGE, Trace, find_policy, group_of


def scheduler_of(policy: LaterRoundFirst, pages: int = 1000, **options: int) -> Scheduler:
    return Scheduler(pages, PAGE, policy, **{"max_running": 8, "token_budget": 64} | options)


class Problems(Trace):
    """Problems of two rounds, the second submitted when the first is done, as in PaCoRe."""

    def __init__(self, name: str, problems: list[list[int]], **options: int) -> None:
        self.rounds: list[list[Group]] = []
        lengths: dict[Rollout, int] = {}
        for problem, exploring in enumerate(problems):
            groups = []
            for round_, round_lengths in enumerate((exploring, [3])):
                group, group_lengths = group_of(
                    round_lengths, (Segment(5),), problem=problem, round_=round_, slack=9
                )
                groups.append(group)
                lengths |= group_lengths
            self.rounds.append(groups)
        super().__init__(scheduler_of(find_policy(name, lengths), **options), lengths)
        self.answered: dict[int, int] = {}  # problem -> step
        self.synthesised: set[int] = set()  # problems whose second round was submitted
        for groups in self.rounds:
            self.scheduler.submit(groups[0])

    def step(self) -> bool:
        progressed = super().step()
        for problem, (first, second) in enumerate(self.rounds):
            if first.ended == first.need and problem not in self.synthesised:
                self.synthesised.add(problem)
                self.scheduler.submit(second)
            if second.ended == second.need:
                self.answered.setdefault(problem, self.steps)
        return progressed or bool(self.scheduler.groups)


WORK = [[6, 9, 12, 15, 6, 9, 12, 15]] * 8


def test_later_rounds_answer_sooner():
    """The default's purpose: with the same work in nearly the same time, answers come sooner than
    FCFS's."""
    runs = {name: Problems(name, WORK) for name in ("later-round-first", "fcfs")}
    for run in runs.values():
        run.run()
    mean = {name: sum(run.answered.values()) / len(WORK) for name, run in runs.items()}
    assert mean["later-round-first"] * 1.3 < mean["fcfs"]
    assert runs["later-round-first"].steps <= 1.1 * runs["fcfs"].steps


@pytest.mark.parametrize("name, size", [("one-at-a-time", 1), ("barrier", 8)])
def test_barriers(name: str, size: int):
    """No rollout starts while one of an earlier batch, or of its own batch's earlier round, is
    unfinished."""
    run = Problems(name, [[2, 7], [3, 3]] * 9, max_running=64)
    run.run()
    stages = [
        {(r.group.problem // size, r.group.round) for r in batch.sampled} for batch in run.batches
    ]
    order = [max(stage) for stage in stages if stage]
    assert all(len(stage) <= 1 for stage in stages)
    assert all(a <= b for a, b in pairwise(order))
    assert len(set(order)) == 2 * -(-18 // size)


def under_pressure(name: str) -> Problems:
    run = Problems(name, [[40, 44, 48, 52]] * 4, pages=60)
    run.run()
    return run


def test_only_optimistic_policies_preempt():
    """Optimistic policies preempt when memory is short; those that reserve or know
    lengths never."""
    preemptions = {name: under_pressure(name).scheduler.counts.preemptions for name in POLICIES}
    assert preemptions["reserve-max"] == 0
    assert preemptions["oracle"] == preemptions["oracle-shortest"] == 0
    assert preemptions["later-round-first"] > 0
    assert preemptions["fcfs"] > 0
    assert preemptions["predicted"] <= preemptions["later-round-first"]


def test_reserving_leaves_memory_idle():
    """The cost of reserving max_tokens: fewer rollouts at the same time, and more steps."""
    assert under_pressure("reserve-max").steps > under_pressure("oracle").steps


def rollout_at(group: Group, scheduled: int) -> Rollout:
    rollout = Rollout(group, 0, 0, 100)
    rollout.scheduled = scheduled
    return rollout


def test_victims():
    """Later round first preempts the last group's least progress; FCFS the rollout that started
    last."""
    early, late = (group_of([9] * 3, problem=problem)[0] for problem in (0, 1))
    running = {
        rollout_at(group, scheduled): None
        for group, scheduled in ((late, 9), (late, 5), (early, 2))
    }
    assert LaterRoundFirst().victim(running).scheduled == 5
    assert Fcfs().victim(running).scheduled == 2
    assert POLICIES["sglang"]().victim(running).scheduled == 2


def test_synthesis_is_preempted_last():
    """A later round's rollout is preempted last, however few tokens it has."""
    explore, synthesis = (group_of([9], problem=0, round_=round_)[0] for round_ in (0, 1))
    running = {rollout_at(synthesis, 1): None, rollout_at(explore, 90): None}
    assert LaterRoundFirst().victim(running).scheduled == 90


def test_peak():
    """The most tokens held at the same time, compared with counting step by step."""
    for left in ([(3, 10)], [(5, 1), (2, 7), (9, 0)], [(4, 4)] * 3, [(0, 6), (8, 1)], []):
        held = [
            sum(held_now + step for to_come, held_now in left if step <= to_come)
            for step in range(max((to_come for to_come, _ in left), default=0) + 1)
        ]
        assert peak(left) == (max(held) if left else 0)


def test_prediction_learns_from_siblings():
    """Expected lengths: no prediction at first, then from siblings, then from siblings that were
    longer."""
    policy = Predicted()
    group, _ = group_of([10, 20, 30, 40, 50, 60])
    new = rollout_at(group, 4)
    assert policy.expected_length(new) == 4
    for length in (10, 20, 30):
        policy.ended(rollout_at(group, length))
    assert policy.expected_length(new) == 20
    assert policy.expected_length(rollout_at(group, 15)) == 15  # two longer ones are too few
    for length in (40, 50, 300):
        policy.ended(rollout_at(group, length))
    assert policy.expected_length(rollout_at(group, 25)) == 50
    policy.forget(group)
    other, _ = group_of([1], problem=3)
    assert policy.expected_length(rollout_at(other, 45)) == 45
    assert policy.expected_length(rollout_at(other, 0)) == 40  # from all groups of the round


def test_sglang_ratio():
    """The assumed share of remaining tokens falls with every step, and a retraction resets it."""
    policy = POLICIES["sglang"]()
    scheduler = scheduler_of(policy)
    policy.before_admission(scheduler)
    assert policy._ratio == pytest.approx(0.7)
    scheduler.steps = 300
    policy.before_admission(scheduler)
    assert policy._ratio == pytest.approx(0.7 - 0.602 / 2)
    scheduler.steps = 10_000
    policy.before_admission(scheduler)
    assert policy._ratio == pytest.approx(0.098)
    group, _ = group_of([9])
    policy.victim({rollout_at(group, 10): None, rollout_at(group, 30): None})
    assert policy._ratio == pytest.approx((40 + 2 * 20) / 200)


def test_every_policy_has_a_docstring():
    """Users choose a policy by its docstring."""
    for name, policy in POLICIES.items():
        assert policy.__doc__, name
    assert set(ORACLES) < set(POLICIES)


def test_expected_tokens_left():
    """By hand: tokens per ended rollout (with one of mean length as prior) for each rollout that
    the group waits for, and one mean length for each problem that arrived before it."""
    policy = POLICIES["shortest-expected"]()
    for length in (30, 49):
        policy.ended(rollout_at(group_of([1])[0], length))
    mean = (1 + 30 + 49) / (1 + 2)
    group, _ = group_of([10, 20, 30, 40], problem=2)
    assert policy.key(group)[0] == pytest.approx(4 * mean + 2 * mean)
    for rollout, scheduled in zip(group.rollouts, (10, 20, 7, 0), strict=True):
        rollout.scheduled = scheduled
    group.ended = 2
    assert policy.key(group)[0] == pytest.approx(2 * (37 + mean) / 3 + 2 * mean)
    group.need = 3  # of four: one more must end
    assert policy.key(group)[0] == pytest.approx((37 + mean) / 3 + 2 * mean)


def test_short_problems_overtake_long_ones():
    """With scarce memory, short problems that arrived after long ones are answered sooner than in
    order of arrival, in about as many steps."""
    problems = [[60, 70, 80, 90]] * 3 + [[8, 9, 10, 11]] * 6
    runs = {
        name: Problems(name, problems, pages=60, max_running=16)
        for name in ("shortest-expected", "later-round-first")
    }
    for run in runs.values():
        run.run()
    mean = {name: sum(run.answered.values()) / len(problems) for name, run in runs.items()}
    assert mean["shortest-expected"] * 1.3 < mean["later-round-first"]
    assert runs["shortest-expected"].steps <= 1.1 * runs["later-round-first"].steps


def test_long_problems_do_not_starve():
    """Short problems that keep arriving overtake a long one only a limited number of times."""
    policy = POLICIES["shortest-expected"]()
    scheduler = scheduler_of(policy, max_running=4)
    run = Trace(scheduler, {})
    long, lengths = group_of([90] * 8, problem=0)
    scheduler.submit(long)
    run.lengths |= lengths
    arrived = 0
    while long in scheduler.groups:
        while len(scheduler.groups) < 4:
            arrived += 1
            group, lengths = group_of([5] * 4, problem=arrived)
            run.lengths |= lengths
            scheduler.submit(group)
        run.step()
        assert arrived < 2000, "the long problem starves"
    assert arrived > 4, "no short problem overtook it"


def test_order_changes_while_groups_wait():
    """A group that turns out long lets a later one go first: the scheduler reports ended rollouts
    to the policy, and asks it for new keys."""
    policy = POLICIES["shortest-expected"]()
    run = Trace(scheduler_of(policy, max_running=1), {})

    def submit(lengths: list[int]) -> Group:
        group, group_lengths = group_of(lengths)
        run.lengths |= group_lengths
        run.scheduler.submit(group)
        return group

    submit([30] * 20)
    run.run()
    long, short = submit([200] * 3), submit([5] * 4)
    assert policy.key(short)[0] == pytest.approx(4 * (1 + 20 * 30) / (1 + 20))
    assert policy.key(long) < policy.key(short)
    while not long.ended:
        run.step()
    run.step()
    assert run.batches[-1].sampled[0].group is short
