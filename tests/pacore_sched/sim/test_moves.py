"""Rollouts that move between GPUs: a case by hand, and what no move may change."""

import random
from collections import defaultdict
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.config import TINY
from pacore_sched.sched.policy import POLICIES
from pacore_sched.sim import tail_moves
from pacore_sched.sim.cluster import Cluster, Setting, SimResult, simulate
from pacore_sched.sim.cost_model import StepShape, StepWork
from pacore_sched.sim.metrics import critical_path_s, metrics_row
from pacore_sched.sim.simulator import MovedRollouts, Replica
from pacore_sched.sim.workload import SimProblem


@dataclass(frozen=True)
class RowCost:
    """A second per sampled row and step, and `prefill_s` for every other row."""

    prefill_s: float = 0.1
    work: StepWork = StepWork(TINY.decoder)
    shared_reads: bool = True

    def seconds(self, shape: StepShape, steps: int = 1) -> float:
        sampled = min(shape.rows, shape.sampled)
        return steps * (sampled + self.prefill_s * (shape.rows - sampled))


TOY = Setting(
    gpus=2,
    config=TINY,
    max_running=24,
    token_budget=64,
    page_size=10,
    num_pages=100,
    max_tokens=200,
    cost=RowCost(),
    move_period_s=0,
)


def rollouts(*lengths: int) -> SimProblem:
    return SimProblem(0.0, 0, 1, (lengths,))


def ends(result: SimResult) -> dict[int, float]:
    """Length -> end time."""
    return {record.length: record.ended_s for record in result.records}


def test_a_case_by_hand() -> None:
    """GPU 1 is idle at 20 s. GPU 0 then has two rollouts of 10 tokens, at 2 s for a step of both.
    One of them moves: 1 s for the 10 tokens before its last one, and 1 s for each token to come."""
    work = [rollouts(140, 40), rollouts(20)]
    stay = simulate(work, replace(TOY, migrate=False))
    assert ends(stay) == {20: 20, 40: 80, 140: 180} and stay.moved_rollouts == 0
    moved = simulate(work, TOY)
    assert ends(moved) == {20: 20, 40: 50, 140: 151}
    assert (moved.moved_rollouts, moved.moved_tokens, moved.recomputed_tokens) == (1, 10, 10)
    assert moved.answered_s == [151, 20]
    row = metrics_row(moved, "toy", 0)
    assert (row["migrate"], row["moved_rollouts"], row["moved_tokens"]) == (True, 1, 10)
    assert row["critical_path_s"] == critical_path_s(work, TOY) == 140
    assert metrics_row(stay, "toy", 0)["migrate"] is False


def test_no_move_where_prefill_is_dear() -> None:
    """A move that costs more than it wins: 10 tokens at 20 s, for at most 190 s won."""
    work = [rollouts(140, 40), rollouts(20)]
    setting = replace(TOY, cost=RowCost(prefill_s=20))
    moved, stay = (simulate(work, replace(setting, migrate=on)) for on in (True, False))
    assert moved.moved_rollouts == 0 and moved.records == stay.records


def test_rollouts_spread_before_they_have_started() -> None:
    """Idle GPUs beside a GPU with a whole group: every rollout gets its own, and its prompt."""
    work = [replace(rollouts(100, 110, 120, 130), question_tokens=31)]
    result = simulate(work, replace(TOY, gpus=4))
    assert (result.moved_rollouts, result.moved_tokens) == (3, 0)
    assert ends(result) == pytest.approx({n: 3 + n for n in (100, 110, 120, 130)})


def test_nothing_moves_while_a_problem_waits() -> None:
    """A move at 20 s, although GPU 1 takes the last problem then. It is idle at 50 s, when GPU 0
    has begun steps up to 60 s: a rollout of 30 tokens moves, and has its next one 4 s later."""
    work = [rollouts(140, 40), rollouts(20), replace(rollouts(30), arrival_s=19.5)]
    result = simulate(work, TOY)
    assert ends(result) == {20: 20, 30: 50, 40: 70, 140: 60 + 4 + 109}


def random_problems(seed: int, count: int = 7) -> list[SimProblem]:
    draw = random.Random(seed)

    def lengths(width: int) -> tuple[int, ...]:
        return tuple(draw.randint(1, 200) for _ in range(width))

    return [
        SimProblem(
            number * draw.choice([0.0, 30.0]),
            draw.choice([0, 15]),
            draw.randint(1, 40),
            (lengths(draw.randint(1, 8)), lengths(3), lengths(1)),
            template_tokens=3,
            message_tokens=6,
        )
        for number in range(count)
    ]


