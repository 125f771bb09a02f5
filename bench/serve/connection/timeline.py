"""What was received of a request, as times and tokens."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from bench.serve.connection.client import Exchange

TEXTS = ("reasoning_content", "reasoning", "content")  # of a message or delta, in this order


@dataclass(frozen=True)
class Timeline:
    """One request; times are in seconds since it was sent, but for `sent_s`.

    late_s: from the time at which it was due to its sending
    chunk_s: when chunks with text came; a stream's first chunk, with only a role, is none of them
    texts: of each choice, reasoning and content together; calls of tools are not in it
    prompt, output, cached: tokens, as the server's `usage` counts them
    failure: what went wrong, in a few words, or None
    detail: the server's own words for it
    """

    sent_s: float
    end_s: float
    late_s: float = 0.0
    chunk_s: tuple[float, ...] = ()
    ids: tuple[str, ...] = ()  # of the completion
    texts: tuple[str, ...] = ()
    prompt: int = 0
    output: int = 0
    cached: int = 0
    failure: str | None = None
    detail: str = ""

    @property
    def ttft_s(self) -> float | None:
        """To the first text; None for an answer that was not streamed or has no text."""
        return self.chunk_s[0] if self.chunk_s else None

    @property
    def tpot_s(self) -> float | None:
        """The mean time per token after the first; None for fewer than two tokens, or no stream."""
        if self.ttft_s is None or self.output < 2:
            return None
        return (self.end_s - self.ttft_s) / (self.output - 1)

    @property
    def itl_s(self) -> list[float]:
        """The intervals between chunks with text, whatever their number of tokens."""
        return [after - before for before, after in zip(self.chunk_s, self.chunk_s[1:])]  # noqa: B905


def timeline(exchange: Exchange, *, stream: bool) -> Timeline:
    """Read an exchange. Counts tokens by `usage`, never by chunks."""
    sent = exchange.sent_s
    read = _Reader()
    failure, detail = _failure(exchange)
    if failure is None and stream:
        read.stream(exchange)
        if not read.done and not read.error:
            failure = "stream cut short"
    elif failure is None:
        read.whole(exchange)
    if failure is None and read.error:
        failure, detail = "error in the stream", read.error
    if failure is None and not read.usage:
        failure = "no usage in the answer"
    details = read.usage.get("prompt_tokens_details") or {}
    return Timeline(
        sent_s=sent,
        end_s=exchange.ended_s - sent,
        late_s=sent - exchange.due_s,
        chunk_s=tuple(time - sent for time in read.chunk_s),
        ids=tuple(read.ids),
        texts=tuple(text for _, text in sorted(read.texts.items())),
        prompt=read.usage.get("prompt_tokens", 0),
        output=read.usage.get("completion_tokens", 0),
        cached=details.get("cached_tokens") or 0,
        failure=failure,
        detail=detail,
    )


def _failure(exchange: Exchange) -> tuple[str | None, str]:
    if exchange.status not in (0, 200):
        return f"status {exchange.status}", _message(exchange.data)
    return exchange.error or None, ""


def _message(data: bytes) -> str:
    """The message of an error's body, in OpenAI's form or in FastAPI's."""
    try:
        body = json.loads(data)
        return str(body["error"]["message"] if "error" in body else body["detail"])
    except (ValueError, KeyError, TypeError):
        return data[:200].decode(errors="replace")


class _Reader:
    """Collects the parts of a response."""

    def __init__(self) -> None:
        self.chunk_s: list[float] = []
        self.ids: dict[str, None] = {}
        self.texts: dict[int, str] = {}
        self.usage: dict[str, Any] = {}
        self.error = ""
        self.done = False

    def whole(self, exchange: Exchange) -> None:
        try:
            self._take(json.loads(exchange.data))
        except ValueError:
            self.error = "the body is not JSON"

    def stream(self, exchange: Exchange) -> None:
        for time, data in frames(exchange.reads):
            if data == b"[DONE]":
                self.done = True
                return
            try:
                chunk = json.loads(data)
            except ValueError:
                self.error = "a chunk is not JSON"
                return
            if "error" in chunk:
                self.error = str((chunk["error"] or {}).get("message", ""))
            elif self._take(chunk):
                self.chunk_s.append(time)

    def _take(self, chunk: dict[str, Any]) -> bool:
        """Take a chunk or a whole answer; returns whether it has text."""
        self.ids[str(chunk.get("id"))] = None
        self.usage = chunk.get("usage") or self.usage
        has_text = False
        for choice in chunk.get("choices", ()):
            part = choice.get("delta") or choice.get("message") or {}
            text = "".join(part.get(name) or "" for name in TEXTS) + (choice.get("text") or "")
            index = choice.get("index", 0)
            self.texts[index] = self.texts.get(index, "") + text
            has_text = has_text or bool(text or part.get("tool_calls"))
        return has_text


def frames(reads: list[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    """The data of server-sent events, each with the time at which its end was received."""
    buffer = b""
    for time, data in reads:
        buffer += data.replace(b"\r", b"")
        *events, buffer = buffer.split(b"\n\n")
        for event in events:
            lines = [line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:")]
            if lines:
                yield time, b"\n".join(lines)
