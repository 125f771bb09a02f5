"""The coordinator's orders, one by one: the reports are written by hand."""

from collections.abc import Iterable, Mapping

import pytest

from model.config import TINY
from pacore_sched.answers.journal_lines import RolloutResult
from pacore_sched.answers.live import Answer
from pacore_sched.replicas.coordinator import Coordinator
from pacore_sched.replicas.messages import Key, Orders, Report, Task
from pacore_sched.sched.queue_load import QueueLoad
from pacore_sched.sched.request import Partial
from pacore_sched.sim.calibration import FittedCost
from pacore_sched.sim.cost_model import StepWork
from pacore_sched.sim.replica_state import GroupState, ReplicaState, RolloutState
from pacore_sched.sim.tail_moves import Move, TailMoves

COST = FittedCost(StepWork(TINY.decoder), (1,), (0.0,), 0.0, 0.0, 0.0)
HOME, GUEST, THIRD = 0, 1, 2
PROBLEM = 0
WAITS, FULL = QueueLoad(waits=True, full=True), QueueLoad(full=True)


class GivenMoves(TailMoves):
    """Makes the moves of a list, one per call; `asked` are the replicas of each call."""

    def __init__(self, moves: Iterable[Move]) -> None:
        super().__init__()
        self._given, self.asked = list(moves), list[set[int]]()

    def moves(self, states: Mapping[int, ReplicaState]) -> list[Move]:
        self.asked.append(set(states))
        return [self._given.pop(0)] if self._given else []


class Cluster:
    """A coordinator and its replicas, which do nothing by themselves."""

    def __init__(self, replicas: int, problems: int, *moves: Move) -> None:
        self.moves, self.answers = GivenMoves(moves), list[Answer]()
        self.coordinator = Coordinator(
            [Task(Key(n), f"p{n}", []) for n in range(problems)],
            problems,
            known=lambda id: (),
            on_result=lambda result: None,
            on_answer=self.answers.append,
            moves=self.moves if moves else None,
        )
        for number in range(replicas):
            self.coordinator.add(number)
        self.called: dict[int, Orders] = {}
        self.orders()

    def orders(self) -> dict[int, Orders]:
        """The orders that are new."""
        new = dict(self.coordinator.calls())
        self.called |= new
        return new

    def fail(self, number: int) -> dict[int, Orders]:
        """A step of a replica fails, and it is started again."""
        del self.called[number]
        self.coordinator.lose(number, "no memory")
        self.coordinator.add(number)
        return self.orders()

    def report(self, number: int, **report) -> dict[int, Orders]:
        """A replica reports, while it has work; returns the orders that follow."""
        del self.called[number]
        self.coordinator.take(number, Report(busy=True, measured=True, **report))
        return self.orders()


def state(*problems: int) -> ReplicaState:
    rollouts = tuple(RolloutState(index, 9, False) for index in range(4))
    groups = tuple(GroupState(problem, 0, 10, 100, rollouts) for problem in problems)
    return ReplicaState(groups, 100, 8, 16, COST)


def result(index: int) -> RolloutResult:
    return RolloutResult(
        problem=f"p{PROBLEM}",
        round=0,
        index=index,
        seed=index,
        prompt_tokens=10,
        finish_reason="stop",
        text="",
        num_tokens=20,
        logprob=0.0,
    )


def moving(replicas: int) -> Cluster:
    """Rollouts 0 and 1 of the problem are ordered to move from its home to the guest."""
    cluster = Cluster(replicas, 1, Move(HOME, GUEST, PROBLEM, 0, (0, 1)))
    cluster.report(HOME, state=state(PROBLEM))
    for number in range(GUEST, replicas):
        cluster.report(number, state=state())
    assert cluster.moves.asked == [{*range(replicas)}]
    ordered = cluster.report(HOME, state=state(PROBLEM))
    assert ordered[HOME].detach == [(PROBLEM, 0, (0, 1))]
    return cluster


def moved(replicas: int) -> Cluster:
    """They have left home; the guest gets them when it has reported."""
    cluster = moving(replicas)
    partials = {0: Partial((5,)), 1: Partial((6,))}
    assert not parts(cluster.report(HOME, detached=[(Key(PROBLEM), 0, partials)]))
    return cluster


def parts(orders: Mapping[int, Orders]) -> list[tuple[int, list[int]]]:
    """(replica, rollouts) of the parts that are sent."""
    return [
        (number, sorted(task.part.rollouts))
        for number, each in orders.items()
        for task in each.tasks
        if task.part
    ]


def test_a_full_replica_leaves_the_last_problems_to_others() -> None:
    cluster = Cluster(2, 5)
    assert {n: [t.key.problem for t in o.tasks] for n, o in cluster.called.items()} == {
        0: [0],
        1: [1],
    }
    assert cluster.called[0].ahead and cluster.called[0].more
    assert cluster.report(0, load=FULL)[0].tasks[0].key.problem == 2  # more problems than replicas
    refused = cluster.report(0, load=FULL)[0]
    assert not refused.tasks and refused.more and not refused.ahead
    assert not cluster.report(1, load=WAITS)[1].tasks
    assert cluster.report(1)[1].tasks[0].key.problem == 3
    last = cluster.report(0)[0]
    assert last.tasks[0].key.problem == 4 and not last.more


