"""Runs tasks in worker processes, so that none can cost another its result. Imports no torch.

A worker (worker.py) takes a task, a line of JSON, and answers with another. One that does not
answer within the task's limit is killed, and one that dies, or says that its CUDA context is lost,
is replaced. If a task lost its worker, its forms are run again: without the one to blame, or each
by itself where that is not known. A form that has cost an op three workers is not tried again.
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

from profiles.runs.task import NOT_STARTED, OUT_OF_TIME, STOPPED, Result, Task

ROOT = Path(__file__).resolve().parents[2]
START_S = 90.0  # for a worker's imports
GRACE_S = 1.0  # beyond a limit, in which the worker writes its stacks
STDERR_CHARACTERS = 4000
STRIKES = 3
OWN = {"PACORE_WARM_UP": "0"}  # a task of its own compiles, outside the others' limits


class Lost(Exception):
    """A worker has died or was killed."""

    def __init__(self, why: str, exit_code: int) -> None:
        super().__init__(why)
        self.exit_code = exit_code


class Worker:
    """A process that answers one task at a time, once it is `ready`. Its methods raise Lost."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._log = tempfile.TemporaryFile("ab")  # noqa: SIM115 - closed by `close`
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            cwd=ROOT,
            env={**os.environ, **OWN, **environment},
            start_new_session=True,  # Ctrl-C is for us; a worker's children die with it
        )
        assert self._process.stdin and self._process.stdout
        self._questions, self._answers = self._process.stdin, self._process.stdout
        self._seen = 0

    def ready(self, wait_s: float) -> None:
        """Wait for its imports."""
        self._answer(wait_s, "the worker was not ready")

    def ask(self, task: Task, wait_s: float) -> dict:
        """The answer, within `wait_s` seconds. Raises Lost."""
        self._seen = os.fstat(self._log.fileno()).st_size
        try:
            self._questions.write(task.to_json().encode() + b"\n")
            self._questions.flush()
        except OSError:  # it has died: reading says so
            pass
        return self._answer(wait_s, "no answer")

    @property
    def stderr(self) -> str:
        """The end of what was written to stderr since the last task was given out."""
        size = os.fstat(self._log.fileno()).st_size
        start = max(self._seen, size - 4 * STDERR_CHARACTERS)
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
        """The exit code of a process that is about to end by itself."""
        try:
            return self._process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            self.kill()
            return self._process.wait()

    def _answer(self, wait_s: float, otherwise: str) -> dict:
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            self.kill()

        timer = threading.Timer(max(0.0, wait_s) + GRACE_S, expire)
        timer.start()
        line = self._answers.readline()
        timer.cancel()
        if line.endswith(b"\n"):
            return json.loads(line)
        code = self.wait()
        if expired.is_set():
            raise Lost(f"{otherwise} within {wait_s:.0f} s: killed", code)
        ended = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        raise Lost(f"the worker died: {ended}", code)


class Supervisor:
    """Workers that run `command`. All are killed at `end`, on the monotonic clock, and when the
    `with` block around it is left.

    spare: keep one worker in reserve, whose imports are done by the time another must be replaced;
        it takes a core for some seconds, which few cores cannot spare while something is timed
    """

    def __init__(self, command: Sequence[str], *, end: float, spare: bool = False) -> None:
        self.end = end
        self._command, self._keeps_spare = command, spare
        self._spare: Worker | None = None
        self._lost: Counter[tuple[str, str]] = Counter()  # workers, by op and form
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
        """Results as they come; a task that may not start has one that says so.

        `workers` processes share the tasks in order, and end with the last one. After `stop` the
        tasks at work are given up, and those not begun have no results.
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
                if dropped := self._given_up(task):
                    results.put(dropped)
                    task = replace(task, forms=self._promising(task))
                    if not task.forms:
                        continue
                if not may_start(task):
                    results.put(Result(task, failure=OUT_OF_TIME))
                    continue
                worker, result = self._attempt(worker, task, environment)
                todo.extendleft(reversed(result.again))
                results.put(result)
        except Exception as error:  # a bug of ours must not look like the end of the work
            results.put(error)
        finally:
            self._close(worker)
            results.put(None)

    def _attempt(
        self, worker: Worker | None, task: Task, environment: Mapping[str, str]
    ) -> tuple[Worker | None, Result]:
        """One task; the worker for the next one, None if it must be a new one."""
        start = time.monotonic()
        if worker is None:
            worker = self._open(environment)
            try:
                worker.ready(min(START_S, self.end - start))
            except Lost as lost:  # no fault of the task's
                result = self._lost_worker(worker, task, lost, time.monotonic() - start)
                return None, replace(result, form=None, again=())
        start = time.monotonic()
        try:
            answer = worker.ask(task, min(task.limit_s, self.end - start))
        except Lost as lost:
            result = self._lost_worker(worker, task, lost, time.monotonic() - start)
            self._strike(task, result.form)
            return None, result
        spoiled, form = answer.pop("spoiled"), answer["form"]
        again: tuple[Task, ...] = ()
        code = None
        if spoiled:
            code = worker.wait()
            form = form or _only_form(task)
            self._strike(task, form)
            if answer["failure"] and len(task.forms) > 1:
                again = (task.without(form),) if form else tuple(task.form_by_form())
        answer |= {"form": form, "exit_code": code, "stderr": worker.stderr, "again": again}
        if spoiled:
            self._close(worker)
        return None if spoiled else worker, Result(task, **answer)

    def _lost_worker(self, worker: Worker, task: Task, lost: Lost, seconds: float) -> Result:
        """The result of a task that ended with its worker."""
        form = _only_form(task)
        again = () if form or self.stopped else tuple(task.form_by_form())
        result = Result(
            task,
            failure=STOPPED if self.stopped else str(lost),
            form=form,
            seconds=seconds,
            exit_code=lost.exit_code,
            stderr=worker.stderr,
            again=again,
        )
        self._close(worker)
        return result

    def _open(self, environment: Mapping[str, str]) -> Worker:
        with self._lock:  # so that `stop` kills it or it is not started
            worker = None
            if not environment:
                worker, self._spare = self._spare, None
            worker = worker or Worker(self._command, environment)
            if self._keeps_spare and not self._spare:
                self._spare = Worker(self._command, {})
            self._workers |= {one for one in (worker, self._spare) if one}
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
                self._lost[task.op, form] += 1

    def _promising(self, task: Task) -> tuple[str, ...]:
        return tuple(form for form in task.forms if self._lost[task.op, form] < STRIKES)

    def _given_up(self, task: Task) -> Result | None:
        """A row for the forms of a task that are not tried again."""
        forms = {*task.forms} - {*self._promising(task)}
        if not forms:
            return None
        why = f"{NOT_STARTED}cost {STRIKES} workers before"
        return Result(replace(task, forms=tuple(sorted(forms))), failure=why)


def worker_command(device: str) -> list[str]:
    """What the workers of a device run."""
    return [sys.executable, "-m", "profiles.runs.worker", device]


@contextmanager
def stops_on_signals(supervisor: Supervisor) -> Iterator[list[int]]:
    """Let SIGTERM and Ctrl-C stop the supervisor, after which the command ends in order: what was
    being written is. Yields a list that the signals are added to."""
    received: list[int] = []

    def stop(number: int, frame: object) -> None:
        received.append(number)
        supervisor.stop()

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _only_form(task: Task) -> str | None:
    return task.forms[0] if len(task.forms) == 1 else None
