"""The policy that moves rollouts, on plain states."""

import pickle
import random
from collections.abc import Mapping
from dataclasses import replace
from heapq import nlargest

import pytest

from pacore_sched.sched.policy import LaterRoundFirst
from pacore_sched.sched.request import Group, Rollout, Sampling, Segment
from pacore_sched.sched.scheduler import Scheduler
from pacore_sched.sim.cluster import Setting
from pacore_sched.sim.replica_state import (
    GroupState,
    Load,
    ReplicaState,
    RolloutState,
    replica_state,
)
from pacore_sched.sim.tail_moves import MIN_GAIN, SOURCES, LoadRanking, Move, TailMoves

COST = Setting().cost_model()
IDLE = ReplicaState((), 1000, 64, 256, COST)


def group(*tokens: int, waiting: int = 0, problem: int = 0) -> GroupState:
    """Rollouts of these tokens, the last `waiting` of which wait."""
    first = len(tokens) - waiting
    rollouts = (RolloutState(i, count, i >= first) for i, count in enumerate(tokens))
    return GroupState(problem, 0, 200, 65536, tuple(rollouts))


def test_a_loaded_replica_shares_with_idle_ones() -> None:
    """Idle replicas that get too little or too much, or not all the same. With 8, 5 and 5 rollouts
    none would win a tenth by another move."""
    loaded = replace(IDLE, groups=(group(*[8000] * 18),), num_pages=5000)
    for source, targets in ((0, (1, 2)), (2, (0, 1))):
        states = {source: loaded} | dict.fromkeys(targets, replace(IDLE, num_pages=5000))
        moves = TailMoves().moves(states)
        assert {move.source for move in moves} == {source}
        assert sorted((move.target, len(move.indices)) for move in moves) == [
            (target, 5) for target in targets
        ]
        assert len({index for move in moves for index in move.indices}) == 10


def ranked(loads: Mapping[int, Load]) -> tuple[int | None, list[int]]:
    """The best target and sources, by looking at all loads."""
    targets = [replica for replica, load in loads.items() if load.open]
    if not targets:
        return None, []
    target = min(targets, key=lambda replica: (loads[replica].step_s, replica))
    limit = loads[target].step_s / (1 - MIN_GAIN)
    sources = [replica for replica, load in loads.items() if load.waiting or load.step_s > limit]
    rank = {r: (loads[r].waiting > 0, loads[r].step_s, -r) for r in sources}
    return target, nlargest(SOURCES, sources, key=rank.__getitem__)


def test_ranking_of_loads() -> None:
    draw = random.Random(0)

    def state() -> ReplicaState:
        tokens = [draw.choice((100, 9_000)) for _ in range(draw.randrange(8))]
        return replace(IDLE, groups=(group(*tokens),), max_running=draw.choice((4, 9)))

    states = {replica: state() for replica in range(12)}
    ranking, loads = LoadRanking(states), {r: state.load for r, state in states.items()}
    for _ in range(300):
        target, sources = ranked(loads)
        assert ranking.target() == target
        if target is not None:
            assert ranking.sources(target) == sources
        for replica in draw.sample(range(12), 2):
            loads[replica] = state().load
            ranking.replace(replica, loads[replica])


def test_equal_loads_stay() -> None:
    """Moves between replicas with the same work, or of the only rollout of a replica."""
    states = {i: replace(IDLE, groups=(group(8000, 8000, problem=i),)) for i in range(4)}
    assert TailMoves().moves(states) == []
    alone = replace(IDLE, groups=(group(8000),))
    assert TailMoves().moves({0: alone, 1: IDLE}) == []


def test_waiting_rollouts_move_first() -> None:
    """A rollout that waits for pages, while a running one moves and is prefilled."""
    full = replace(IDLE, groups=(group(30_000, 30_000, 3_000, waiting=1),), num_pages=960)
    (move,) = TailMoves().moves({0: full, 1: replace(IDLE, groups=(group(9, problem=1),))})
    assert move[:4] == (0, 1, 0, 0) and move.indices[0] == 2


def test_rollouts_that_start_with_the_next_step_do_not_wait() -> None:
    """A new group that is taken for one that lacks pages, and moved to busy replicas."""
    states = {
        0: replace(IDLE, groups=(group(0, 0, 0, waiting=3),)),
        1: replace(IDLE, groups=(group(50, 50, 50, problem=1),)),
    }
    assert TailMoves().moves(states) == []


