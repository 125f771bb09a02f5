"""A request on its way to a replica, and the replica's application answering it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field

from starlette.types import ASGIApp, Message

from pacore_sched.serve.http.logs import request_id

LOG = "pacore.log"  # type of the last message: the fields of the request's log line


@dataclass(frozen=True)
class ForwardedRequest:
    """An HTTP request whose body has arrived. `replica` is the one that it is for."""

    replica: str
    method: str
    path: str
    query: bytes = b""
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    body: bytes = b""
    id: str | None = None


async def answer(app: ASGIApp, request: ForwardedRequest) -> AsyncIterator[list[Message]]:
    """The messages of the application's response, as many at a time as there are, and a last one
    for the log. When the iterator is closed or cancelled, the application is."""
    fields: dict[str, object] = {}
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "scheme": "http",
        "root_path": "",
        "method": request.method,
        "path": request.path,
        "raw_path": request.path.encode(),
        "query_string": request.query,
        "headers": request.headers,
        "log": fields,
    }
    body: list[Message] = [{"type": "http.request", "body": request.body, "more_body": False}]
    messages: asyncio.Queue[Message | None] = asyncio.Queue()

    async def receive() -> Message:
        if not body:
            await asyncio.Event().wait()  # a client that leaves cancels the application
        return body.pop()

    async def run() -> None:
        request_id.set(request.id)
        try:
            await app(scope, receive, messages.put)
        finally:
            messages.put_nowait(None)

    running = asyncio.ensure_future(run())
    try:
        while True:
            part = [await messages.get()]
            while not messages.empty():
                part.append(messages.get_nowait())
            whole = [message for message in part if message is not None]
            if len(whole) == len(part):
                yield whole
                continue
            with suppress(Exception):  # answered with status 500, or in the stream
                await running
            yield [*whole, {"type": LOG, "fields": fields}]
            return
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
