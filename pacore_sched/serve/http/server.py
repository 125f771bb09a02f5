"""The web server process: its socket, and how it ends."""

import asyncio
import socket
from types import FrameType
from typing import Protocol

import uvicorn
from starlette.types import ASGIApp

from model.errors import InputError


def bound_socket(host: str, port: int) -> socket.socket:
    """A listening socket. Raises InputError if the address cannot be used."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot listen at --host {host} --port {port}: {reason}") from None


def url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Drained(Protocol):
    """What a Server asks of a service, such as serve/service.py's."""

    draining: bool
    ending: bool

    async def drain(self, seconds: float) -> None: ...


class Server(uvicorn.Server):
    """Drains the service at the first SIGINT or SIGTERM, fails what is left at the second, and ends
    without an answer at the third."""

    def __init__(self, app: ASGIApp, service: Drained, drain_s: float) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=5,
                lifespan="on",
            )
        )
        self._service, self._drain_s = service, drain_s
        self._drain: asyncio.Task[None] | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._service.ending:
            self.should_exit = self.force_exit = True
        elif self._service.draining:
            self._service.ending = True
        else:
            self._service.draining = True
            self._loop.call_soon_threadsafe(self._begin_drain)

    def _begin_drain(self) -> None:
        self._drain = asyncio.ensure_future(self._drain_and_exit())

    async def _drain_and_exit(self) -> None:
        await self._service.drain(self._drain_s)
        self.should_exit = True
