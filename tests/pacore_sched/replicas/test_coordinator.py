"""Replicas in this process, on a fake model whose tokens are hashes: whatever moves, is lost or is
slow, every problem gets the answer that one engine gives."""

import random
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from threading import Event

import pytest

from model.errors import InputError
from pacore_sched.answers.journal_lines import RolloutResult
from pacore_sched.answers.live import Answer, Round
from pacore_sched.answers.pacore import Pacore
from pacore_sched.answers.problem_run import Part
from pacore_sched.replicas.coordinator import Coordinator
from pacore_sched.replicas.messages import Key, Orders, Task
from pacore_sched.replicas.replica import Replica, ReplicaError
from pacore_sched.sched.queue_load import QueueLoad
from pacore_sched.sched.request import Batch
from pacore_sched.sim.replica_state import ReplicaState
from pacore_sched.sim.tail_moves import Move, TailMoves
from tests.pacore_sched.answers.hashed_pacore import by_problem, hashed, is_idle, questions

WIDTHS = (6, 2)


class RandomMoves(TailMoves):
    """Moves some rollouts anywhere, back and forth."""

    def __init__(self, draw: random.Random, share: float) -> None:
        super().__init__()
        self._draw, self._share = draw, share

    def moves(self, states: Mapping[int, ReplicaState]) -> list[Move]:
        return [
            Move(source, target, group.problem, group.round, (rollout.number,))
            for source, state in states.items()
            for group in state.groups
            for rollout in group.rollouts
            if self._draw.random() < self._share
            and (target := self._draw.choice(sorted(states))) != source
        ]


@dataclass
class Pool:
    """Plays Ray: replicas that report after one step, in a random order, and may be lost.

    `slow` replicas report only in one of ten turns.
    """

    replicas: int
    moves: float = 0.1  # how often a rollout moves
    seed: int = 0
    slow: tuple[int, ...] = ()
    kills: int = 0
    poison: int = -1  # a problem whose steps fail
    options: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.results: dict[str, dict[tuple[int, int], RolloutResult]] = {}
        self.again = Counter()  # results that came twice
        self.answers: list[Answer] = []
        self.pacores: dict[int, Pacore] = {}
        self.running: dict[int, Replica] = {}
        self.homes = Counter()  # tasks per replica
        self.moved: list[Task] = []
        self.failures = 0

    def run(self, count: int) -> dict[str, Answer]:
        draw = random.Random(self.seed)
        self.coordinator = coordinator = Coordinator(
            self.tasks(count),
            count,
            known=lambda id: sorted(self.results.get(id, {}).values(), key=place),
            on_result=self.on_result,
            on_answer=self.answers.append,
            moves=RandomMoves(draw, self.moves) if self.moves else None,
        )
        for number in range(self.replicas):
            self.start(number)
        calls: dict[int, Orders] = {}
        kills, turns = self.kills, 0
        while not coordinator.done:
            turns += 1
            assert turns < 20_000, "no progress"
            for number, orders in coordinator.calls():
                assert number not in calls
                calls[number] = replace(orders, seconds=0.0)
                self.count(number, orders)
            assert calls
            number = draw.choice(sorted(calls))
            if number in self.slow and draw.random() < 0.9:
                continue
            orders = calls.pop(number)
            if kills and draw.random() < 0.05:
                kills -= 1
                coordinator.lose(number)
                self.start(number)
                continue
            try:
                report = self.running[number].advance(orders)
            except ReplicaError as error:
                self.failures += 1
                coordinator.lose(number, str(error))
                self.start(number)
                continue
            coordinator.take(number, report)
        assert not kills
        for number in list(calls):
            coordinator.take(number, self.running[number].advance(calls.pop(number)))
        for number, orders in coordinator.calls():  # cancelled parts
            self.running[number].advance(orders)
        assert all(is_idle(pacore.engine) for pacore in self.pacores.values())
        assert len(self.answers) == count
        return by_problem(map(self.whole, self.answers))

    def start(self, number: int) -> None:
        self.pacores[number] = hashed(WIDTHS, **self.options)
        self.running[number] = Replica(self.pacores[number])
        executor = self.pacores[number].engine.executor
        launch = executor.launch

        def launch_unless_poisoned(tree: object, batch: Batch) -> object:
            if any(r.group.problem == self.poison and len(r.tokens) > 5 for r in batch.decode):
                raise MemoryError("out of memory")
            return launch(tree, batch)

        executor.launch = launch_unless_poisoned
        self.coordinator.add(number)

    def tasks(self, count: int) -> Iterator[Task]:
        for number, problem in enumerate(questions(count)):
            yield Task(Key(number), problem.id, problem.messages)

    def count(self, number: int, orders: Orders) -> None:
        for task in orders.tasks:
            if task.part:
                self.moved.append(task)
            else:
                self.homes[number] += 1

    def on_result(self, result: RolloutResult) -> None:
        known = self.results.setdefault(result.problem, {})
        if place(result) in known:
            self.again[result.problem, place(result)] += 1
            assert replace(known[place(result)], logprobs=()) == replace(result, logprobs=())
        known[place(result)] = result

    def whole(self, answer: Answer) -> Answer:
        """An answer with its rounds, from the results."""
        results = sorted(self.results.get(answer.problem, {}).values(), key=place)
        numbers = dict.fromkeys(result.round for result in results)
        rounds = [Round.of([r for r in results if r.round == number]) for number in numbers]
        return replace(answer, rounds=tuple(rounds))