def test_the_target_needs_pages_and_slots() -> None:
    """Rollouts that are preempted where they arrive, at once or when they have grown."""
    loaded = replace(IDLE, groups=(group(*[8000] * 6),))
    assert TailMoves().moves({0: loaded, 1: IDLE})
    assert TailMoves().moves({0: loaded, 1: replace(IDLE, num_pages=129)}) == []
    # 8,000 tokens are expected to become 16,000: 250 pages and those of the prompt.
    assert TailMoves().moves({0: loaded, 1: replace(IDLE, num_pages=250)}) == []
    (move,) = TailMoves().moves({0: loaded, 1: replace(IDLE, num_pages=262)})
    assert len(move.indices) == 1
    (move,) = TailMoves().moves({0: loaded, 1: replace(IDLE, max_running=2)})
    assert len(move.indices) == 2


def test_a_rollout_rests_after_a_move() -> None:
    """A rollout that moves on before it has twice the tokens, or that may never move again."""
    tail = TailMoves()
    wide = replace(IDLE, num_pages=10_000)
    (move,) = tail.moves({0: replace(wide, groups=(group(*[20_000] * 6),)), 1: wide})
    assert len(move.indices) > 1

    def again(tokens: int) -> list[Move]:
        here = tuple(RolloutState(index, tokens, False) for index in move.indices)
        state = replace(wide, groups=(group(0)._replace(rollouts=here),))
        return tail.moves({1: state, 2: wide})

    assert again(39_999) == [] and again(40_000)


def test_lengths_of_ended_siblings_count() -> None:
    """A rollout that moves although its ended siblings say that it is about to end."""
    loaded = replace(IDLE, groups=(group(*[8000] * 6),))
    tail = TailMoves()
    for tokens in (8010, 8020, 8020):
        tail.ended(0, 0, tokens)
    assert tail.moves({0: loaded, 1: IDLE}) == []
    tail.forget(0)  # the round's lengths remain
    assert tail.moves({0: loaded, 1: IDLE}) == []
    assert TailMoves().moves({0: loaded, 1: IDLE})


def test_a_prompt_that_is_there_costs_nothing() -> None:
    """A prompt that is charged again where siblings have it: here it alone would cost too much."""
    prompt = 60_000
    near = group(2000, 2000, 2000)._replace(prompt_tokens=prompt, max_tokens=2900)
    sibling = near._replace(rollouts=(RolloutState(7, 2899, False),))
    stranger = sibling._replace(problem=5)
    home = replace(IDLE, groups=(near, group(*[60_000] * 5, problem=3)), num_pages=20_000)

    def moves(there: GroupState) -> list[Move]:
        target = replace(IDLE, groups=(there,), num_pages=5000)
        return [move for move in TailMoves().moves({0: home, 1: target}) if move.problem == 0]

    assert moves(sibling) and not moves(stranger)


def test_replica_state_of_a_scheduler() -> None:
    """Ended rollouts, groups listed twice, waiting rollouts taken for running ones, or a state that
    cannot be sent to another process."""
    scheduler = Scheduler(100, 4, LaterRoundFirst(), max_running=3, token_budget=64)
    home = Group([Segment(9)], 0, Sampling(30), problem=4, round=1, need=4)
    home.rollouts = [Rollout(home, index, 0, 30) for index in range(4)]
    guest = Group(home.path, 0, home.sampling, problem=4, round=1, need=1)
    guest.rollouts = [Rollout(guest, 7, 0, 30)]
    for each in (home, guest):
        scheduler.submit(each)
    for _ in range(3):
        scheduler.schedule()
    scheduler.finish(home.rollouts[0], "stop")
    state = replica_state(scheduler, COST)
    (only,) = state.groups
    assert (only.problem, only.round, only.prompt_tokens, only.max_tokens) == (4, 1, 10, 30)
    assert [(r.number, r.tokens, r.waiting) for r in only.rollouts] == [
        (1, 2, False),
        (2, 2, False),
        (3, 0, True),
        (7, 0, True),
    ]
    assert (state.num_pages, state.page_size, state.max_running) == (100, 4, 3)
    copy = pickle.loads(pickle.dumps(state))
    assert copy.groups == state.groups
    home.rollouts[1].scheduled = 30
    assert [r.number for r in replica_state(scheduler, COST).groups[0].rollouts] == [2, 3, 7]


@pytest.mark.parametrize("states", [{}, {0: IDLE}, {0: IDLE, 1: IDLE}])
def test_nothing_to_move(states: dict[int, ReplicaState]) -> None:
    """A failure without rollouts, or without replicas."""
    assert TailMoves().moves(states) == []


def test_a_move_must_not_delay_others_by_more_than_it_wins() -> None:
    """A long prefill that holds up a hundred short rollouts for the sake of one."""
    source = replace(IDLE, groups=(group(*[60_000] * 8),), num_pages=20_000)
    short = group(*[60] * 100, problem=1)._replace(max_tokens=600)
    busy = replace(IDLE, groups=(short,), num_pages=20_000)
    few = replace(busy, groups=(short._replace(rollouts=short.rollouts[:2]),))
    assert TailMoves().moves({0: source, 1: few})
    assert TailMoves().moves({0: source, 1: busy}) == []
