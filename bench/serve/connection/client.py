"""An HTTP client that only notes what it receives and when; `timeline` makes sense of it later.

Nothing is parsed while requests run, so that one core can read many streams without delaying them.
"""

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

from model.errors import InputError, shown

if TYPE_CHECKING:
    import aiohttp

READ_S = 600.0  # without a byte of an answer for so long, a request has failed
KEEP_S = 2.0  # for an idle connection; less than servers keep it (uvicorn: 5 s)


@dataclass
class Exchange:
    """A request and its response. Times are of time.perf_counter.

    reads: what was received, and when
    error: why there is no whole response; "" if there is one
    left: whether the client closed the connection before the end, on purpose
    """

    due_s: float = 0.0
    sent_s: float = 0.0
    ended_s: float = 0.0
    status: int = 0
    request_id: str = ""
    reads: list[tuple[float, bytes]] = field(default_factory=list)
    error: str = ""
    left: bool = False

    @property
    def data(self) -> bytes:
        return b"".join(data for _, data in self.reads)


class Client:
    """Sends requests to one server. Use it as an asynchronous context."""

    def __init__(self, url: str, key: str | None = None) -> None:
        """`url` may end with /v1, as for OpenAI's client, or not."""
        self.url = url.rstrip("/").removesuffix("/v1")
        self._headers = {"Content-Type": "application/json"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"

    async def __aenter__(self) -> "Client":
        try:
            import aiohttp
        except ImportError:
            raise InputError("serve needs aiohttp: pip install 'step3vl-pacore[bench]'") from None
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_S),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=READ_S),
            headers=self._headers,
            read_bufsize=2**20,
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._session.close()

    async def send(
        self,
        path: str,
        body: bytes,
        *,
        request_id: str = "",
        leave: Callable[[Exchange], bool] = lambda exchange: False,
    ) -> Exchange:
        """Send a body and read the response until its end, or until `leave` says after a read that
        the connection is to be closed. Does not raise."""
        headers = {"X-Request-ID": request_id} if request_id else {}
        exchange = Exchange(sent_s=time.perf_counter())
        try:
            async with self._session.post(self.url + path, data=body, headers=headers) as response:
                await self._read(exchange, response, leave)
        except Exception as error:  # aiohttp's, of the system, or a timeout
            exchange.error = _named(error)
        exchange.ended_s = exchange.reads[-1][0] if exchange.reads else time.perf_counter()
        return exchange

    async def _read(
        self,
        exchange: Exchange,
        response: "aiohttp.ClientResponse",
        leave: Callable[[Exchange], bool],
    ) -> None:
        exchange.status = response.status
        exchange.request_id = response.headers.get("X-Request-ID", "")
        async for data in response.content.iter_any():
            exchange.reads.append((time.perf_counter(), data))
            if leave(exchange):
                exchange.left = True
                response.close()
                return

    async def get(self, path: str) -> tuple[int, bytes]:
        """The status and body of a path. Raises InputError if the server cannot be reached."""
        try:
            async with self._session.get(self.url + path) as response:
                return response.status, await response.read()
        except Exception as error:
            raise InputError(f"no answer from {self.url}{path}: {_named(error)}") from None

    async def json(self, path: str, body: object = None) -> Any:  # noqa: ANN401
        """What a path answers, a `body` being posted; None unless that is status 200 and JSON.
        Raises InputError as `get` does, and for status 401."""
        if body is None:
            status, data = await self.get(path)
        else:
            exchange = await self.send(path, json.dumps(body).encode())
            if exchange.error:
                raise InputError(f"no answer from {self.url}{path}: {exchange.error}")
            status, data = exchange.status, exchange.data
        if status == 401:
            raise InputError(f"{self.url}{path}: status 401: the server wants another API key")
        try:
            return json.loads(data) if status == 200 else None
        except (ValueError, RecursionError):
            return None


def _named(error: BaseException) -> str:
    if isinstance(error, asyncio.TimeoutError):
        return "timeout"
    system = getattr(error, "os_error", error)
    if isinstance(system, OSError) and system.strerror:
        return system.strerror.lower()
    return f"{type(error).__name__}: {shown(str(error))}"
