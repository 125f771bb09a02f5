"""Log-probabilities of tokens in the forms of chat and of text completions."""

import math
from collections.abc import Iterable, Sequence

from model.text.tokenizer import Tokenizer

LEAST = -9999.0  # what JSON has for minus infinity


def finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else LEAST


class TokenTexts:
    """Tokens as text and bytes; control tokens are shown by their names."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def bytes(self, id: int) -> bytes:
        name = self._tokenizer.added.get(id, "") if id in self._tokenizer.special else ""
        return name.encode() or self._tokenizer.token_bytes(id)

    def text(self, id: int) -> str:
        return self.bytes(id).decode("utf-8", errors="replace")

    def chat(
        self,
        ids: Sequence[int],
        logprobs: Sequence[float],
        tops: Sequence[Sequence[tuple[int, float]]],
    ) -> list[dict]:
        """The entries of `logprobs.content`. `tops` may be empty."""
        padded = tops or [()] * len(ids)
        return [
            self._entry(id, logprob)
            | {"top_logprobs": [self._entry(other, value) for other, value in top]}
            for id, logprob, top in zip(ids, logprobs, padded, strict=True)
        ]

    def completion(
        self,
        ids: Sequence[int],
        logprobs: Iterable[float | None],
        tops: Sequence[Sequence[tuple[int, float]] | None],
        offsets: Sequence[int],
    ) -> dict:
        """The `logprobs` of a choice; token i begins at character `offsets[i]` of its text. `tops`
        may be empty; a prompt's first token has None, in it and in `logprobs`."""
        return {
            "tokens": [self.text(id) for id in ids],
            "token_logprobs": [None if value is None else finite(value) for value in logprobs],
            "top_logprobs": [
                None if top is None else {self.text(id): finite(value) for id, value in top}
                for top in tops
            ]
            if tops
            else None,
            "text_offset": list(offsets),
        }

    def _entry(self, id: int, logprob: float) -> dict:
        data = self.bytes(id)
        return {
            "token": data.decode("utf-8", errors="replace"),
            "logprob": finite(logprob),
            "bytes": list(data),
        }
