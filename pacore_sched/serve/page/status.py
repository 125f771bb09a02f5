"""`/status`: the server's state, and a recent snapshot of its engine.

The engine's thread takes a snapshot only when somebody asks, and at most twice a second; all
who ask meanwhile share it. While a step is slow, they get the last one with its age.
"""

import asyncio
import logging
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from pydantic import TypeAdapter

from pacore_sched.serve.page.snapshot import Snapshot, take_snapshot
from pacore_sched.serve.service import Service, ServiceState

FRESH_S = 0.5  # a snapshot this young answers without asking the engine
WAIT_S = 1.0  # for the engine's step to end
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ServerStatus:
    """The answer of `/status`.

    state: as of `/health`
    running, waiting: requests
    max_waiting: above which requests get status 429
    age_s: of the snapshot, in seconds; it grows while a step is slow
    engine: null until there has been one
    """

    model: str
    state: ServiceState
    running: int
    waiting: int
    max_waiting: int
    age_s: float | None
    engine: Snapshot | None


_STATUS = TypeAdapter(ServerStatus)


class StatusReader:
    """Reads the status of a service, in the event loop. `model` is its name."""

    def __init__(self, service: Service, model: str) -> None:
        self._service, self._model = service, model
        self._last: Snapshot | None = None
        self._asked: asyncio.Future[None] | None = None  # set when the engine has answered

    async def json(self) -> bytes:
        """The status as JSON, after at most WAIT_S."""
        await self._refresh()
        service, last = self._service, self._last
        status = ServerStatus(
            model=self._model,
            state=service.state,
            running=len(service.jobs) - service.waiting,
            waiting=service.waiting,
            max_waiting=service.limits.max_waiting,
            age_s=round(time.monotonic() - last.at, 2) if last else None,
            engine=last,
        )
        return _STATUS.dump_json(status)

    async def _refresh(self) -> None:
        """Wait for a snapshot, unless the last one is fresh."""
        if self._last and time.monotonic() - self._last.at < FRESH_S:
            return
        if self._asked is None:
            self._asked = asyncio.get_running_loop().create_future()
            self._service.thread.post(partial(self._take, self._asked))
        await asyncio.wait({self._asked}, timeout=WAIT_S)

    def _take(self, asked: asyncio.Future[None]) -> None:
        """Take a snapshot, in the engine's thread. An error must not fail the engine."""
        snapshot = None
        try:
            snapshot = take_snapshot(self._service.engine, self._service.thread.jobs)
        except Exception:
            log.exception("no snapshot of the engine")
        with suppress(RuntimeError):  # the loop has been closed
            asked.get_loop().call_soon_threadsafe(self._set, asked, snapshot)

    def _set(self, asked: asyncio.Future[None], snapshot: Snapshot | None) -> None:
        self._asked = None
        self._last = snapshot or self._last
        asked.set_result(None)
