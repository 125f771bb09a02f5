"""The jobs of a server, seen from the event loop: admission, preparation, and the events of each.

A request is refused when too many wait. Its images are read and its prompt is built in another
thread before the engine's thread takes it. The pixels in memory are bounded: requests with images
wait until those of the requests before them have been encoded.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, TypeVar

from kernels.runtime.arithmetic import cdiv
from pacore_sched.answers.image_loader import ImageLoader
from pacore_sched.answers.journal_lines import RolloutResult
from pacore_sched.answers.live import PIXEL_BYTES
from pacore_sched.answers.problem_run import Problem, ProblemRun, Settings
from pacore_sched.engine.engine import Engine
from pacore_sched.engine.executor import ModelExecutor
from pacore_sched.serve.engine_thread import EngineThread
from pacore_sched.serve.errors import TOO_LONG, ApiError, refused
from pacore_sched.serve.jobs import Ended, Event, Failed, Job, RolloutEnded, Started
from pacore_sched.serve.limits import Limits
from pacore_sched.serve.metrics import Metrics

if TYPE_CHECKING:
    from model.step3vl import Step3VL

T = TypeVar("T")
ServiceState = Literal["ok", "draining", "failed"]
IMAGE_REQUESTS = 8  # whose images are read at a time
PIXEL_POLL_S = 0.01
TEXT_THREADS = 2
MAX_RETRY_AFTER = 60  # seconds
END_S = 5.0  # for the last responses to be written
ENDING = "the server is shutting down"


class Service:
    """Runs jobs on an engine. Call `start` in the event loop, and `close` at the end.

    draining: whether new requests are refused, because the server is about to end
    ending: whether those that run are ended, too; setting it ends a drain
    """

    def __init__(
        self, model: "Step3VL", engine: Engine[ModelExecutor], limits: Limits, metrics: Metrics
    ) -> None:
        self.model, self.engine, self.limits, self.metrics = model, engine, limits, metrics
        self.draining = self.ending = False
        self.jobs: set[Job] = set()  # accepted and not ended
        self.waiting = 0  # accepted and not started
        self._number = 0
        self._start_s = 1.0  # seconds from one start to the next: a moving average
        self._last_start = time.monotonic()
        self.image_loader = ImageLoader()
        self._image_requests = asyncio.Semaphore(IMAGE_REQUESTS)
        self._pixel_room = asyncio.Lock()
        self._image_threads = ThreadPoolExecutor(IMAGE_REQUESTS, thread_name_prefix="photos")
        self._text_threads = ThreadPoolExecutor(TEXT_THREADS, thread_name_prefix="prompts")

    def start(self) -> None:
        self.thread = EngineThread(self.engine, asyncio.get_running_loop(), self.metrics)
        self.thread.start()

    @property
    def failed(self) -> bool:
        """Whether no request can be answered any more."""
        return self.thread.failed or not self.thread.is_alive()

    @property
    def state(self) -> ServiceState:
        """Requests are taken while it is "ok"."""
        return "failed" if self.failed else "draining" if self.draining else "ok"

    def close(self) -> None:
        """End the threads; jobs that are left get no further events."""
        self.thread.stop()
        self.thread.join()
        self.engine.executor.close()
        self.image_loader.close()
        for pool in (self._image_threads, self._text_threads):
            pool.shutdown(cancel_futures=True)

    async def drain(self, seconds: float) -> None:
        """Refuse new requests, wait for those that run, then fail the rest."""
        self.draining = True
        deadline = time.monotonic() + seconds
        while self.jobs and time.monotonic() < deadline and not self.ending:
            await asyncio.sleep(0.05)
        self.ending = True
        self.thread.fail_all(503, ENDING)
        deadline = time.monotonic() + END_S
        while self.jobs and time.monotonic() < deadline:
            await asyncio.sleep(0.05)

    def check_open(self, requests: int = 1) -> None:
        """Raise ApiError if the server does not take that many more requests now."""
        if self.draining:
            raise ApiError(503, ENDING, retry_after=5)
        if self.failed:
            raise ApiError(503, f"the engine has failed: {self.thread.last_error}")
        if self.waiting + requests > self.limits.max_waiting:
            self.metrics.refused.inc()
            seconds = min(max(round(self.waiting * self._start_s), 1), MAX_RETRY_AFTER)
            raise ApiError(
                429,
                f"{self.waiting} requests are waiting, and at most {self.limits.max_waiting} may",
                code="queue_full",
                retry_after=seconds,
            )

    async def submit(
        self,
        problem: Problem,
        settings: Settings,
        *,
        stream: bool = False,
        known: Sequence[RolloutResult] = (),
    ) -> Job:
        """Prepare a problem and hand it to the engine; then read its `events`, and `cancel` it.

        stream: whether there will be NewTokens
        known: rollouts that have ended before; they are not run again

        With a `max_tokens` of 0, rollouts may use all that the context and the KV leave.
        Call `check_open` first. Raises ApiError if the prompt and `max_tokens` are too long, it
        takes too long or the server ends; and InputError for a prompt that is wrong otherwise.
        """
        self._number += 1
        run = ProblemRun(self.model, self.engine, settings, problem, self._number, known)
        job = Job(run, stream, time.monotonic())
        self.jobs.add(job)
        self.waiting += 1
        try:
            async with self._deadline(job):
                await self._prepare(job, has_images=problem.load is not None)
            if self.ending:
                raise ApiError(503, ENDING)
        except BaseException:
            self._forget(job)
            raise
        self.thread.add(job)
        return job

    async def events(self, job: Job) -> AsyncIterator[Event]:
        """A job's events up to Ended. Raises ApiError if the job fails or takes too long."""
        while job in self.jobs:
            async with self._deadline(job):
                events = await job.events.get()
            for event in events:
                match event:
                    case Started():
                        self._note_start(job)
                        self._end_wait(job)
                    case RolloutEnded(result):
                        job.results.append(result)
                    case Ended():
                        self._forget(job)
                    case Failed(status, why):
                        self.metrics.cancelled()
                        self._forget(job)
                        raise ApiError(status, why)
                yield event

    def cancel(self, job: Job) -> None:
        """End a job; does nothing if it has ended."""
        if job in self.jobs:
            self.metrics.cancelled()
            self._forget(job)
            self.thread.cancel(job)

    async def text_thread(self, function: Callable[[], T]) -> T:
        """Run a function in a thread for texts."""
        return await asyncio.get_running_loop().run_in_executor(self._text_threads, function)

    @asynccontextmanager
    async def _deadline(self, job: Job) -> AsyncIterator[None]:
        """Raises ApiError in the middle of what takes too long."""
        left = job.arrived + self.limits.timeout_s - time.monotonic()
        try:
            async with asyncio.timeout(max(left, 0)):
                yield
        except TimeoutError:
            limit = f"{self.limits.timeout_s:g} s"
            raise ApiError(504, f"the answer took longer than {limit}") from None

    async def _prepare(self, job: Job, *, has_images: bool) -> None:
        run = job.run
        if run.finished:
            return
        if has_images:
            async with self._image_requests:
                async with self._pixel_room:  # one waits and looks, the others wait for it
                    while sum(other.run.pixel_bytes for other in self.jobs) >= PIXEL_BYTES:
                        await asyncio.sleep(PIXEL_POLL_S)
                preparing = self._image_threads.submit(run.prepare)
                await asyncio.wrap_future(preparing)
        else:
            preparing = self._text_threads.submit(run.prepare)
            await asyncio.wrap_future(preparing)
        run.set_preparing(preparing)
        run.settings = self._fitted(run)

    def _forget(self, job: Job) -> None:
        self.jobs.discard(job)
        self._end_wait(job)

    def _end_wait(self, job: Job) -> None:
        """A job has started, or has ended without that."""
        if job.waits:
            job.waits = False
            self.waiting -= 1

    def _note_start(self, job: Job) -> None:
        """Update the mean time from one start to the next, without that in which no job waited."""
        now = time.monotonic()
        seconds = now - max(self._last_start, job.arrived)
        self._start_s += 0.1 * (min(seconds, MAX_RETRY_AFTER) - self._start_s)
        self._last_start = now

    def _fitted(self, run: ProblemRun) -> Settings:
        """A prepared problem's settings, with a `max_tokens` for which there is room."""
        first = run.rounds[0][0].prompt_tokens if run.rounds else len(run.prompt.ids)
        size = self.engine.executor.page_size
        pages = self.engine.executor.num_pages - cdiv(first - 1, size) - 1  # images end a page
        context = self.model.config.decoder.max_positions
        room = min(context - first, pages * size)
        sampling = run.settings.sampling
        if max(sampling.max_tokens, 1) <= room:
            return replace(
                run.settings, sampling=replace(sampling, max_tokens=sampling.max_tokens or room)
            )
        raise refused(
            f"a prompt of {first} tokens leaves room for {max(room, 0)} more: the context has"
            f" {context} and the KV cache {self.engine.executor.num_pages * size}",
            "max_tokens" if sampling.max_tokens else None,
            TOO_LONG,
        )
