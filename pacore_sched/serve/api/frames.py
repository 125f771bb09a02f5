"""A streamed response: server-sent events whose data are chunks of a completion."""

import json
import secrets
import time
from collections.abc import Callable
from typing import Any

DONE = "data: [DONE]\n\n"


class Frames:
    """Makes the chunks of one response, or the whole of it; `kind` is its `object`.

    usage: what every chunk has as its usage so far, if they are to have one
    """

    def __init__(
        self, prefix: str, kind: str, model: str, usage: Callable[[], dict] | None = None
    ) -> None:
        self.kind, self._usage = kind, usage
        self.head = {
            "id": f"{prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, choices: list[dict], **fields: Any) -> dict:
        return {"object": self.kind, **self.head, "choices": choices, **fields}

    def chunk(self, choices: list[dict], event: str = "", **fields: Any) -> str:
        """A frame. With `event` it is a named event, which still is a chunk: OpenAI's client reads
        every event as one, and ignores those without choices."""
        kind = self.kind if self.kind == "text_completion" else f"{self.kind}.chunk"
        data = {"object": kind, **self.head, "choices": choices}
        if self._usage:
            data["usage"] = self._usage()
        data |= fields
        return (f"event: {event}\n" if event else "") + f"data: {json.dumps(data)}\n\n"


def failure_frames(body: dict) -> str:
    """The end of a stream that fails; `body` is that of an ApiError."""
    return f"data: {json.dumps(body)}\n\n{DONE}"


def error_event(body: dict, sequence_number: int) -> str:
    """The end of a stream of /v1/responses that fails, for who does not know the response: the
    fields are those of OpenAI's type and, in `error`, what its client raises."""
    error = body["error"]
    fields = {name: error[name] for name in ("message", "code", "param")}
    data = {"type": "error", "sequence_number": sequence_number, **fields, "error": error}
    return f"event: error\ndata: {json.dumps(data)}\n\n"
