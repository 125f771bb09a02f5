"""The replicas as Ray actors: started, called, and started again when they end.

Actors with calls of our own rather than Ray Data's pool of actors: a replica must hold many
problems at once, report each rollout as it ends, and give rollouts away, while a pool maps batches
to results. They are started again here, not by Ray, which would count all ends of a replica: here
only those count that come one after the other without an ended rollout between them.
"""

import gc
import os
import time
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import ray
from ray import exceptions

from model.errors import InputError, reason
from model.kv_cache import PAGE_SIZE
from model.step3vl import Step3VL
from model.terminal import progress
from pacore_sched.answers.pacore import Pacore
from pacore_sched.replicas.coordinator import SECONDS, Coordinator
from pacore_sched.replicas.messages import Orders, Report
from pacore_sched.replicas.replica import Replica, ReplicaError

MAX_FAILURES = 3  # of a replica in a row, without a rollout that ends in between
WAIT_S = 0.2  # between looks at the user's signals
ALONE_S = 60.0  # without a replica, until the user is told


class Build(Protocol):
    """Makes a replica's engine, on a model that is loaded unless it is given. Must be picklable."""

    def __call__(self, model: Step3VL | None = None, kv_tokens: int | None = None) -> Pacore: ...


Describe = Callable[[Pacore], dict[str, object]]  # what results depend on: equal on all replicas


@dataclass(frozen=True)
class Loaded:
    """A replica that has been loaded."""

    settings: dict[str, object]
    kv_tokens: int
    node: str
    pid: int


class ReplicaActor:
    """A Replica in a process of its own."""

    def __init__(self, build: Build, describe: Describe) -> None:
        self._build, self._describe = build, describe
        self._pacore: Pacore | None = None
        self._replica: Replica | None = None

    def load(self, kv_tokens: int | None) -> Loaded:
        """Load the model, unless it has been, and make its engine with this capacity of KV."""
        model = self._pacore.model if self._pacore else None
        self._replica = self._pacore = None
        gc.collect()  # the old KV's memory is free for the new one; there are reference cycles
        self._pacore = pacore = self._build(model, kv_tokens)
        self._replica = Replica(pacore)
        tokens = pacore.engine.executor.num_pages * PAGE_SIZE
        node = ray.util.get_node_ip_address()
        return Loaded(self._describe(pacore), tokens, node, os.getpid())

    def advance(self, orders: Orders) -> Report:
        assert self._replica is not None
        return self._replica.advance(orders)


