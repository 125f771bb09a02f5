"""What answers the problems of a job: one engine in this process, or replicas on Ray."""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Protocol

from model.errors import InputError
from model.step3vl import Step3VL
from model.vision.image import Views
from pacore_sched.answers.image_loader import ImageLoader
from pacore_sched.answers.images import vision_of
from pacore_sched.answers.journal import Journal
from pacore_sched.answers.journal_lines import RolloutResult
from pacore_sched.answers.live import Answer
from pacore_sched.answers.pacore import Pacore
from pacore_sched.answers.problem_run import Problem
from pacore_sched.answers.questions import Question
from pacore_sched.cli import options as shared
from pacore_sched.cli.inputs import ImageFiles
from pacore_sched.replicas.coordinator import Coordinator
from pacore_sched.replicas.messages import Key, Task, Totals
from pacore_sched.sim.tail_moves import TailMoves

if TYPE_CHECKING:
    from pacore_sched.replicas.actors import Replicas

Describe = Callable[[Pacore], dict]


@dataclass(frozen=True)
class Source:
    """The problems of a run.

    questions: without invalid ones
    journal: has the rollouts that are known
    check_stop: raises an exception if the user stops the run
    """

    questions: Sequence[Question]
    journal: Journal
    images: ImageFiles
    check_stop: Callable[[], None]

    def unstopped(self) -> Iterator[Question]:
        for question in self.questions:
            self.check_stop()  # thousands may be known from an earlier run: no step between them
            yield question


class Runner(Protocol):
    """Answers problems."""

    @property
    def settings(self) -> dict:
        """What the results depend on, as far as the model and the machine decide it."""

    @property
    def kv_used(self) -> float:
        """Share of the KV pages in use."""

    @property
    def totals(self) -> Totals:
        """What has been done so far."""

    @property
    def counts(self) -> dict[str, int]:
        """Further counts for the report."""

    def answers(
        self,
        source: Source,
        on_rollout: Callable[[RolloutResult], None],
        on_turn: Callable[[], None],
    ) -> Iterator[Answer]:
        """Yield answers as problems end.

        on_rollout: called with the result of every rollout that ends
        on_turn: called several times a second
        """


@dataclass(frozen=True)
class Build:
    """Makes the model and the engine of a job: here, or on a replica.

    neighbours: replicas that may have the device's memory in common, this one included
    """

    options: argparse.Namespace
    pacore: Callable[..., Pacore]  # (model, engine, sampling=...) -> Pacore
    logprobs: str
    problems: int
    width: int
    neighbours: int = 1

    def __call__(self, model: Step3VL | None = None, kv_tokens: int | None = None) -> Pacore:
        options = copy(self.options)
        options.kv_tokens = kv_tokens or options.kv_tokens
        model = model or shared.load_model(options)
        sampling = shared.sampling_for(options, model.config.sampling)
        engine = shared.make_engine(
            options,
            model,
            problems=self.problems,
            width=self.width,
            replicas=self.neighbours,
        )
        return self.pacore(model, engine, sampling=replace(sampling, logprobs=self.logprobs))


class OneEngine:
    """An engine in this process."""

    def __init__(self, pacore: Pacore, describe: Describe) -> None:
        self._pacore, self.settings = pacore, describe(pacore)

    @property
    def kv_used(self) -> float:
        tree = self._pacore.engine.scheduler.tree
        return 1 - tree.free_pages / tree.num_pages

    @property
    def totals(self) -> Totals:
        engine = self._pacore.engine
        return Totals(engine.stats, engine.scheduler.counts)

    @property
    def counts(self) -> dict[str, int]:
        return {}

    def answers(
        self,
        source: Source,
        on_rollout: Callable[[RolloutResult], None],
        on_turn: Callable[[], None],
    ) -> Iterator[Answer]:
        def load(question: Question) -> list[Views]:
            vision = vision_of(self._pacore.model)
            images = source.images.read(question, source.check_stop)
            return loader.load(partial(image.views, vision) for image in images)

        def problems() -> Iterator[Problem]:
            for question in source.unstopped():
                images = partial(load, question) if question.images else None
                yield Problem(question.messages, images, question.id)

        with closing(ImageLoader()) as loader:
            yield from self._pacore.answers(
                problems(),
                known=source.journal.results,
                on_rollout=on_rollout,
                on_step=lambda tokens: on_turn(),
            )


class ManyReplicas:
    """Replicas on Ray."""

    def __init__(self, actors: "Replicas", migrate: bool) -> None:
        self._actors, self._migrate = actors, migrate
        self._coordinator: Coordinator | None = None

    @property
    def settings(self) -> dict:
        return self._actors.settings

    @property
    def kv_used(self) -> float:
        return self._coordinator.kv_used if self._coordinator else 0.0

    @property
    def totals(self) -> Totals:
        return self._coordinator.totals if self._coordinator else Totals()

    @property
    def counts(self) -> dict[str, int]:
        moved = self._coordinator.moved if self._coordinator else 0
        actors = self._actors
        return {
            "replicas": len(actors.loaded),
            "replicas_ended": actors.ended,
            "moved_rollouts": moved,
        }

    def answers(
        self,
        source: Source,
        on_rollout: Callable[[RolloutResult], None],
        on_turn: Callable[[], None],
    ) -> Iterator[Answer]:
        ended: list[Answer] = []
        self._coordinator = Coordinator(
            self._tasks(source, ended.append),
            len(source.questions),
            known=source.journal.results,
            on_result=on_rollout,
            on_answer=ended.append,
            moves=TailMoves() if self._migrate else None,
        )
        with closing(self._actors.turns(self._coordinator)) as turns:
            for _ in turns:
                on_turn()
                while ended:
                    yield ended.pop(0)

    def _tasks(self, source: Source, fail: Callable[[Answer], None]) -> Iterator[Task]:
        """The problems as tasks; `fail` gets those whose images cannot be read."""
        for number, question in enumerate(source.unstopped()):
            try:
                images = list(source.images.read(question, source.check_stop))
            except InputError as error:
                fail(Answer(question.id, "", str(error), ()))
                continue
            known = source.journal.results(question.id)
            yield Task(Key(number), question.id, question.messages, images, known)


@contextmanager
def runner_of(options: argparse.Namespace, build: Build, describe: Describe) -> Iterator[Runner]:
    """The runner that the options describe. Raises InputError if it cannot be made."""
    if options.replicas is None:
        if options.ray_address:
            raise InputError("--ray-address needs --replicas")
        yield OneEngine(build(), describe)
        return
    from pacore_sched.replicas.cluster import connected

    shared.check_model(options.model)  # before Ray starts, in seconds
    least, most = options.replicas
    gpus, cpus = shared.resources(options)
    with connected(options.ray_address, least, gpus=gpus, cpus=cpus):
        from pacore_sched.replicas.actors import Replicas

        neighbours = 1 if gpus else most
        actors = Replicas(
            replace(build, options=shared.for_workers(options), neighbours=neighbours),
            describe,
            least=least,
            most=most,
            gpus=gpus,
            cpus=cpus,
            say=lambda line: print(line, file=sys.stderr),
        )
        try:
            yield ManyReplicas(actors, options.migrate)
        finally:
            actors.close()
