"""Where a rollout's text ends: at an end-of-turn token, at a stop string, or at its last token.

Tokens are compared as the bytes that they stand for: a stop string may begin and end anywhere
within tokens, and so may the characters of either. Looking at a new token takes the bytes of the
few tokens before it that a stop string could reach back into, whatever the text's length, and
nothing is remembered between calls: a rollout may be put aside and taken up again.
"""

from collections.abc import Collection, Iterable
from functools import lru_cache
from typing import Protocol

from model.errors import InputError
from pacore_sched.sched.request import Rollout


class Vocabulary(Protocol):
    """What is asked of a tokenizer: model.text.tokenizer.Tokenizer has it."""

    def token_bytes(self, id: int) -> bytes: ...


class Stopping:
    """Says when rollouts end, and what text they have then; `eos` are the ids that end a turn."""

    def __init__(self, tokenizer: Vocabulary, eos: Collection[int]) -> None:
        self.eos = frozenset(eos)
        self._tokenizer = tokenizer
        self._bytes: dict[int, bytes] = {}  # of the tokens seen so far

    def reason(self, rollout: Rollout) -> str | None:
        """Whether the last of `rollout.tokens`, just drawn, ends it: "stop", "length" or None.

        To be called for each token in turn: the tokens before the last one must not have ended it.
        """
        sampling = rollout.group.sampling
        if rollout.tokens[-1] in self.eos and not sampling.ignore_eos:
            return "stop"
        if sampling.stop and self._completes_a_stop(rollout.tokens, _encoded(sampling.stop)):
            return "stop"
        return "length" if len(rollout.tokens) >= rollout.max_tokens else None

    def text(self, rollout: Rollout) -> str:
        """What a rollout said, up to its stop string and without its eos; "" after an error.

        Bytes that are not UTF-8 become U+FFFD.
        """
        if rollout.finish_reason == "error":
            return ""
        tokens, sampling = rollout.tokens, rollout.group.sampling
        if rollout.finish_reason != "stop":
            return self._said(tokens).decode("utf-8", errors="replace")
        if tokens[-1] in self.eos and not sampling.ignore_eos:
            tokens = tokens[:-1]
        said = self._said(tokens)
        ends = [end for stop in _encoded(sampling.stop) if (end := said.find(stop)) >= 0]
        return said[: min(ends, default=None)].decode("utf-8", errors="replace")

    def _said(self, tokens: Iterable[int]) -> bytes:
        return b"".join(map(self._token_bytes, tokens))

    def _completes_a_stop(self, tokens: list[int], stops: tuple[bytes, ...]) -> bool:
        reach = max(map(len, stops)) - 1  # bytes before the last token that may belong to a stop
        tail = last = self._token_bytes(tokens[-1])
        place = len(tokens) - 1
        while place > 0 and len(tail) - len(last) < reach:
            place -= 1
            tail = self._token_bytes(tokens[place]) + tail
        return any(stop in tail for stop in stops)

    def _token_bytes(self, token: int) -> bytes:
        known = self._bytes.get(token)
        if known is None:
            known = self._bytes[token] = self._tokenizer.token_bytes(token)
        return known


def checked_stops(stops: Collection[str]) -> tuple[str, ...]:
    """Stop strings as `Sampling.stop` wants them. Raises InputError for an empty one."""
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
