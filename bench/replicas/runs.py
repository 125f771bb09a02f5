"""Runs of problems on replicas, and in plain processes that know nothing of each other."""

import multiprocessing
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from bench.replicas.engines import Build, settings
from pacore_sched.answers.journal_lines import RolloutResult
from pacore_sched.answers.live import Answer
from pacore_sched.answers.problem_run import Problem
from pacore_sched.replicas.cluster import connected
from pacore_sched.replicas.coordinator import Coordinator
from pacore_sched.replicas.messages import Key, Task
from pacore_sched.sim.tail_moves import TailMoves

if TYPE_CHECKING:
    from pacore_sched.replicas.actors import Replicas

END_S = 10.0  # for a plain process to end


@dataclass
class Run:
    """A run: when each problem was answered, in seconds since its start, and what it generated."""

    start: float = field(default_factory=time.monotonic)
    answers: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
    moved: int = 0  # rollouts
    error: str | None = None  # of a problem

    @property
    def seconds(self) -> float:
        return max(self.answers.values())


def fault(runs: Iterable[Run], tokens: int) -> str | None:
    """What is wrong with the first wrong one of runs that must generate this many tokens."""
    for run in runs:
        if run.error or run.tokens != tokens:
            return run.error or f"a run generated {run.tokens} tokens instead of {tokens}"
    return None


@dataclass(frozen=True)
class Started:
    """Replicas, with the seconds that Ray and they took to start."""

    actors: "Replicas"
    ray_s: float
    load_s: float


@contextmanager
def started(build: Build, replicas: int) -> Iterator[Started]:
    """Replicas on a Ray cluster of their own on this machine."""
    start = time.monotonic()
    with connected(None, replicas, gpus=0, cpus=1):
        from pacore_sched.replicas.actors import Replicas

        ray_s = time.monotonic() - start
        actors = Replicas(build, settings, least=replicas, most=replicas, gpus=0, cpus=1, say=print)
        try:
            yield Started(actors, ray_s, time.monotonic() - start - ray_s)
        finally:
            actors.close()


class _First(Coordinator):
    """A coordinator that uses only the first of the replicas."""

    replicas_used = 1

    def add(self, replica: int) -> None:
        if replica < self.replicas_used:
            super().add(replica)


def run_replicas(
    actors: "Replicas",
    conversations: Mapping[int, Sequence[dict]],
    replicas: int,
    moves: TailMoves | None = None,
) -> Run:
    """Run problems, by number, on the first of these replicas."""
    run, results = Run(), dict[str, list[RolloutResult]]()
    tasks = [Task(Key(n), str(n), messages) for n, messages in conversations.items()]

    def on_result(result: RolloutResult) -> None:
        results.setdefault(result.problem, []).append(result)
        run.tokens += result.num_tokens

    def on_answer(answer: Answer) -> None:
        run.answers[answer.problem] = time.monotonic() - run.start
        run.error = run.error or answer.error

    coordinator = _First(
        tasks,
        len(tasks),
        known=lambda id: results.get(id, ()),
        on_result=on_result,
        on_answer=on_answer,
        moves=moves,
    )
    coordinator.replicas_used = replicas
    for _ in actors.turns(coordinator):
        pass
    run.moved = coordinator.moved
    return run


class PlainProcesses:
    """Engines in processes of their own, without Ray, a coordinator or each other."""

    def __init__(self, build: Build, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._stack, self._pipes = ExitStack(), list[Connection]()
        try:
            for _ in range(count):
                here, there = context.Pipe()
                process = context.Process(target=_serve, args=(build, there), daemon=True)
                process.start()
                there.close()
                self._stack.callback(process.join, END_S)
                self._stack.callback(here.close)
                self._pipes.append(here)
            for pipe in self._pipes:
                pipe.recv()  # the engine is ready
        except BaseException:
            self.close()
            raise

    def run(self, conversations: Mapping[int, Sequence[dict]], processes: int) -> Run:
        """Run problems on the first of the processes, each an equal share."""
        pipes, items = self._pipes[:processes], list(conversations.items())
        run = Run()
        for index, pipe in enumerate(pipes):
            pipe.send(items[index :: len(pipes)])
        for pipe in pipes:
            ends, tokens, error = pipe.recv()
            run.answers |= {problem: end - run.start for problem, end in ends.items()}
            run.tokens += tokens
            run.error = run.error or error
        return run

    def close(self) -> None:
        self._stack.close()


def _serve(build: Build, pipe: Connection) -> None:
    """Make an engine, then run the problems that come, until the pipe is closed."""
    pacore = build()
    pipe.send(None)
    while True:
        try:
            items = pipe.recv()
        except EOFError:
            return
        ends, error, generated = {}, None, pacore.engine.stats.generated
        for answer in pacore.answers(Problem(messages, id=str(n)) for n, messages in items):
            ends[answer.problem] = time.monotonic()
            error = error or answer.error
        pipe.send((ends, pacore.engine.stats.generated - generated, error))


@contextmanager
def plain_processes(build: Build, count: int) -> Iterator[PlainProcesses]:
    processes = PlainProcesses(build, count)
    try:
        yield processes
    finally:
        processes.close()


@contextmanager
def folders(*names: str) -> Iterator[list[str]]:
    """New folders that are removed at the end."""
    with ExitStack() as stack:
        yield [stack.enter_context(TemporaryDirectory(prefix=f"replicas-{n}-")) for n in names]
