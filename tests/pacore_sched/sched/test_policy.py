"""What each policy promises: whose turn it is, what it admits, whom it preempts."""

from itertools import pairwise

import pytest

from pacore_sched.sched.policy import KNOW_LENGTHS, POLICIES, Fcfs, LaterRoundFirst, Predicted, peak
from pacore_sched.sched.request import Group, Rollout, Segment
from pacore_sched.sched.scheduler import Scheduler
from tests.pacore_sched.sched.test_scheduler import PAGE, Trace, group_of, policy_named


def scheduler_of(policy: LaterRoundFirst, pages: int = 1000, **options: int) -> Scheduler:
    return Scheduler(pages, PAGE, policy, **{"max_running": 8, "token_budget": 64} | options)


class Problems(Trace):
    """Problems of two rounds, the second submitted when the first is done, as PaCoRe does."""

    def __init__(self, name: str, problems: list[list[int]], **options: int) -> None:
        self.rounds: list[list[Group]] = []
        lengths: dict[Rollout, int] = {}
        for problem, wanted in enumerate(problems):
            groups = []
            for round_, widths in enumerate((wanted, [3])):
                group, known = group_of(
                    widths, (Segment(5),), problem=problem, round_=round_, slack=9
                )
                groups.append(group)
                lengths |= known
            self.rounds.append(groups)
        super().__init__(scheduler_of(policy_named(name, lengths), **options), lengths)
        self.answered: dict[int, int] = {}  # problem -> step
        self.asked_again: set[int] = set()
        for groups in self.rounds:
            self.scheduler.submit(groups[0])

    def step(self) -> bool:
        went = super().step()
        for problem, (first, second) in enumerate(self.rounds):
            if first.ended == first.need and problem not in self.asked_again:
                self.asked_again.add(problem)
                self.scheduler.submit(second)
            if second.ended == second.need:
                self.answered.setdefault(problem, self.steps)
        return went or bool(self.scheduler.groups)


WORK = [[6, 9, 12, 15, 6, 9, 12, 15]] * 8


def test_later_rounds_answer_sooner():
    """The default's reason to be: the same work, in nearly the same time, answers come sooner."""
    runs = {name: Problems(name, WORK) for name in ("later-round-first", "fcfs")}
    for run in runs.values():
        run.run()
    mean = {name: sum(run.answered.values()) / len(WORK) for name, run in runs.items()}
    assert mean["later-round-first"] * 1.3 < mean["fcfs"]
    assert runs["later-round-first"].steps <= 1.1 * runs["fcfs"].steps


@pytest.mark.parametrize("name, size", [("one-at-a-time", 1), ("barrier", 8)])
def test_barriers(name: str, size: int):
    """No rollout starts while one of an earlier batch, or of the batch's earlier round, is left."""
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


def test_who_preempts():
    """Optimistic policies preempt when memory is short; those that reserve, or know, do not."""
    preemptions = {name: under_pressure(name).scheduler.counts.preemptions for name in POLICIES}
    assert preemptions["reserve-max"] == 0
    assert preemptions["oracle"] == preemptions["oracle-shortest"] == 0
    assert preemptions["later-round-first"] > 0
    assert preemptions["fcfs"] > 0
    assert preemptions["predicted"] <= preemptions["later-round-first"]


def test_reserving_leaves_memory_idle():
    """What reserving max_tokens costs: fewer rollouts at once, and more steps."""
    assert under_pressure("reserve-max").steps > under_pressure("oracle").steps


def rollout_at(group: Group, asked: int) -> Rollout:
    rollout = Rollout(group, 0, 0, 100)
    rollout.asked = asked
    return rollout


def test_victims():
    """Later round first gives up the last group's least progress; FCFS who started last."""
    early, late = (group_of([9] * 3, problem=problem)[0] for problem in (0, 1))
    running = {
        rollout_at(group, asked): None for group, asked in ((late, 9), (late, 5), (early, 2))
    }
    assert LaterRoundFirst().victim(running).asked == 5
    assert Fcfs().victim(running).asked == 2
    assert POLICIES["sglang"]().victim(running).asked == 2


def test_synthesis_is_not_a_victim_while_others_are():
    """A later round's rollout goes last among the victims, however little it has done."""
    explore, synthesis = (group_of([9], problem=0, round_=round_)[0] for round_ in (0, 1))
    running = {rollout_at(synthesis, 1): None, rollout_at(explore, 90): None}
    assert LaterRoundFirst().victim(running).asked == 90