def place(result: RolloutResult) -> tuple[int, int]:
    return result.round, result.index


def alone(count: int) -> dict[str, Answer]:
    """The answers that one engine gives."""
    return by_problem(hashed(WIDTHS).answers(questions(count)))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("replicas", [1, 2, 5])
def test_answers_are_those_of_one_engine(replicas: int, seed: int) -> None:
    pool = Pool(replicas, seed=seed)
    assert pool.run(12) == alone(12)
    assert not pool.again
    engines = [pacore.engine for pacore in pool.pacores.values()]
    totals, started = pool.coordinator.totals, sum(e.scheduler.counts.started for e in engines)
    assert totals.engine.generated == sum(engine.stats.generated for engine in engines) > 0
    assert totals.scheduler.started == started


@pytest.mark.parametrize("seed", range(30))
def test_lost_replicas(seed: int) -> None:
    """Nothing is lost or doubled, and only unfinished rollouts run again."""
    pool = Pool(3, seed=seed, kills=4)
    assert pool.run(12) == alone(12)
    assert not pool.again


def test_rollouts_move_to_idle_replicas() -> None:
    pool = Pool(4, options={"max_running": 2})
    assert pool.run(2) == alone(2)
    assert pool.moved and pool.coordinator.moved == sum(
        len(task.part.rollouts) for task in pool.moved if task.part
    )
    still = Pool(4, moves=0, options={"max_running": 2})
    assert still.run(2) == alone(2) and not still.moved


@pytest.mark.parametrize("seed", range(30))
def test_moves_and_losses_together(seed: int) -> None:
    pool = Pool(4, seed=seed, kills=3, options={"max_running": 2})
    assert pool.run(3) == alone(3)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("replicas", [1, 2, 4])
@pytest.mark.parametrize("moves", [0, 0.1])
def test_a_problem_whose_steps_fail(moves: float, replicas: int, seed: int) -> None:
    """It ends three replicas, the last one alone, or one more where its rollouts have moved to; no
    other problem fails."""
    pool = Pool(replicas, moves, seed, poison=7)
    answers, expected = pool.run(12), alone(12)
    error = answers.pop("p7").error
    assert error and "it fails even alone" in error and "out of memory" in error
    del expected["p7"]
    assert answers == expected and not pool.again
    assert pool.failures == 3 or (moves and pool.failures > 3)


def test_slow_replicas_get_fewer_problems() -> None:
    pool = Pool(3, slow=(1,), options={"max_running": 6})
    assert pool.run(40) == alone(40)
    assert pool.homes[1] < min(pool.homes[0], pool.homes[2]) / 2


