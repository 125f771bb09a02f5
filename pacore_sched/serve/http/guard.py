"""What happens to every request before and after its route: id, API key, limits, log line."""

import asyncio
import hmac
import logging
import re
import secrets
import time
from collections.abc import Sequence
from typing import Protocol

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pacore_sched.serve.errors import ApiError
from pacore_sched.serve.http.logs import request_id
from pacore_sched.serve.limits import Limits
from pacore_sched.serve.page.files import FILES
from pacore_sched.serve.service import ENDING

# These need no key: health checks, scrapers and browsers have none. They tell numbers, not texts.
OPEN_PATHS = ("/health", "/version", "/metrics", "/openapi.json", "/status", *FILES)
POLL_S = 0.2  # how often a body that does not arrive looks whether the server ends
log = logging.getLogger(__name__)


class Guarded(Protocol):
    """What a Guard asks of a service."""

    limits: Limits
    ending: bool


class Guard:
    """Wraps the application of a service. `keys` are the API keys, of which a request needs one if
    there are any."""

    def __init__(self, app: ASGIApp, service: Guarded, keys: Sequence[str] = ()) -> None:
        self._app, self._service, self._limits = app, service, service.limits
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        id = _id(headers.get(b"x-request-id", b""))
        token = request_id.set(id)
        begun, status = time.monotonic(), 0
        fields: dict[str, object] = {}
        scope["log"] = fields  # which the routes fill

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", id.encode())]
            await send(message)

        try:
            if error := self._refusal(scope["path"], headers):
                response = JSONResponse(error.body, error.status, error.headers)
                await response(scope, receive, send_with_id)
            else:
                body = _Body(receive, self._service)
                await self._app(scope, body.receive, send_with_id)
        except Exception:  # the client has been told, by the application's own handler
            log.exception("a request failed")
        finally:
            seconds = round(time.monotonic() - begun, 4)
            line = {"method": scope["method"], "path": scope["path"], "status": status or None}
            if scope["path"] != "/status" or status != 200:  # pages ask every second
                log.info("request", extra=line | {"seconds": seconds} | fields)
            request_id.reset(token)

    def _refusal(self, path: str, headers: dict[bytes, bytes]) -> ApiError | None:
        if self._keys and path not in OPEN_PATHS:
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            # Compare with every key in full, so that the time tells nothing of any.
            matches = [hmac.compare_digest(given.strip(), key) for key in self._keys]
            if scheme.lower() != b"bearer" or not any(matches):
                return ApiError(401, "the API key is missing or wrong", code="invalid_api_key")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > self._limits.max_body_bytes:
            return ApiError(413, _too_large(self._limits))
        return None


class _Body:
    """A request's body on its way in: bounded in bytes and in time."""

    def __init__(self, receive: Receive, service: Guarded) -> None:
        self._receive, self._service, self._limits = receive, service, service.limits
        self._deadline = time.monotonic() + self._limits.body_timeout_s
        self._bytes, self._whole = 0, False

    async def receive(self) -> Message:
        if self._whole:  # what comes is the end of the connection
            return await self._receive()
        message = await self._next()
        self._bytes += len(message.get("body", b""))
        self._whole = not message.get("more_body", False)
        if self._bytes > self._limits.max_body_bytes:
            raise HTTPException(413, _too_large(self._limits))
        return message

    async def _next(self) -> Message:
        """The next part of the body. Raises HTTPException if it is too late, or the server ends."""
        while True:
            left = self._deadline - time.monotonic()
            try:
                async with asyncio.timeout(max(min(left, POLL_S), 0)):
                    return await self._receive()
            except TimeoutError:
                if self._service.ending:
                    raise HTTPException(503, ENDING) from None
                if left <= POLL_S:
                    seconds = f"{self._limits.body_timeout_s:g} s"
                    raise HTTPException(408, f"the body did not arrive within {seconds}") from None


def _too_large(limits: Limits) -> str:
    return f"the body is too large: it may have {limits.max_body_bytes:,} bytes"


def _id(given: bytes) -> str:
    """The client's id for a request, if it is one that logs can hold; else a new one."""
    text = given.decode("latin-1")
    return (
        text if re.fullmatch(r"[\w.:-]{1,128}", text, re.ASCII) else f"req-{secrets.token_hex(12)}"
    )