class Replicas:
    """The actors of a run; Ray must be connected (cluster.py)."""

    def __init__(
        self,
        build: Build,
        describe: Describe,
        *,
        least: int,
        most: int,
        gpus: float,
        cpus: float,
        say: Callable[[str], None],
    ) -> None:
        """Load `least` replicas, and wait for them; up to `most` join as the cluster has room.

        gpus, cpus: of each
        say: called with a line for the user when a replica ends

        Raises InputError if one cannot be loaded, or they differ in what results depend on.
        """
        actor = ray.remote(ReplicaActor)
        self._new = actor.options(num_gpus=gpus, num_cpus=cpus, max_restarts=0)
        self._build, self._describe, self._say = build, describe, say
        self._actors: dict[int, Any] = {}
        self._loading: dict[Any, int] = {}  # the result of `load` -> replica
        self._calls: dict[Any, int] = {}  # the result of `advance` -> replica
        self.loaded: dict[int, Loaded] = {}  # those that run now
        self.settings: dict[str, object] = {}  # what results depend on
        self._failures: dict[int, int] = {}
        self._kv_tokens: int | None = None
        self.ended = 0  # how often a replica has ended
        try:
            self._start(least, most)
        except BaseException:
            self.close()
            raise

    def turns(self, coordinator: Coordinator) -> Generator[None, None, None]:
        """Run all tasks of a coordinator; yields several times a second.

        Raises InputError if all replicas have ended too often. If the caller stops early, what has
        ended until then is still reported to the coordinator.
        """
        self._calls.clear()  # of an earlier coordinator
        for number in self.loaded:
            coordinator.add(number)
        alone_since = time.monotonic()
        try:
            while not coordinator.done:
                for number, orders in coordinator.calls():
                    self._calls[self._actors[number].advance.remote(orders)] = number
                pending = [*self._calls, *self._loading]
                if not pending:
                    raise InputError(
                        f"all replicas have ended at least {MAX_FAILURES} times in a row without"
                        " ending a rollout: see the reasons above, then continue with --resume"
                    )
                done, _ = ray.wait(pending, num_returns=len(pending), timeout=0)
                self._take(done or ray.wait(pending, timeout=WAIT_S)[0], coordinator)
                if self.loaded:
                    alone_since = time.monotonic()
                elif time.monotonic() - alone_since > ALONE_S:
                    alone_since = time.monotonic()
                    self._say(
                        "no replica is loaded: they load slowly, or the cluster has no room for"
                        " one now (`ray status`); Ctrl-C stops, and --resume goes on"
                    )
                yield
            yield
        finally:
            if self._calls and not coordinator.done:
                calls = [*self._calls]
                done, _ = ray.wait(calls, num_returns=len(calls), timeout=4 * SECONDS)
                self._take(done, coordinator)

    def close(self) -> None:
        """End all replicas."""
        for actor in self._actors.values():
            ray.kill(actor)
        self._actors.clear()

    def _start(self, least: int, most: int) -> None:
        for number in range(least):
            self._launch(number)
        with progress("replicas", least) as advance:
            while len(self.loaded) < least:
                for result in ray.wait([*self._loading])[0]:
                    number = self._loading.pop(result)
                    self.loaded[number] = loaded = self._load_result(number, result)
                    self.settings = self.settings or loaded.settings
                    advance(1)
        self._kv_tokens = min(loaded.kv_tokens for loaded in self.loaded.values())
        smaller = {
            number: self._actors[number].load.remote(self._kv_tokens)
            for number, loaded in self.loaded.items()
            if loaded.kv_tokens > self._kv_tokens
        }
        for number, result in smaller.items():
            self.loaded[number] = self._load_result(number, result)
        for number in range(least, most):
            self._launch(number)

    def _launch(self, number: int) -> None:
        actor: Any = self._new.remote(self._build, self._describe)
        self._actors[number] = actor
        self._loading[actor.load.remote(self._kv_tokens)] = number

    def _load_result(self, number: int, result: Any) -> Loaded:
        """What a replica has loaded. Raises InputError if it failed, or is unlike the others."""
        try:
            loaded = ray.get(result)
        except exceptions.RayError as error:
            raise InputError(f"replica {number} cannot be loaded: {_why(error)}") from None
        for name, value in self.settings.items():
            if loaded.settings.get(name) != value:
                raise InputError(
                    f"replica {number}, on {loaded.node}, has another {name} than the others:"
                    f" {loaded.settings.get(name)!r}, not {value!r}"
                )
        return loaded

    def _take(self, done: Iterable[Any], coordinator: Coordinator) -> None:
        """Take the results of calls that are done."""
        for result in done:
            if (number := self._loading.pop(result, None)) is not None:
                try:
                    self.loaded[number] = self._load_result(number, result)
                    coordinator.add(number)
                except InputError as error:
                    self._ended(number, str(error), coordinator)
                continue
            number = self._calls.pop(result)
            try:
                report = ray.get(result)
            except exceptions.RayError as error:
                why = _why(error)
                if not isinstance(error, exceptions.RayTaskError):  # which has its own numbers
                    node = self.loaded[number].node
                    why = f"{why} (on {node}; at its last report {coordinator.memory(number)})"
                step = isinstance(error, exceptions.RayTaskError | exceptions.OutOfMemoryError)
                self._ended(number, why, coordinator, step=step)
                continue
            if any(ended.finish_reason != "cancelled" for _, ended in report.results):
                self._failures[number] = 0
            coordinator.take(number, report)

    def _ended(
        self, number: int, why: str, coordinator: Coordinator, *, step: bool = False
    ) -> None:
        """A replica has ended: start another in its place, unless it has ended too often.

        step: a step of its problems failed
        """
        self.ended += 1
        self.loaded.pop(number, None)
        ray.kill(self._actors.pop(number))
        self._failures[number] = failures = self._failures.get(number, 0) + 1
        given_up = coordinator.lose(number, failure=why if step else "")
        again = failures < MAX_FAILURES + given_up  # the replica may not have been the cause
        self._say(
            f"replica {number} has ended: {why}; "
            + ("it is started again" if again else f"given up after {failures} times in a row")
        )
        if again:
            self._launch(number)


def _why(error: exceptions.RayError) -> str:
    """Why a call has failed, on one line."""
    cause = getattr(error, "cause", None)
    if isinstance(error, exceptions.RayTaskError) and isinstance(cause, Exception):
        return str(cause) if isinstance(cause, ReplicaError) else reason(cause)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, exceptions.OutOfMemoryError):
        return f"Ray ended it because its node ran out of memory: {lines[0]}"
    return lines[-1] if lines else type(error).__name__