@pytest.mark.parametrize("kills", [0, 2])
@pytest.mark.parametrize("seed", range(10))
def test_rounds_that_need_not_wait(seed: int, kills: int) -> None:
    """With min_messages, a round ends although rollouts are elsewhere; they are cancelled, and none
    of their messages is known that the next round has not read."""
    pool = Pool(4, seed=seed, kills=kills, options={"max_running": 2, "min_messages": 3})
    answers = pool.run(3)
    again = hashed(WIDTHS, min_messages=3).answers(
        questions(3),
        known=lambda id: pool.results[id].values(),
        on_rollout=lambda result: pytest.fail(f"{result} is missing"),
    )
    assert {a.problem: a.text for a in again} == {id: a.text for id, a in answers.items()}
    for answer in answers.values():
        assert not answer.error
        for round_, width, need in zip(answer.rounds, (6, 2, 1), (3, 2, 1), strict=True):
            ended = [r for r in round_.rollouts if r.finish_reason != "cancelled"]
            assert need <= len(ended) <= width


def test_parts_share_their_prompts_kv() -> None:
    """Two rollouts that come one after the other: the prompt is prefilled once."""
    home, away = Replica(hashed(WIDTHS)), Replica(pacore := hashed(WIDTHS))
    task = Task(Key(0), "p", [{"role": "user", "content": "?"}])
    home.advance(Orders([task], seconds=0.0))
    prefilled = []
    for number, index in enumerate((2, 4), start=1):
        ((_, _, partials),) = home.advance(Orders(detach=[(0, 0, [index])])).detached
        part = replace(task, key=Key(0, number), part=Part(0, partials))
        away.advance(Orders([part], seconds=0.0))
        away.advance(Orders(seconds=0.0))
        prefilled.append(pacore.engine.scheduler.counts.prefilled)
    assert prefilled[0] == prefilled[1] > 0
    report = away.advance(Orders(seconds=10.0))
    assert {result.index for _, result in report.results} == {2, 4}


def test_a_replica_reports_as_soon_as_it_takes_another_problem() -> None:
    """If it must not take one that would wait, when a rollout has ended."""
    tasks = [Task(Key(n), f"p{n}", [{"role": "user", "content": f"{n}?"}]) for n in range(2)]
    ahead = Replica(hashed((2, 1), max_running=2))
    first = ahead.advance(Orders(tasks[:1], more=True, ahead=True, seconds=60.0))
    assert first.load == QueueLoad(waits=False, full=True) and not first.results
    full = Replica(hashed((2, 1), max_running=2))
    first = full.advance(Orders(tasks[:1], more=True, seconds=60.0))
    assert first.load == QueueLoad(waits=False, full=False) and first.results


def test_a_problem_whose_image_is_being_read_waits() -> None:
    class Blocked:
        read = Event()

        def views(self, vision: object) -> None:
            self.read.wait(60)
            raise InputError("no image")

    replica = Replica(hashed((1,)))
    task = Task(Key(0), "p", [{"role": "user", "content": "?"}])
    content = [{"type": "image"}, {"type": "text", "text": "?"}]
    photo = Task(Key(1), "photo", [{"role": "user", "content": content}], [Blocked()])
    replica.advance(Orders([task, photo], seconds=0.0))
    report = replica.advance(Orders(seconds=0.0))  # by now the other problem has started
    assert report.load.waits and not report.answers
    Blocked.read.set()
    report = replica.advance(Orders(seconds=60.0))
    assert {answer.problem: answer.error for _, answer in report.answers} == {
        "p": None,
        "photo": "no image",
    }


def test_a_failing_step_says_why() -> None:
    pacore = hashed(WIDTHS)
    replica = Replica(pacore)

    def fail(*_: object) -> None:
        raise MemoryError("out of memory")

    pacore.engine.executor.launch = fail
    task = Task(Key(0), "p", [{"role": "user", "content": "?"}])
    with pytest.raises(ReplicaError, match="out of memory.*% of the KV pages in use, .* GB"):
        replica.advance(Orders([task], seconds=1.0))
