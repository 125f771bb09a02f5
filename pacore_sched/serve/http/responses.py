"""Responses that end with their client: when it leaves, its request is closed at once."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable
from contextlib import suppress
from typing import Protocol, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from pacore_sched.serve.errors import ApiError

T = TypeVar("T")
PING_S = 15.0  # a comment after this long in silence, so that proxies keep the connection
SEND_TIMEOUT_S = 60.0  # for a client to read on
CLIENT_LEFT = 499  # nginx's status for it; only logs see it
log = logging.getLogger(__name__)


class Answering(Protocol):
    """A request as these functions see it (api/chat.py, api/completions.py, api/responses)."""

    async def submit(self) -> None: ...

    async def whole(self) -> dict: ...

    def chunks(self) -> AsyncIterator[str]: ...

    def failure(self, error: ApiError) -> str: ...

    def close(self) -> None: ...


class ClientLeft(Exception):
    """The client has closed the connection."""


async def respond(request: Request, answer: Answering, *, stream: bool) -> Response:
    """Submit a request; returns its response. Raises ApiError if it fails."""
    streams = False
    try:
        await _until_left(request.receive, answer.submit())
        if stream:
            streams = True
            return EventStream(answer)
        return JSONResponse(await _until_left(request.receive, answer.whole()))
    except ClientLeft:
        return Response(status_code=CLIENT_LEFT)
    finally:
        if not streams:
            answer.close()


class EventStream(Response):
    """A streamed response; closes its request in the end."""

    def __init__(self, answer: Answering) -> None:
        self.status_code, self.background = 200, None
        self.init_headers({"Content-Type": "text/event-stream; charset=utf-8",
                           "Cache-Control": "no-store", "X-Accel-Buffering": "no"})  # fmt: skip
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with suppress(ClientLeft):
                await _until_left(receive, self._write(send, scope["log"]))
        finally:
            self._answer.close()

    async def _write(self, send: Send, log_fields: dict) -> None:
        async def put(text: str, *, more: bool = True) -> None:
            body = {"type": "http.response.body", "body": text.encode(), "more_body": more}
            try:
                async with asyncio.timeout(SEND_TIMEOUT_S):
                    await send(body)
            except TimeoutError:
                raise ClientLeft from None

        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        try:
            async for frame in _with_pings(self._answer.chunks()):
                await put(frame)
        except ApiError as error:
            log_fields["error"] = error.message
            await put(self._answer.failure(error))
        except ClientLeft:
            raise
        except Exception:
            log.exception("a stream failed")
            await put(self._answer.failure(ApiError(500, "the server failed")))
        await put("", more=False)


async def _until_left(receive: Receive, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client leaves: raises ClientLeft then."""
    task = asyncio.ensure_future(work)
    left = asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait({task, left}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientLeft
        return task.result()
    finally:
        for future in (task, left):
            future.cancel()
        await asyncio.gather(task, left, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _with_pings(frames: AsyncIterator[str]) -> AsyncIterator[str]:
    """The frames, and comments in long silences."""
    following = asyncio.ensure_future(anext(frames, None))
    try:
        while True:
            done, _ = await asyncio.wait({following}, timeout=PING_S)
            if not done:
                yield ": still working\n\n"
                continue
            frame = following.result()
            if frame is None:
                return
            following = asyncio.ensure_future(anext(frames, None))
            yield frame
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