def test_peak():
    """The most tokens held at once, against counting step by step."""
    for left in ([(3, 10)], [(5, 1), (2, 7), (9, 0)], [(4, 4)] * 3, [(0, 6), (8, 1)], []):
        held = [
            sum(now + step for come, now in left if step <= come)
            for step in range(max((come for come, _ in left), default=0) + 1)
        ]
        assert peak(left) == (max(held) if left else 0)


def test_prediction_learns_from_siblings():
    """Expected lengths: nothing known, then the siblings', then those that were longer still."""
    policy = Predicted()
    group, _ = group_of([10, 20, 30, 40, 50, 60])
    new = rollout_at(group, 4)
    assert policy.expected(new) == 4
    for length in (10, 20, 30):
        policy.ended(rollout_at(group, length))
    assert policy.expected(new) == 20
    assert policy.expected(rollout_at(group, 15)) == 15  # two that were longer say nothing
    for length in (40, 50, 300):
        policy.ended(rollout_at(group, length))
    assert policy.expected(rollout_at(group, 25)) == 50
    policy.forget(group)
    other, _ = group_of([1], problem=3)
    assert policy.expected(rollout_at(other, 45)) == 45
    assert policy.expected(rollout_at(other, 0)) == 40  # of all of the round


def test_sglang_ratio():
    """Its guess of what is still to come falls with every step, and is set anew by a retraction."""
    policy = POLICIES["sglang"]()
    scheduler = scheduler_of(policy)
    policy.begin(scheduler)
    assert policy._ratio == pytest.approx(0.7)
    scheduler.steps = 300
    policy.begin(scheduler)
    assert policy._ratio == pytest.approx(0.7 - 0.602 / 2)
    scheduler.steps = 10_000
    policy.begin(scheduler)
    assert policy._ratio == pytest.approx(0.098)
    group, _ = group_of([9])
    policy.victim({rollout_at(group, 10): None, rollout_at(group, 30): None})
    assert policy._ratio == pytest.approx((40 + 2 * 20) / 200)


def test_every_policy_says_what_it_optimises():
    """The table of policies is read by people who choose one."""
    for name, policy in POLICIES.items():
        assert policy.__doc__, name
    assert set(KNOW_LENGTHS) < set(POLICIES)


def test_expected_tokens_left():
    """By hand: what a group generated per rollout that ended, and one of mean length, for each that
    it waits for; and one of mean length for each problem that came before it."""
    policy = POLICIES["shortest-expected"]()
    for length in (30, 49):
        policy.ended(rollout_at(group_of([1])[0], length))
    mean = (1 + 30 + 49) / (1 + 2)
    group, _ = group_of([10, 20, 30, 40], problem=2)
    assert policy.key(group)[0] == pytest.approx(4 * mean + 2 * mean)
    for rollout, asked in zip(group.rollouts, (10, 20, 7, 0), strict=True):
        rollout.asked = asked
    group.ended = 2
    assert policy.key(group)[0] == pytest.approx(2 * (37 + mean) / 3 + 2 * mean)
    group.need = 3  # of four: one more is waited for
    assert policy.key(group)[0] == pytest.approx((37 + mean) / 3 + 2 * mean)


def test_siblings_tell_who_is_short():
    """Short problems behind long ones are answered sooner than in order of arrival, with memory so
    short that it matters who goes on, and in about as many steps."""
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
    """Short problems that keep coming overtake a long one only so often."""
    policy = POLICIES["shortest-expected"]()
    scheduler = scheduler_of(policy, max_running=4)
    run = Trace(scheduler, {})
    long, lengths = group_of([90] * 8, problem=0)
    scheduler.submit(long)
    run.lengths |= lengths
    came = 0
    while long in scheduler.groups:
        while len(scheduler.groups) < 4:
            came += 1
            group, lengths = group_of([5] * 4, problem=came)
            run.lengths |= lengths
            scheduler.submit(group)
        run.step()
        assert came < 2000, "the long problem waits for ever"
    assert came > 4, "nobody overtook it"


def test_order_changes_while_groups_wait():
    """A group that turned out long lets one behind it go first: the scheduler tells the policy who
    has ended, and asks it anew."""
    policy = POLICIES["shortest-expected"]()
    run = Trace(scheduler_of(policy, max_running=1), {})

    def submit(lengths: list[int]) -> Group:
        group, known = group_of(lengths)
        run.lengths |= known
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
