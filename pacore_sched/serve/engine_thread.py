"""The engine in its own thread: it takes jobs, runs steps, and sends each job its events.

All that touches the engine happens in this thread; other threads `post` what is to be done before
the next step. A job that is cancelled therefore frees its pages within a step. If a step fails, the
jobs that were on the engine fail with the reason, and those that wait go on on an engine that has
been reset. After a second failure, all jobs fail.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue

from model.errors import reason
from pacore_sched.answers.journal_lines import RolloutResult
from pacore_sched.answers.live import Answer, LiveProblems
from pacore_sched.answers.problem_run import ProblemRun
from pacore_sched.engine.engine import Engine
from pacore_sched.engine.executor import ModelExecutor
from pacore_sched.sched.request import Rollout
from pacore_sched.serve.jobs import (
    Ended,
    Event,
    Failed,
    Job,
    NewTokens,
    RolloutEnded,
    RoundStarted,
    Started,
)
from pacore_sched.serve.metrics import Metrics

MAX_RESTARTS = 1
log = logging.getLogger(__name__)


class EngineThread(threading.Thread):
    """Runs an engine until `stop`.

    failures: steps that failed so far
    last_error: why the last one did
    """

    def __init__(
        self,
        engine: Engine[ModelExecutor],
        loop: asyncio.AbstractEventLoop,
        metrics: Metrics,
    ) -> None:
        super().__init__(name="engine", daemon=True)
        self.engine, self.failures = engine, 0
        self.last_error: str | None = None
        self._loop, self._metrics = loop, metrics
        self._live = LiveProblems(engine)
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._waiting: deque[Job] = deque()
        self._jobs: dict[ProblemRun, Job] = {}  # on the engine
        self._outboxes: dict[Job, None] = {}  # of the jobs with events in this step
        self._steps = 0
        self._ended = False

    @property
    def failed(self) -> bool:
        """Whether the engine has failed for good."""
        return self.failures > MAX_RESTARTS

    @property
    def jobs(self) -> Collection[Job]:
        """The jobs on the engine, in the order in which they started; only for what is posted."""
        return self._jobs.values()

    def add(self, job: Job) -> None:
        """Run a job. Its last event will be Ended or Failed."""
        self.post(partial(self._add, job))

    def cancel(self, job: Job) -> None:
        """End a job before the next step, without further events."""
        self.post(partial(self._cancel, job))

    def fail_all(self, status: int, why: str) -> None:
        """End all jobs before the next step; each gets a Failed event."""
        self.post(partial(self._fail_all, status, why))

    def integrity(self) -> Future[dict[str, object]]:
        """What `_integrity` finds before the next step."""
        found: Future[dict[str, object]] = Future()

        def answer() -> None:
            if found.set_running_or_notify_cancel():
                found.set_result(self._integrity())

        self.post(answer)
        return found

    def stop(self) -> None:
        """End the thread after the current step."""
        self.post(self._end_loop)

    def post(self, action: Callable[[], None]) -> None:
        """Have the thread do something before the next step. What it raises fails the engine."""
        self._inbox.put(action)

    def run(self) -> None:
        while not self._ended:
            try:
                idle = not (self._waiting or self._live or self.engine.busy)
                for action in self._actions(wait=idle):
                    action()
                self._step()
            except BaseException as error:
                self._recover(error)
            self._send()

    def _actions(self, *, wait: bool) -> Iterator[Callable[[], None]]:
        """What has been posted; with `wait`, at least one."""
        if wait:
            yield self._inbox.get()
        with suppress(Empty):
            while True:
                yield self._inbox.get_nowait()

    def _add(self, job: Job) -> None:
        if self.failed:
            self._fail(job, 503, f"the engine has failed: {self.last_error}")
        else:
            self._waiting.append(job)

    def _cancel(self, job: Job) -> None:
        with suppress(ValueError):
            self._waiting.remove(job)
            job.run.release()
        self._jobs.pop(job.run, None)
        self._live.cancel(job.run)

    def _fail_all(self, status: int, why: str) -> None:
        for job in [*self._jobs.values(), *self._waiting]:
            self._fail(job, status, why)
            self._cancel(job)

    def _integrity(self) -> dict[str, object]:
        """The pages of the pool, and what is wrong with the scheduler's state; None if nothing."""
        scheduler, fault = self.engine.scheduler, None
        try:
            scheduler.check_integrity()
        except AssertionError as error:
            fault = str(error) or "the rollouts' states disagree"
        return {
            "groups": len(scheduler.groups),
            "pages": scheduler.tree.num_pages,
            "free_pages": scheduler.tree.free_pages,
            "fault": fault,
        }

    def _end_loop(self) -> None:
        self._ended = True

    def _step(self) -> None:
        """Start the jobs that have room, and run one step."""
        while self._waiting and self._live.has_room(self._waiting[0].run):
            self._start(self._waiting.popleft())
        if not self._live and not self.engine.busy:
            return
        self._steps += 1
        for run, answer in self._live.step(self._take):
            self._end(self._jobs.pop(run), answer)
        for job in self._jobs.values():
            self._report(job)

    def _start(self, job: Job) -> None:
        self._jobs[job.run] = job
        if answer := self._live.start(job.run):
            del self._jobs[job.run]
            self._end(job, answer)
        else:
            self._report_round(job)

    def _take(self, run: ProblemRun, rollout: Rollout, result: RolloutResult) -> None:
        """A rollout has ended: send its last tokens and its result."""
        job = self._jobs[run]
        if rollout.tokens and result.finish_reason != "cancelled":
            self._note_tokens(job)
        self._send_tokens(job, rollout, last_round=result.round == len(run.settings.widths) - 1)
        found, rollout.group.found = rollout.group.found, 0
        self._put(job, RolloutEnded(result, found))
        self._metrics.rollout_ended(result)

    def _report(self, job: Job) -> None:
        """Send what the last step did to a job that goes on."""
        if job.group is not job.run.group:
            self._report_round(job)
        group = job.group
        assert group is not None
        if job.started is None:
            nodes = [segment.node for segment in group.path] + [r.node for r in group.rollouts]
            if max(nodes, default=-1) >= 0:
                self._note_start(job, time.monotonic())
        seen = sum(len(rollout.tokens) for rollout in group.rollouts)
        if seen > job.seen:
            job.seen = seen
            self._note_tokens(job)
        if job.stream and len(job.run.rounds) == len(job.run.settings.widths) - 1:
            for rollout in group.rollouts:
                self._send_tokens(job, rollout, last_round=True)

    def _report_round(self, job: Job) -> None:
        run = job.run
        group = job.group = run.group
        assert group is not None
        job.seen = 0
        job.sent.clear()
        event = RoundStarted(
            number=len(run.rounds),
            width=run.settings.widths[len(run.rounds)],
            started=len(group.rollouts),
            prompt_tokens=group.prompt_tokens,
            cached_tokens=sum(segment.written for segment in group.path),
            cut=run.prompt.cut,
            dropped=run.prompt.dropped,
        )
        self._put(job, event)

    def _send_tokens(self, job: Job, rollout: Rollout, *, last_round: bool) -> None:
        sent = job.sent.get(rollout.index, 0)
        if job.stream and last_round and len(rollout.tokens) > sent:
            job.sent[rollout.index] = len(rollout.tokens)
            parts = rollout.tokens[sent:], rollout.logprobs[sent:], rollout.top_logprobs[sent:]
            self._put(job, NewTokens(rollout.index, *parts))

    def _note_start(self, job: Job, now: float) -> None:
        job.started = now
        self._metrics.started(job)
        self._put(job, Started())

    def _note_tokens(self, job: Job) -> None:
        """Note that a job has received tokens in this step."""
        if job.step == self._steps:
            return
        job.step, now = self._steps, time.monotonic()
        if job.started is None:
            self._note_start(job, now)
        if job.last_token is not None:
            self._metrics.next_tokens(now - job.last_token)
        else:
            job.first_token = now
            self._metrics.first_token(job)
        job.last_token, job.steps = now, job.steps + 1

    def _end(self, job: Job, answer: Answer) -> None:
        self._metrics.ended(job, answer)
        self._put(job, Ended(answer))

    def _fail(self, job: Job, status: int, why: str) -> None:
        self._put(job, Failed(status, why))

    def _recover(self, error: BaseException) -> None:
        """After a step has failed: fail the jobs on the engine, and reset it."""
        self.failures += 1
        self.last_error = reason(error)
        log.error("the engine failed", exc_info=error)
        status = 503 if self.failed else 500
        for job in list(self._jobs.values()):
            self._fail(job, status, f"the engine failed: {self.last_error}")
            for end in (partial(self._live.cancel, job.run), job.run.release):
                with suppress(Exception):  # the engine's state may be wrong
                    end()
        self._jobs.clear()
        self._live = LiveProblems(self.engine)
        try:
            self.engine.executor.reset()
            self.engine.reset()
        except Exception as second:
            self.failures, self.last_error = MAX_RESTARTS + 1, reason(second)
            log.error("the engine cannot be reset", exc_info=second)
        self._metrics.restarted()
        if self.failed:
            self._fail_all(503, f"the engine failed again: {self.last_error}")

    def _put(self, job: Job, event: Event) -> None:
        job.outbox.append(event)
        self._outboxes[job] = None

    def _send(self) -> None:
        """Hand the events of this step to the event loop, all at once."""
        if not self._outboxes:
            return
        boxes = []
        for job in self._outboxes:
            boxes.append((job, job.outbox))
            job.outbox = []
        self._outboxes.clear()

        def deliver() -> None:
            for job, events in boxes:
                job.events.put_nowait(events)

        with suppress(RuntimeError):  # the loop has been closed
            self._loop.call_soon_threadsafe(deliver)
