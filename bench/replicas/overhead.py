"""The coordinator's own time: `python -m bench replicas overhead`.

Played replicas answer at once, in turn, without Ray: each holds a few problems, whose rollouts grow
by some tokens from report to report until they have the lengths that were drawn for them. With
moves, the reports have the replicas' states once no problem waits, and rollouts move. Only the
coordinator's time counts, with its totals after every report, as the progress bar reads them.
"""

import random
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache

import torch

from bench.measure.origin import origin
from model.config import STEP3_VL_10B
from model.terminal import track
from pacore_sched.answers.journal_lines import RolloutResult
from pacore_sched.answers.live import Answer
from pacore_sched.replicas.coordinator import Coordinator
from pacore_sched.replicas.messages import Key, Orders, Report, Task
from pacore_sched.sched.queue_load import QueueLoad
from pacore_sched.sched.request import Partial
from pacore_sched.sim.cost_model import RooflineCost, StepWork
from pacore_sched.sim.machine import MACHINES
from pacore_sched.sim.replica_state import GroupState, ReplicaState, RolloutState
from pacore_sched.sim.tail_moves import TailMoves

REPLICAS = (1, 16, 128, 1024)
PER_REPLICA = 8  # problems
WIDTH, MAX_RUNNING = 16, 64
PROMPT, MEAN_TOKENS, SIGMA, MAX_TOKENS = 1000, 12_000, 0.6, 65_536
GROWTH = 1_000  # tokens of a rollout between two reports
COST = RooflineCost(StepWork(STEP3_VL_10B.decoder), MACHINES["h200"])
NUM_PAGES, PAGE_SIZE = 10_000, 64


@dataclass
class Held:
    """A task on a played replica: its unfinished rollouts, by index, and their tokens."""

    task: Task
    rollouts: dict[int, int]
    away: set[int] = field(default_factory=set)  # on other replicas


class PlayedReplica:
    """Answers orders at once. Problems have one round."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._held: dict[Key, Held] = {}

    def advance(self, orders: Orders) -> Report:
        report = Report()
        for key in orders.cancel:
            self._held.pop(key, None)
        for task in orders.tasks:
            part = task.part.rollouts if task.part else dict.fromkeys(range(WIDTH), Partial())
            tokens = {index: len(partial.tokens) for index, partial in part.items()}
            self._held[task.key] = Held(task, tokens)
        for problem, result in orders.ended:
            self._held[Key(problem)].away.discard(result.index)
            report.results.append((Key(problem), result))
        for problem, _, indices in orders.detach:
            self._detach(problem, indices, report)
        self._grow(report)
        for key, held in list(self._held.items()):
            if not held.rollouts and not held.away:
                del self._held[key]
                report.answers.append((key, Answer(held.task.id, "", None, ())))
        report.busy = bool(self._held)
        rollouts = sum(len(held.rollouts) for held in self._held.values())
        report.load = QueueLoad(rollouts > MAX_RUNNING, rollouts >= MAX_RUNNING)
        if not orders.more:
            report.state, report.measured = self._state(), True
        return report

    def _detach(self, problem: int, indices: Sequence[int], report: Report) -> None:
        for key, held in self._held.items():
            if key.problem == problem:
                left = [index for index in indices if index in held.rollouts]
                partials = {i: Partial((0,) * held.rollouts.pop(i)) for i in left}
                if not key.part:
                    held.away |= partials.keys()
                if partials:
                    report.detached.append((key, 0, partials))

    def _grow(self, report: Report) -> None:
        running = 0
        for key, held in self._held.items():
            for index, tokens in list(held.rollouts.items()):
                running += 1
                if running > MAX_RUNNING:
                    return
                length = rollout_tokens(self._seed, key.problem, index)
                held.rollouts[index] = min(tokens + GROWTH, length)
                if held.rollouts[index] == length:
                    del held.rollouts[index]
                    report.results.append((key, _result(held.task.id, index, length)))

    def _state(self) -> ReplicaState:
        groups, running = [], 0
        for key, held in self._held.items():
            rollouts = []
            for index, tokens in held.rollouts.items():
                running += 1
                rollouts.append(RolloutState(index, tokens, running > MAX_RUNNING))
            if rollouts:
                groups.append(GroupState(key.problem, 0, PROMPT, MAX_TOKENS, tuple(rollouts)))
        state = ReplicaState(tuple(groups), NUM_PAGES, PAGE_SIZE, MAX_RUNNING, COST)
        _ = state.load  # as a replica does before it sends the state
        return state


@cache
def rollout_tokens(seed: int, problem: int, index: int) -> int:
    """A rollout's length."""
    draw = random.Random((seed * 1_000_003 + problem) * 1009 + index)
    return min(MAX_TOKENS, 1 + int(MEAN_TOKENS * draw.lognormvariate(0, SIGMA)))