class Watch:
    """The moves of a simulation, and the schedulers' integrity after every step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.moves: dict[tuple[int, int, int], list[int]] = defaultdict(list)
        accept, step = Replica.accept, Replica.step

        def watched_accept(replica: Replica, moved: MovedRollouts, photos: tuple) -> None:
            for rollout in moved.records:
                key = moved.group.problem, moved.group.round, rollout.index
                self.moves[key].append(rollout.scheduled)
            accept(replica, moved, photos)

        def watched_step(replica: Replica, until: float) -> bool:
            before = replica.executor.clock
            stepped = step(replica, until)
            replica.scheduler.check_integrity()
            assert replica.executor.clock >= before
            starts, ends = replica.executor.usage.starts, replica.executor.usage.ends
            assert len(starts) < 2 or starts[-1] >= ends[-2]  # no step in its own past
            return stepped

        monkeypatch.setattr(Replica, "accept", watched_accept)
        monkeypatch.setattr(Replica, "step", watched_step)


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    gpus=st.integers(2, 5),
    policy=st.sampled_from(sorted(POLICIES)),
    pages=st.sampled_from([40, 60, 400]),
    need_share=st.sampled_from([1.0, 1.0, 0.6]),
    period=st.sampled_from([0.0, 7.0]),
)
def test_moves_change_no_length(
    seed: int, gpus: int, policy: str, pages: int, need_share: float, period: float
) -> None:
    """A rollout that is lost, ends twice or with another length; pages or rollouts left behind; a
    rollout that moves back and forth."""
    work = random_problems(seed)
    setting = replace(
        TOY, gpus=gpus, policy=policy, num_pages=pages, need_share=need_share, move_period_s=period
    )
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(tail_moves, "MIN_LEFT", 8)
        watch = Watch(monkeypatch)
        result = SimResult(setting, work, answered_s=[0.0] * len(work))
        answers: list[int] = []
        cluster = Cluster(work, setting, result, answers.append)
        cluster.run()
    assert answers == [1] * len(work)
    for replica in cluster.replicas:
        scheduler = replica.scheduler
        assert scheduler.tree.free_pages == pages
        assert not scheduler.groups and not replica.records and not replica.runs
    assert not any(cluster.inboxes)
    actual = sorted((r.problem, r.round, r.length) for r in result.records)
    expected = [
        (number, round, length)
        for number, problem in enumerate(work)
        for round, lengths in enumerate(problem.lengths)
        for length in lengths
    ]
    assert actual == sorted(expected)
    assert need_share < 1 or not any(record.cancelled for record in result.records)
    for number, problem in enumerate(work):
        records = [record for record in result.records if record.problem == number]
        assert result.answered_s[number] == max(record.ended_s for record in records)
        for record in records:
            before = [r.ended_s for r in records if r.round == record.round - 1]
            assert record.submitted_s >= max(before, default=problem.arrival_s)
            assert record.cancelled or record.submitted_s < record.first_s <= record.ended_s
    for tokens in watch.moves.values():
        for first, second in zip(tokens, tokens[1:], strict=False):
            assert second >= max(8, 2 * first)


def test_moves_are_deterministic_and_shorten_the_tail() -> None:
    """Two runs that differ in any bit, or moves that gain nothing where GPUs differ in work."""
    work, setting = random_problems(3, 9), replace(TOY, gpus=4, num_pages=400)
    first, second = (simulate(work, setting) for _ in range(2))
    assert first.moved_rollouts == second.moved_rollouts > 0
    assert first.records == second.records
    stay = simulate(work, replace(setting, migrate=False))
    assert max(first.answered_s) < 0.9 * max(stay.answered_s)


def test_guests_that_are_not_needed_are_cancelled() -> None:
    """A guest that goes on when its round is over."""
    work = [SimProblem(0.0, 0, 1, ((20, 30, 190, 200), (10,)), 3, 6)]
    result = simulate(work, replace(TOY, gpus=4, need_share=0.5))
    cancelled = [record.length for record in result.records if record.cancelled]
    assert sorted(cancelled) == [190, 200] and result.moved_rollouts == 3
    assert result.cancelled_tokens < 2 * 45
    assert max(record.ended_s for record in result.records) < 60


def test_a_rollout_that_is_cancelled_on_its_way_does_not_start() -> None:
    """A guest that no home waits for."""
    work = [rollouts(100, 100)]
    home, away = Cluster(work, TOY, SimResult(TOY, work, answered_s=[0.0]), print).replicas
    home.submit(0, work[0])
    moved = home.detach(0, 0, [0, 1])
    first, _ = moved.records.values()
    first.cancelled = True
    away.accept(moved)
    (group,) = away.scheduler.groups
    assert [rollout.index for rollout in group.rollouts] == [1] and group.need == 1


def test_the_last_problems_wait_in_the_queue() -> None:
    """Both GPUs are full, and one has no more problems than the other's end could take: the third
    and the fourth problem go to GPU 1, whose rollouts end sooner."""
    full = replace(TOY, max_running=2, migrate=False)
    result = simulate([rollouts(190, 180), *[rollouts(20, 10)] * 3], full)
    assert result.answered_s[0] == 180 + 190 and max(result.answered_s[1:]) <= 3 * 30
