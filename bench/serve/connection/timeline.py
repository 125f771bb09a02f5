"""What was received of a request, as times and tokens."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from bench.serve.connection.client import Exchange
from model.errors import shown

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
    shows_all: whether a stream has all tokens of the usage, in one text
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
    shows_all: bool = True

    @property
    def ttft_s(self) -> float | None:
        """To the first text; None for an answer that was not streamed or has no text."""
        return self.chunk_s[0] if self.chunk_s else None

    @property
    def tpot_s(self) -> float | None:
        """The mean time per token after the first; None for fewer than two tokens, no stream, or
        one that does not show all tokens."""
        if self.ttft_s is None or self.output < 2 or not self.shows_all:
            return None
        return (self.end_s - self.ttft_s) / (self.output - 1)

    @property
    def itl_s(self) -> list[float]:
        """The intervals between chunks with text, whatever their number of tokens."""
        return [after - before for before, after in zip(self.chunk_s, self.chunk_s[1:])]  # noqa: B905


def timeline(exchange: Exchange, *, stream: bool, shows_all: bool = True) -> Timeline:
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
    if failure is None and read.counts is None:
        failure = "no usage in the answer"
    if failure is None and not read.texts:
        failure = "no choices in the answer"
    prompt, output, cached = read.counts or (0, 0, 0)
    return Timeline(
        sent_s=sent,
        end_s=exchange.ended_s - sent,
        late_s=sent - exchange.due_s,
        chunk_s=tuple(time - sent for time in read.chunk_s),
        ids=tuple(read.ids),
        texts=tuple(text for _, text in sorted(read.texts.items())),
        prompt=prompt,
        output=output,
        cached=cached,
        failure=failure,
        detail=detail,
        shows_all=shows_all,
    )


def _failure(exchange: Exchange) -> tuple[str | None, str]:
    if exchange.status not in (0, 200):
        return f"status {exchange.status}", _message(exchange.data)
    return exchange.error or None, ""


def _message(data: bytes) -> str:
    """The message of an error's body, in OpenAI's form or in FastAPI's."""
    try:
        body = json.loads(data)
        return _words(body["error"]) if "error" in body else str(body["detail"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return data[:200].decode(errors="replace")


def _words(error: object) -> str:
    """What an `error` says, which is an object in OpenAI's form."""
    return str(error.get("message") or error if isinstance(error, dict) else error)


class _Reader:
    """Collects the parts of a response.

    counts: tokens of the prompt, of the answer, and of the prompt from a cache
    """

    def __init__(self) -> None:
        self.chunk_s: list[float] = []
        self.ids: dict[str, None] = {}
        self.texts: dict[int, str] = {}
        self.counts: tuple[int, int, int] | None = None
        self.error = ""
        self.done = False

    def whole(self, exchange: Exchange) -> None:
        self._read(exchange.data, "the body")

    def stream(self, exchange: Exchange) -> None:
        for time, data in frames(exchange.reads):
            if data == b"[DONE]":
                self.done = True
                return
            if self._read(data, "a chunk"):
                self.chunk_s.append(time)
            if self.error:
                return

    def _read(self, data: bytes, what: str) -> bool:
        """Take a chunk or a whole answer in JSON; returns whether it has text. Does not raise."""
        try:
            chunk = json.loads(data)
        except (ValueError, RecursionError):
            self.error = f"{what} is not JSON"
            return False
        try:
            if chunk.get("error"):
                self.error = _words(chunk["error"])
                return False
            return self._take(chunk)
        except (AttributeError, TypeError, ValueError, OverflowError):
            self.error = f"{what} is not of OpenAI's form: {shown(chunk)}"
            return False

    def _take(self, chunk: dict[str, Any]) -> bool:
        self.ids[str(chunk.get("id"))] = None
        if usage := chunk.get("usage"):
            self.counts = _counts(usage)
        has_text = False
        for choice in chunk.get("choices") or ():
            part = choice.get("delta") or choice.get("message") or {}
            text = "".join(part.get(name) or "" for name in TEXTS) + (choice.get("text") or "")
            index = int(choice.get("index") or 0)
            self.texts[index] = self.texts.get(index, "") + text
            has_text = has_text or bool(text or part.get("tool_calls"))
        return has_text


def _counts(usage: dict[str, Any]) -> tuple[int, int, int] | None:
    """Tokens of the prompt, of the answer, and from a cache; None if it does not tell them."""
    prompt, output = usage.get("prompt_tokens"), usage.get("completion_tokens")
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    if isinstance(prompt, int) and isinstance(output, int) and isinstance(cached, int):
        return prompt, output, cached
    return None


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