def _result(problem: str, index: int, tokens: int) -> RolloutResult:
    return RolloutResult(
        problem=problem,
        round=0,
        index=index,
        seed=index,
        prompt_tokens=PROMPT,
        finish_reason="stop",
        text="",
        num_tokens=tokens,
        logprob=0.0,
    )


@dataclass
class Cost:
    """What a run has taken: the coordinator's seconds, and how often it was called."""

    problems: int
    seconds: float = 0.0
    reports: int = 0
    results: int = 0
    answers: int = 0
    moved: int = 0


def run(seed: int, replicas: Sequence[int] = REPLICAS, *, migrate: bool) -> Iterator[dict]:
    """Rows per number of replicas, without and with moves."""
    forms = [False, True] if migrate else [False]
    for count in track(replicas, "overhead"):
        for moves in forms:
            yield row(count, moves, play(count, seed, TailMoves() if moves else None))


def play(replicas: int, seed: int, moves: TailMoves | None) -> Cost:
    """Run problems on played replicas."""
    cost = Cost(replicas * PER_REPLICA)
    known: dict[str, list[RolloutResult]] = {}
    played = [PlayedReplica(seed) for _ in range(replicas)]

    def on_result(result: RolloutResult) -> None:
        known.setdefault(result.problem, []).append(result)
        cost.results += 1

    def on_answer(answer: Answer) -> None:
        cost.answers += 1

    coordinator = Coordinator(
        [Task(Key(n), str(n), []) for n in range(cost.problems)],
        cost.problems,
        known=lambda id: known.get(id, ()),
        on_result=on_result,
        on_answer=on_answer,
        moves=moves,
    )
    for number in range(replicas):
        coordinator.add(number)
    pending: deque[tuple[int, Orders]] = deque()
    while not coordinator.done:
        start = time.perf_counter()
        pending.extend(coordinator.calls())
        cost.seconds += time.perf_counter() - start
        number, orders = pending.popleft()
        report = played[number].advance(orders)
        start = time.perf_counter()
        coordinator.take(number, report)
        _ = coordinator.totals, coordinator.kv_used
        cost.seconds += time.perf_counter() - start
        cost.reports += 1
    cost.moved = coordinator.moved
    return cost


def row(replicas: int, moves: bool, cost: Cost) -> dict:
    """The row of a run. Its failure says what the coordinator has lost."""
    rollouts = cost.problems * WIDTH
    whole = (cost.results, cost.answers) == (rollouts, cost.problems)
    return {
        "op": "replica_overhead",
        "case": f"{replicas} replicas, {cost.problems} x [{WIDTH}]",
        "impl": "with moves" if moves else "without moves",
        "dtype": "none",
        "per_problem_us": 1e6 * cost.seconds / cost.problems,
        "per_report_us": 1e6 * cost.seconds / cost.reports,
        "reports": cost.reports,
        "moved": cost.moved,
        "failure": None
        if whole
        else f"{cost.results} of {rollouts} rollouts, {cost.answers} of {cost.problems} answers",
        **origin(torch.device("cpu")),
    }
