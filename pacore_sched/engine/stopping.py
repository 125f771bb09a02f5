"""Stop conditions: end-of-turn tokens, stop strings and length; and the text of a rollout.

Text is compared as bytes: a stop string may begin and end inside tokens, and a character may be
split between tokens. A new token costs the bytes of the few tokens before it that a stop string
could reach, however long the text is. No state is kept between calls, so a rollout may be preempted
and resumed.
"""

from collections.abc import Collection, Iterable
from functools import lru_cache
from typing import Protocol

from model.errors import InputError
from pacore_sched.sched.request import Rollout


class Vocabulary(Protocol):
    """The part of a tokenizer that is used here (model.text.tokenizer.Tokenizer has it)."""

    def token_bytes(self, id: int) -> bytes: ...


class Stopping:
    """Decides when rollouts end, and returns their text; `eos` are the ids that end a turn."""

    def __init__(self, tokenizer: Vocabulary, eos: Collection[int]) -> None:
        self.eos = frozenset(eos)
        self._tokenizer = tokenizer
        self._bytes: dict[int, bytes] = {}  # cache of token_bytes

    def reason(self, rollout: Rollout) -> str | None:
        """Whether the last of `rollout.tokens`, just sampled, ends it: "stop", "length" or None.

        Must be called for each token in turn: no earlier token may have ended the rollout.
        """
        sampling = rollout.group.sampling
        if rollout.tokens[-1] in self.eos and not sampling.ignore_eos:
            return "stop"
        if sampling.stop and self._completes_stop_string(rollout.tokens, _encoded(sampling.stop)):
            return "stop"
        return "length" if len(rollout.tokens) >= rollout.max_tokens else None

    def text(self, rollout: Rollout) -> str:
        """A rollout's text up to its stop string, without its eos; "" after an error.

        Bytes that are not UTF-8 become U+FFFD.
        """
        if rollout.finish_reason == "error":
            return ""
        tokens, sampling = rollout.tokens, rollout.group.sampling
        if rollout.finish_reason != "stop":
            return self._text_bytes(tokens).decode("utf-8", errors="replace")
        if tokens[-1] in self.eos and not sampling.ignore_eos:
            tokens = tokens[:-1]
        text = self._text_bytes(tokens)
        ends = [end for stop in _encoded(sampling.stop) if (end := text.find(stop)) >= 0]
        return text[: min(ends, default=None)].decode("utf-8", errors="replace")

    def _text_bytes(self, tokens: Iterable[int]) -> bytes:
        return b"".join(map(self._token_bytes, tokens))

    def _completes_stop_string(self, tokens: list[int], stops: tuple[bytes, ...]) -> bool:
        reach = max(map(len, stops)) - 1  # bytes before the last token that may belong to a stop
        tail = last = self._token_bytes(tokens[-1])
        index = len(tokens) - 1
        while index > 0 and len(tail) - len(last) < reach:
            index -= 1
            tail = self._token_bytes(tokens[index]) + tail
        return any(stop in tail for stop in stops)

    def _token_bytes(self, token: int) -> bytes:
        cached = self._bytes.get(token)
        if cached is None:
            cached = self._bytes[token] = self._tokenizer.token_bytes(token)
        return cached


def checked_stops(stops: Collection[str]) -> tuple[str, ...]:
    """Stop strings for `Sampling.stop`. Raises InputError for an empty or invalid one."""
    if not all(stops):
        raise InputError("a stop string is empty: it would end every rollout at once")
    try:
        "".join(stops).encode()
    except UnicodeEncodeError:
        raise InputError("a stop string is not valid Unicode") from None
    return tuple(stops)


@lru_cache
def _encoded(stops: tuple[str, ...]) -> tuple[bytes, ...]:
    return tuple(stop.encode() for stop in stops)
