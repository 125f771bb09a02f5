"""A streamed response: server-sent events whose data are chunks of a completion."""

import json
import secrets
import time
from typing import Any

DONE = "data: [DONE]\n\n"


class Frames:
    """Makes the chunks of one response, or the whole of it; `kind` is its `object`."""

    def __init__(self, prefix: str, kind: str, model: str) -> None:
        self.kind = kind
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
        data = {"object": kind, **self.head, "choices": choices, **fields}
        return (f"event: {event}\n" if event else "") + f"data: {json.dumps(data)}\n\n"


def error_frame(body: dict) -> str:
    return f"data: {json.dumps(body)}\n\n"
