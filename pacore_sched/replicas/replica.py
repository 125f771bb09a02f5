"""One replica: an engine that follows the coordinator's orders, a fraction of a second at a time.

Problems stay on the replica that has them, with their prompts' and images' KV. Some of their
rollouts may leave in the tail (sim/tail_moves.py): the replica that they go to runs them as a part
of the problem, and their results come back here, where the problem's rounds go on.
"""

import resource
import time
from collections import deque
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import replace
from functools import partial

import torch

from model.errors import STOPS, reason
from model.vision.image import Views
from pacore_sched.answers.arrivals import Arrivals
from pacore_sched.answers.image_loader import ImageLoader
from pacore_sched.answers.images import ImageData, vision_of
from pacore_sched.answers.journal_lines import RolloutResult
from pacore_sched.answers.live import Answer, LiveProblems
from pacore_sched.answers.pacore import Pacore
from pacore_sched.answers.problem_run import Problem, ProblemRun
from pacore_sched.replicas.messages import Key, Orders, Report, Task, Totals
from pacore_sched.replicas.step_costs import StepCosts
from pacore_sched.sched.queue_load import QueueLoad
from pacore_sched.sched.request import Rollout
from pacore_sched.sim.replica_state import replica_state


class ReplicaError(Exception):
    """Why a replica cannot go on, with its use of memory; its unfinished rollouts are lost."""


class Replica:
    """Runs tasks on an engine of its own."""

    def __init__(self, pacore: Pacore) -> None:
        self._model, self._engine = pacore.model, pacore.engine
        self._settings = pacore.settings
        self._live = LiveProblems(pacore.engine)
        self._image_loader = ImageLoader()
        self._inbox = _Inbox()
        self._arrivals = Arrivals(self._inbox)
        self._runs: dict[Key, ProblemRun] = {}
        self._keys: dict[ProblemRun, Key] = {}
        self._away: dict[Key, int] = {}  # problems with rollouts elsewhere: their round
        self._costs = StepCosts(pacore.engine, pacore.model.config.decoder)
        self._report, self._reported = Report(), Totals()

    def advance(self, orders: Orders) -> Report:
        """Follow orders, then run steps until it is time to report.

        Raises ReplicaError if a step fails.
        """
        self._report = Report()
        until = time.monotonic() + orders.seconds
        try:
            self._follow(orders)
            while self._step() and time.monotonic() < until:
                if orders.more and self._load().takes(ahead=orders.ahead):
                    break
        except STOPS:
            raise
        except BaseException as error:
            self._note_memory()
            raise ReplicaError(f"{reason(error)} ({self._report.memory})") from None
        return self._finish_report(state=not orders.more)

    def _follow(self, orders: Orders) -> None:
        for key in orders.cancel:
            if run := self._runs.get(key):
                self._live.cancel(run)
                self._inbox.forget(run)
                self._forget(run)
        for task in orders.tasks:
            run = self._run_of(task)
            self._runs[task.key], self._keys[run] = run, task.key
            self._inbox.runs.append(run)
        for problem, result in orders.ended:
            run = self._runs.get(key := Key(problem))
            if run is not None and run.awaits(result):
                self._report.results.append((key, result))
                self._end(self._live.take_elsewhere(run, result, self._on_rollout))
        for problem, number, indices in orders.detach:
            for key, run in list(self._runs.items()):
                if key.problem == problem and len(run.rounds) == number and run.group is not None:
                    self._detach(key, run, indices)

    def _detach(self, key: Key, run: ProblemRun, indices: Sequence[int]) -> None:
        """Report what those of the rollouts that this run holds have generated."""
        if partials := run.detach(indices):
            self._report.detached.append((key, len(run.rounds), partials))
        if not key.part:
            self._away[key] = len(run.rounds)
        elif not run.pending:  # nothing of this part is left here
            self._live.cancel(run)
            self._end([(run, Answer(run.id, "", None, ()))])

    def _step(self) -> bool:
        """Start what has arrived and run one step; False if there is no work."""
        self._arrivals.fill()
        for run in self._arrivals.starting(self._live):
            if run in self._keys and (answer := self._live.start(run)):
                self._end([(run, answer)])
        if not self._live:
            return False
        with self._costs.timed():
            ended = self._live.step(self._on_rollout)
        self._end(ended)
        return True

    def _on_rollout(self, run: ProblemRun, rollout: Rollout, result: RolloutResult) -> None:
        self._report.results.append((self._keys[run], result))

    def _end(self, ended: list[tuple[ProblemRun, Answer]]) -> None:
        for run, answer in ended:
            key = self._keys[run]
            if key.part and run.finished:
                answer = Answer(run.id, "", None, ())
            elif self._settings.min_messages is None:
                answer = replace(answer, rounds=())  # the coordinator has all results
            self._report.answers.append((key, answer))
            self._forget(run)

    def _forget(self, run: ProblemRun) -> None:
        del self._runs[self._keys.pop(run)]

    def _load(self) -> QueueLoad:
        load = QueueLoad.of(self._engine.scheduler)
        return load if self._arrivals.empty else replace(load, waits=True)

    def _finish_report(self, *, state: bool) -> Report:
        report, scheduler = self._report, self._engine.scheduler
        for key, number in list(self._away.items()):
            run = self._runs.get(key)
            if run is None or len(run.rounds) != number:
                report.overtaken.append((key.problem, number))
                del self._away[key]
        report.busy = bool(self._live) or not self._arrivals.empty
        report.load = self._load()
        self._note_memory()
        totals = Totals(copy(self._engine.stats), copy(scheduler.counts))
        report.totals, self._reported = totals.since(self._reported), totals
        if state:
            report.state = replica_state(scheduler, self._costs.model())
            _ = report.state.load  # computed here: the coordinator has those of all replicas
            report.measured = self._costs.measured
        return report

    def _run_of(self, task: Task) -> ProblemRun:
        load = partial(self._views_of, task.images) if task.images else None
        problem = Problem(task.messages, load, task.id)
        return ProblemRun(
            self._model,
            self._engine,
            self._settings,
            problem,
            task.key.problem,
            task.known,
            task.part,
            self._neighbour(task),
        )

    def _views_of(self, images: Sequence[ImageData]) -> list[Views]:
        vision = vision_of(self._model)
        return self._image_loader.load(partial(image.views, vision) for image in images)

    def _neighbour(self, task: Task) -> ProblemRun | None:
        """A run of other rollouts of the round whose part the task is."""
        if task.part is None:
            return None
        for key, run in self._runs.items():
            same_round = key.problem == task.key.problem and len(run.rounds) == task.part.round
            if same_round and run.group is not None:
                return run
        return None

    def _note_memory(self) -> None:
        tree = self._engine.scheduler.tree
        self._report.kv_used = 1 - tree.free_pages / tree.num_pages
        self._report.peak_bytes = torch.cuda.max_memory_allocated() or (
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        )


class _Inbox(Iterator[ProblemRun]):
    """The problems that have come and not been read: an iterator that may have more after its
    end."""

    def __init__(self) -> None:
        self.runs: deque[ProblemRun] = deque()

    def __next__(self) -> ProblemRun:
        if not self.runs:
            raise StopIteration
        return self.runs.popleft()

    def forget(self, run: ProblemRun) -> None:
        if run in self.runs:
            self.runs.remove(run)
