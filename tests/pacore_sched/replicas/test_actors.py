"""Replicas as Ray actors on a cluster on this machine: killed ones, failing ones, and the user who
stops the run."""

import os
import signal
from collections.abc import Iterator

import pytest

pytest.importorskip("ray")

from model.errors import InputError
from pacore_sched.answers.live import Answer
from pacore_sched.replicas.actors import Replicas
from pacore_sched.replicas.cluster import connected
from pacore_sched.replicas.coordinator import Coordinator
from pacore_sched.replicas.messages import Key, Task
from tests.pacore_sched.answers.hashed_pacore import by_problem, hashed, questions
from tests.pacore_sched.replicas.actors_support import HashedBuild, describe

pytestmark = pytest.mark.cli


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with connected(None, 2, gpus=0, cpus=0.5):
        yield


class Run:
    """A coordinator whose results are kept."""

    def __init__(self, problems: int) -> None:
        self.results: dict[str, list] = {}
        self.answers: list[Answer] = []
        tasks = [Task(Key(n), p.id, p.messages) for n, p in enumerate(questions(problems))]
        self.coordinator = Coordinator(
            tasks,
            len(tasks),
            known=lambda id: self.results.get(id, []),
            on_result=lambda result: self.results.setdefault(result.problem, []).append(result),
            on_answer=self.answers.append,
        )

    @property
    def ended(self) -> int:
        return sum(map(len, self.results.values()))


@pytest.fixture
def said() -> list[str]:
    """The lines for the user."""
    return []


@pytest.fixture
def start(said: list[str]) -> Iterator:
    started = []

    def start(build: HashedBuild, least: int = 2, most: int = 2) -> Replicas:
        replicas = Replicas(
            build, describe, least=least, most=most, gpus=0, cpus=0.5, say=said.append
        )
        started.append(replicas)
        return replicas

    yield start
    for replicas in started:
        replicas.close()


def test_killed_replicas(start, said: list[str], capfd: pytest.CaptureFixture) -> None:
    """Their problems go on elsewhere: nothing is lost or doubled."""
    replicas, run, killed = start(HashedBuild(step_s=0.01)), Run(12), 0
    for _ in replicas.turns(run.coordinator):
        if killed < 2 and run.ended >= 20 * (killed + 1) and killed in replicas.loaded:
            os.kill(replicas.loaded[killed].pid, signal.SIGKILL)
            killed += 1
    assert killed == 2 and len(said) == 2, said
    assert all("it is started again" in line and "GB at most" in line for line in said)
    assert not capfd.readouterr().out  # where the command's JSON document goes
    assert by_problem(run.answers).keys() == {f"p{n}" for n in range(12)}
    alone = by_problem(hashed((6, 2)).answers(questions(12)))
    for problem, results in run.results.items():
        expected = [r for round_ in alone[problem].rounds for r in round_.rollouts]
        assert sorted(results, key=lambda r: (r.round, r.index)) == expected


def test_replicas_have_the_priority_of_the_command(start) -> None:
    """Ray would run them at nice 15."""
    replicas = start(HashedBuild(), least=1, most=1)
    mine = os.getpriority(os.PRIO_PROCESS, 0)
    assert os.getpriority(os.PRIO_PROCESS, replicas.loaded[0].pid) == mine


def test_a_replica_that_always_fails_is_given_up(start, said: list[str]) -> None:
    """It is reported with its numbers, and not started for ever."""
    replicas, run = start(HashedBuild(failing=range(5)), least=1, most=1), Run(5)
    with pytest.raises(InputError, match="all replicas have ended at least 3 times"):
        for _ in replicas.turns(run.coordinator):
            pass
    assert 3 <= len(said) <= 4 and "given up after" in said[-1]
    assert all("MemoryError: out of memory" in line and "KV pages" in line for line in said)
    assert len(run.answers) <= 2  # that failed even alone


def test_a_problem_that_always_fails_is_given_up(start, said: list[str]) -> None:
    replicas, run = start(HashedBuild(failing=(2,)), least=1, most=1), Run(5)
    for _ in replicas.turns(run.coordinator):
        pass
    errors = {problem: answer.error for problem, answer in by_problem(run.answers).items()}
    assert "fails even alone" in errors.pop("p2")
    assert errors == dict.fromkeys(("p0", "p1", "p3", "p4"))
    assert len(said) == 3 and all("started again" in line for line in said)


def test_replicas_that_cannot_be_loaded(start) -> None:
    with pytest.raises(InputError, match=r"replica \d cannot be loaded: there is no such model"):
        start(HashedBuild(error="there is no such model"))


def test_stopping_keeps_what_has_ended(start) -> None:
    replicas, run = start(HashedBuild(step_s=0.01)), Run(8)
    turns = replicas.turns(run.coordinator)
    for _ in turns:
        if run.ended >= 8:
            break
    before = run.ended
    turns.close()
    assert run.ended > before  # what ended while the last calls ran
    assert not run.coordinator.done