def test_what_a_lost_guest_had_ended_does_not_run_again() -> None:
    cluster = moved(3)
    assert parts(cluster.report(GUEST)) == [(GUEST, [0, 1])]
    cluster.report(GUEST, results=[(Key(PROBLEM, 1), result(0))])
    cluster.coordinator.lose(GUEST)
    assert parts(cluster.report(THIRD)) == [(THIRD, [1])]


def test_a_lost_part_whose_round_has_ended_does_not_run_again() -> None:
    cluster = moved(3)
    cluster.report(GUEST)
    cluster.coordinator.lose(GUEST)  # the part waits for a replica
    assert not parts(cluster.report(HOME, overtaken=[(PROBLEM, 0)]))
    assert not parts(cluster.report(THIRD))


def test_a_part_whose_round_ends_before_it_is_sent_is_not_sent() -> None:
    cluster = moved(2)
    cluster.report(HOME, overtaken=[(PROBLEM, 0)])
    orders = cluster.report(GUEST)[GUEST]
    assert not orders.tasks and not orders.cancel


def test_a_part_whose_round_has_ended_is_cancelled() -> None:
    cluster = moved(2)
    cluster.report(GUEST)
    cluster.report(HOME, overtaken=[(PROBLEM, 0)])
    assert cluster.report(GUEST)[GUEST].cancel == [Key(PROBLEM, 1)]


@pytest.mark.parametrize("arrived", [False, True])
def test_no_moves_between_replicas_with_unfinished_moves(arrived: bool) -> None:
    """Their states are of before the move, so the same rollouts would seem to be in two places."""
    cluster = moving(4)
    if arrived:
        cluster.report(HOME, detached=[(Key(PROBLEM), 0, {0: Partial(), 1: Partial()})])
        cluster.report(GUEST, state=state())
    for number in (GUEST, THIRD, 3, THIRD, 3):
        cluster.report(number, state=state())
    last = cluster.moves.asked[-1]
    assert len(cluster.moves.asked) > 1
    assert last == ({GUEST, THIRD, 3} if arrived else {THIRD, 3})


def problems(orders: Orders) -> list[int]:
    return [task.key.problem for task in orders.tasks]


def test_after_two_failures_problems_run_alone() -> None:
    cluster = Cluster(2, 4, Move(0, 1, 1, 0, (0,)))
    assert problems(cluster.report(0)[0]) == [2]
    assert problems(cluster.report(0)[0]) == [3]
    assert problems(cluster.fail(0)[0]) == [0]
    assert problems(cluster.report(0)[0]) == [2]
    assert problems(cluster.report(0)[0]) == [3]
    assert problems(cluster.fail(0)[0]) == [0]
    alone = cluster.report(0)[0]
    assert not alone.tasks and not alone.more
    del cluster.called[1]
    cluster.coordinator.lose(1)  # its problem waits for a replica
    alone = cluster.report(0, state=state(0))[0]
    assert not alone.tasks and not alone.more
    cluster.coordinator.add(1)
    assert problems(cluster.orders()[1]) == [1]
    cluster.report(1, state=state(1))
    assert not cluster.moves.asked  # there is no second replica for moves
    assert problems(cluster.fail(0)[0]) == [2]
    assert [(answer.problem, answer.error) for answer in cluster.answers] == [
        ("p0", "it fails even alone: no memory")
    ]


def test_a_problem_is_not_blamed_for_what_has_not_reached_a_replica() -> None:
    cluster = moved(2)
    cluster.fail(GUEST)
    for failures in range(3):
        assert not cluster.answers, failures
        cluster.fail(HOME)
    assert cluster.answers


def test_a_problem_is_not_blamed_with_others() -> None:
    """Its home has another problem, too, when it fails for the third time."""
    cluster = Cluster(2, 3, Move(HOME, GUEST, PROBLEM, 0, (0, 1)))
    assert problems(cluster.report(HOME)[HOME]) == [2]
    cluster.report(HOME, state=state(PROBLEM, 2))
    cluster.report(GUEST, state=state(1))
    assert cluster.report(HOME, state=state(PROBLEM, 2))[HOME].detach
    cluster.report(HOME, detached=[(Key(PROBLEM), 0, {0: Partial(), 1: Partial()})])
    assert parts(cluster.report(GUEST)) == [(GUEST, [0, 1])]
    for _ in range(2):
        cluster.fail(GUEST)
        cluster.report(GUEST)
    assert problems(cluster.fail(HOME)[HOME]) == [2]
    assert not cluster.answers
    answer = Answer("p2", "", None, ())
    assert problems(cluster.report(HOME, answers=[(Key(2), answer)])[HOME]) == [PROBLEM]
    cluster.coordinator.lose(HOME)  # killed: no step has failed
    assert cluster.answers == [answer]
