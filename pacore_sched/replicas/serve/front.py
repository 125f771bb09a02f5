"""The application before the replicas: it reads requests, chooses a replica for each, and passes on
its response."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Protocol

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from pacore_sched.replicas.serve.affinity import Affinity
from pacore_sched.replicas.serve.forwarding import LOG, ForwardedRequest
from pacore_sched.replicas.serve.merged_metrics import merged
from pacore_sched.replicas.serve.prompt_keys import PromptKeys, prompt_keys
from pacore_sched.serve.api.frames import error_event, failure_frames
from pacore_sched.serve.errors import ApiError
from pacore_sched.serve.http import validation
from pacore_sched.serve.http.app import METRICS_TYPE
from pacore_sched.serve.http.logs import request_id
from pacore_sched.serve.http.responses import SEND_TIMEOUT_S
from pacore_sched.serve.limits import Limits
from pacore_sched.serve.page.files import FILES, page_file
from pacore_sched.serve.service import END_S, ENDING, ServiceState

RESPONSES = "/v1/responses"
COMPLETIONS = ("/v1/chat/completions", "/v1/completions", RESPONSES)
ASK_S = 5.0  # for a replica to tell its metrics or status
MAX_SHOWN = 16  # replicas in /status
RETRY_S = 5  # after the last replica was lost


class ReplicaLost(Exception):
    """The replica ended, or is not the one that was asked."""


class Replicas(Protocol):
    def running(self) -> Sequence[str]:
        """The names of the replicas that take requests."""

    def call(self, request: ForwardedRequest) -> AsyncGenerator[list[Message], None]:
        """The response of the request's replica (forwarding.answer); closing it ends the request.
        Raises ReplicaLost."""


class Front:
    """The ASGI application; put a Guard around it.

    draining, ending: as of a Service
    """

    def __init__(self, replicas: Replicas, limits: Limits) -> None:
        self.limits, self.draining, self.ending = limits, False, False
        self.affinity = Affinity()
        self._replicas = replicas
        self._running: set[asyncio.Future[None]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            for kind in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{kind}.complete"})
            return
        reply = _Reply(scope, send)
        try:
            if response := await self._own(scope["method"], scope["path"]):
                await response(scope, receive, send)
            else:
                await self._forward(scope, receive, reply)
        except HTTPException as error:
            await reply.fail(validation.of_http(error))
        except ApiError as error:
            await reply.fail(error)

    async def drain(self, seconds: float) -> None:
        """Refuse new requests, wait for those that run, then fail the rest."""
        self.draining = True
        deadline = time.monotonic() + seconds
        while self._running and time.monotonic() < deadline and not self.ending:
            await asyncio.sleep(0.05)
        self.ending = True
        for work in self._running:
            work.cancel()
        deadline = time.monotonic() + END_S
        while self._running and time.monotonic() < deadline:
            await asyncio.sleep(0.05)

    async def _own(self, method: str, path: str) -> Response | None:
        """The response to what the front answers itself; None for what a replica answers."""
        if path == "/health" and method in ("GET", "HEAD"):
            return self._health()
        if method != "GET":
            return None
        if path == "/metrics":
            texts = await self._ask(path, self._replicas.running())
            return Response(merged(texts), media_type=METRICS_TYPE)
        if path == "/status":
            return await self._status()
        return page_file(path) if path in FILES else None

    @property
    def _state(self) -> ServiceState:
        return "draining" if self.draining else "ok" if self._replicas.running() else "failed"

    def _health(self) -> Response:
        record = {"status": self._state, "replicas": len(self._replicas.running())}
        return JSONResponse(record, 200 if record["status"] == "ok" else 503)

    async def _status(self) -> Response:
        """The status of each replica, as of one server, by its name."""
        names = sorted(self._replicas.running())
        texts = await self._ask("/status", names[:MAX_SHOWN])
        found = {name: json.loads(text) for name, text in texts.items()}
        replicas = {name: part for name, part in found.items() if "state" in part}  # no errors
        record = {
            "state": self._state,
            "replicas": replicas,
            "replicas_left_out": len(names) - len(replicas),
        }
        return JSONResponse(record)

    async def _ask(self, path: str, names: Sequence[str]) -> dict[str, str]:
        """What replicas answer to a GET; without those that do not in time."""
        texts = await asyncio.gather(*(self._answer_of(name, path) for name in names))
        return {name: text for name, text in zip(names, texts, strict=True) if text is not None}

    async def _answer_of(self, replica: str, path: str) -> str | None:
        request, body = ForwardedRequest(replica, "GET", path), b""
        try:
            async with asyncio.timeout(ASK_S), aclosing(self._replicas.call(request)) as parts:
                async for part in parts:
                    body += b"".join(message.get("body", b"") for message in part)
        except (ReplicaLost, TimeoutError):
            return None
        return body.decode()

    async def _forward(self, scope: Scope, receive: Receive, reply: "_Reply") -> None:
        """Pass a request on, until its client leaves or the server ends."""
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
        prompt = PromptKeys()
        if scope["path"] in COMPLETIONS:
            if self.draining:
                raise ApiError(503, ENDING, retry_after=RETRY_S)
            prompt = await asyncio.to_thread(prompt_keys, bytes(body))
        work = asyncio.ensure_future(self._pass_on(scope, bytes(body), prompt, reply))
        left = asyncio.ensure_future(_left(receive))
        self._running.add(work)
        try:
            await asyncio.wait({work, left}, return_when=asyncio.FIRST_COMPLETED)
            if reply.whole:
                await asyncio.wait({work})  # for the fields of the log line
            if work.cancelled():
                raise ApiError(503, ENDING)
            if work.done():
                work.result()
        finally:
            for future in (work, left):
                future.cancel()
            await asyncio.gather(work, left, return_exceptions=True)
            self._running.discard(work)

    async def _pass_on(
        self, scope: Scope, body: bytes, prompt: PromptKeys, reply: "_Reply"
    ) -> None:
        """Answer from the replica of choice; from others if that is full, and from one more if it
        is lost before it has answered."""
        tried: set[str] = set()
        lost = False
        while names := [name for name in self._replicas.running() if name not in tried]:
            replica = self.affinity.choose(prompt, names)
            tried.add(replica)
            request = ForwardedRequest(
                replica,
                scope["method"],
                scope["path"],
                scope["query_string"],
                list(scope["headers"]),
                body,
                request_id.get(),
            )
            try:
                async with aclosing(self._replicas.call(request)) as parts:
                    scope["log"]["replica"] = replica
                    if await reply.take(parts, pass_full=len(names) == 1):
                        return
            except ReplicaLost:
                if reply.whole:
                    return
                if reply.started or lost:
                    break
                lost = True
            finally:
                self.affinity.release(replica, prompt)
        why = "the replica of this request ended" if tried else "no replica is ready"
        raise ApiError(503, why, retry_after=RETRY_S)


class _Reply:
    """The response to one client: whether it has `started`, and whether the `whole` is sent."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self.started = self.whole = False
        self._scope, self._send = scope, send
        self._is_stream = False
        self._frames = 0  # sent, pings among them

    async def take(self, parts: AsyncGenerator[list[Message], None], *, pass_full: bool) -> bool:
        """Pass a response on. False if it has status 429 and `pass_full` is not set."""
        async for part in parts:
            for message in part:
                if message["type"] == LOG:
                    self._scope["log"].update(message["fields"])
                    continue
                if message.get("status") == 429 and not pass_full:
                    return False
                await self._put(message)
        return True

    async def fail(self, error: ApiError) -> None:
        self._scope["log"]["error"] = error.message
        if not self.started:
            response = JSONResponse(error.body, error.status, error.headers)
            await response(self._scope, _never, self._put)
        elif self._is_stream:
            if self._scope["path"] == RESPONSES:
                text = error_event(error.body, self._frames)
            else:
                text = failure_frames(error.body)
            await self._put({"type": "http.response.body", "body": text.encode()})
        else:
            raise error  # ends the connection

    async def _put(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            kind = dict(message["headers"]).get(b"content-type", b"")
            self._is_stream = kind.startswith(b"text/event-stream")
        async with asyncio.timeout(SEND_TIMEOUT_S):
            await self._send(message)
        self._frames += message.get("body", b"").count(b"\n\n")
        self.whole = message["type"] == "http.response.body" and not message.get("more_body")


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _never() -> Message:
    raise AssertionError("a response reads no request")
