"""The supervisor: runs tasks in worker processes, isolated from each other. Imports no torch.

A worker (worker.py) reads a task as a line of JSON and answers with another line. A worker that
does not answer within the task's limit is killed; one that dies or reports a lost CUDA context is
replaced. If a task lost its worker, its forms run again: without the form at fault if that is
known, else one by one. A form that has lost three workers of an op is not tried again.
"""

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from model.terminal import stop_signals
from profiles.runs.task import NOT_STARTED, OUT_OF_TIME, STOPPED, Result, Task

ROOT = Path(__file__).resolve().parents[2]
START_S = 90.0  # for a worker's imports
GRACE_S = 1.0  # after a limit, for the worker to write its stacks
STDERR_CHARACTERS = 4000
STRIKES = 3
WORKER_VARIABLES = {"PACORE_WARM_UP": "0"}  # a separate task compiles, outside other limits


class WorkerLostError(Exception):
    """A worker died or was killed."""

    def __init__(self, why: str, exit_code: int) -> None:
        super().__init__(why)
        self.exit_code = exit_code


class Worker:
    """A process that answers one task at a time once it is `ready`; raises WorkerLostError."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._log = tempfile.TemporaryFile("ab")  # noqa: SIM115 - closed by `close`
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            cwd=ROOT,
            env={**os.environ, **WORKER_VARIABLES, **environment},
            start_new_session=True,  # Ctrl-C is for us; a worker's children die with it
        )
        assert self._process.stdin and self._process.stdout
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        self._log_start = 0

    def ready(self, wait_s: float) -> None:
        """Wait for its imports."""
        self._answer(wait_s, "the worker was not ready")

    def ask(self, task: Task, wait_s: float) -> dict:
        """The answer, within `wait_s` seconds. Raises WorkerLostError."""
        self._log_start = os.fstat(self._log.fileno()).st_size
        try:
            self._stdin.write(task.to_json().encode() + b"\n")
            self._stdin.flush()
        except OSError:  # it has died: reading will say so
            pass
        return self._answer(wait_s, "no answer")

    @property
    def stderr(self) -> str:
        """The end of stderr since the last task was sent."""
        size = os.fstat(self._log.fileno()).st_size
        start = max(self._log_start, size - 4 * STDERR_CHARACTERS)
        text = os.pread(self._log.fileno(), size - start, start).decode(errors="replace")
        return text[-STDERR_CHARACTERS:]

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def close(self) -> None:
        """End the process and its children."""
        self.kill()
        self._process.communicate()
        self._log.close()

    def wait(self) -> int:
        """Wait for a process that is about to end, and return its exit code."""
        try:
            return self._process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            self.kill()
            return self._process.wait()

    def _answer(self, wait_s: float, on_timeout: str) -> dict:
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            self.kill()

        timer = threading.Timer(max(0.0, wait_s) + GRACE_S, expire)
        timer.start()
        line = self._stdout.readline()
        timer.cancel()
        if line.endswith(b"\n"):
            return json.loads(line)
        code = self.wait()
        if expired.is_set():
            raise WorkerLostError(f"{on_timeout} within {wait_s:.0f} s: killed", code)
        ended = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        raise WorkerLostError(f"the worker died: {ended}", code)


class Supervisor:
    """Workers that run `command`. All are killed at `end` (monotonic clock) and at the end of the
    `with` block.

    spare: keep one worker in reserve with its imports done, to replace another at once; starting it
        takes a core for some seconds, which would disturb timing on a machine with few cores
    """

    def __init__(self, command: Sequence[str], *, end: float, spare: bool = False) -> None:
        self.end = end
        self._command, self._keeps_spare = command, spare
        self._spare: Worker | None = None
        self._num_lost: Counter[tuple[str, str]] = Counter()  # workers, by op and form
        self._workers: set[Worker] = set()
        self._lock = threading.RLock()
        self.stopped = False

    def __enter__(self) -> "Supervisor":
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def run(
        self,
        tasks: Sequence[Task],
        *,
        may_start: Callable[[Task], bool],
        workers: int = 1,
        environment: Mapping[str, str] | None = None,
    ) -> Iterator[Result]:
        """Yield results as they come; a task that may not start gets one that says so.

        `workers` processes take the tasks in order and end with the last one. After `stop`, running
        tasks are given up and tasks that have not started get no result.
        """
        todo = deque(tasks)
        results: queue.Queue[Result | Exception | None] = queue.Queue()  # None: a thread has ended
        threads = [
            threading.Thread(
                target=self._serve, args=(todo, results, may_start, environment or {}), daemon=True
            )
            for _ in range(min(workers, len(tasks)))
        ]
        for thread in threads:
            thread.start()
        running = len(threads)
        while running:
            result = results.get()
            if isinstance(result, Exception):
                raise result
            if result is None:
                running -= 1
            else:
                yield result

    def run_one(self, task: Task) -> Result:
        """The result of a task that has a worker to itself."""
        results = self.run([task], may_start=lambda task: True)
        return next(results, Result(task, failure=STOPPED))

    def stop(self) -> None:
        """Kill all workers and start no more; from any thread, or a signal handler."""
        with self._lock:
            self.stopped = True
            for worker in self._workers:
                worker.kill()

    def _serve(
        self,
        todo: deque[Task],
        results: queue.Queue[Result | Exception | None],
        may_start: Callable[[Task], bool],
        environment: Mapping[str, str],
    ) -> None:
        worker = None
        try:
            while not self.stopped:
                try:
                    task = todo.popleft()
                except IndexError:
                    break
                if skipped := self._skip_result(task):
                    results.put(skipped)
                    task = replace(task, forms=self._usable_forms(task))
                    if not task.forms:
                        continue
                if not may_start(task):
                    results.put(Result(task, failure=OUT_OF_TIME))
                    continue
                worker, result = self._run_task(worker, task, environment)
                todo.extendleft(reversed(result.retries))
                results.put(result)
        except Exception as error:  # our own bug must not look like the end of the work
            results.put(error)
        finally:
            self._close(worker)
            results.put(None)

    def _run_task(
        self, worker: Worker | None, task: Task, environment: Mapping[str, str]
    ) -> tuple[Worker | None, Result]:
        """Run a task. Returns the worker for the next one (None: a new one) and the result."""
        start = time.monotonic()
        if worker is None:
            worker = self._open(environment)
            try:
                worker.ready(min(START_S, self.end - start))
            except WorkerLostError as lost:  # not the task's fault
                result = self._lost_worker(worker, task, lost, time.monotonic() - start)
                return None, replace(result, form=None, retries=())
        start = time.monotonic()
        try:
            answer = worker.ask(task, min(task.limit_s, self.end - start))
        except WorkerLostError as lost:
            result = self._lost_worker(worker, task, lost, time.monotonic() - start)
            self._strike(task, result.form)
            return None, result
        spoiled, form = answer.pop("spoiled"), answer["form"]
        retries: tuple[Task, ...] = ()
        code = None
        if spoiled:
            code = worker.wait()
            form = form or _only_form(task)
            self._strike(task, form)
            if answer["failure"] and len(task.forms) > 1:
                retries = (task.without(form),) if form else tuple(task.form_by_form())
        answer |= {"form": form, "exit_code": code, "stderr": worker.stderr, "retries": retries}
        if spoiled:
            self._close(worker)
        return None if spoiled else worker, Result(task, **answer)

    def _lost_worker(
        self, worker: Worker, task: Task, lost: WorkerLostError, seconds: float
    ) -> Result:
        """The result of a task whose worker was lost."""
        form = _only_form(task)
        retries = () if form or self.stopped else tuple(task.form_by_form())
        result = Result(
            task,
            failure=STOPPED if self.stopped else str(lost),
            form=form,
            seconds=seconds,
            exit_code=lost.exit_code,
            stderr=worker.stderr,
            retries=retries,
        )
        self._close(worker)
        return result

    def _open(self, environment: Mapping[str, str]) -> Worker:
        with self._lock:  # either `stop` kills it, or it is not started
            worker = None
            if not environment:
                worker, self._spare = self._spare, None
            worker = worker or Worker(self._command, environment)
            if self._keeps_spare and not self._spare:
                self._spare = Worker(self._command, {})
            self._workers |= {process for process in (worker, self._spare) if process}
            if self.stopped:
                self.stop()
        return worker

    def _close(self, worker: Worker | None) -> None:
        if worker is not None:
            worker.close()
            with self._lock:
                self._workers.discard(worker)

    def _strike(self, task: Task, form: str | None) -> None:
        if form:
            with self._lock:
                self._num_lost[task.op, form] += 1

    def _usable_forms(self, task: Task) -> tuple[str, ...]:
        return tuple(form for form in task.forms if self._num_lost[task.op, form] < STRIKES)

    def _skip_result(self, task: Task) -> Result | None:
        """A result for the forms of a task that are not tried again; None if there are none."""
        forms = {*task.forms} - {*self._usable_forms(task)}
        if not forms:
            return None
        why = f"{NOT_STARTED}this form has lost {STRIKES} workers"
        return Result(replace(task, forms=tuple(sorted(forms))), failure=why)


def worker_command(device: str) -> list[str]:
    """The command line of a device's workers."""
    return [sys.executable, "-m", "profiles.runs.worker", device]


@contextmanager
def stops_on_signals(supervisor: Supervisor) -> Iterator[list[int]]:
    """Make SIGTERM and Ctrl-C stop the supervisor, so that the command finishes its files and ends.

    Yields a list to which the signals are added.
    """
    received: list[int] = []

    def stop(number: int, frame: object) -> None:
        received.append(number)
        supervisor.stop()

    before = stop_signals()
    for number in before:
        signal.signal(number, stop)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _only_form(task: Task) -> str | None:
    return task.forms[0] if len(task.forms) == 1 else None
