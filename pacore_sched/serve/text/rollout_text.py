"""The text of one rollout while it is generated, and where in it each token begins."""

import codecs
from collections.abc import Callable, Collection, Iterable


class RolloutText:
    """Text that is never taken back: without half characters, and without the beginning of a stop
    string that later tokens may complete.

    `token_bytes` gives the bytes of an id (`Tokenizer.token_bytes`), `eos` are the ids that end the
    turn (none if they are ignored), and `stops` the stop strings. `offsets` has, for every id
    pushed, the number of characters that were complete before it. All texts that `push` and
    `finish` return make up the final text.
    """

    def __init__(
        self,
        token_bytes: Callable[[int], bytes],
        eos: Collection[int] = (),
        stops: Collection[str] = (),
    ) -> None:
        self.offsets: list[int] = []
        self._token_bytes, self._eos = token_bytes, eos
        self._stops = [stop.encode() for stop in stops]
        self._reach = (
            max(map(len, self._stops), default=1) - 1
        )  # bytes that later ones may complete
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._sent = 0  # characters
        self._text = ""  # decoded, not sent
        self._last = b""  # the last `_reach` bytes

    def push(self, ids: Iterable[int]) -> str:
        """The text that can be passed on after `ids`; may be ""."""
        data = self._last
        for id in ids:
            new = b"" if id in self._eos else self._token_bytes(id)
            self.offsets.append(self._sent + len(self._text))
            self._text += self._utf8.decode(new)
            data += new
        self._last = data[max(len(data) - self._reach, 0) :]
        if any(stop in data for stop in self._stops):
            return ""  # the rollout has ended, and its final text says where
        begun = max((_begun(stop, self._last) for stop in self._stops), default=b"", key=len)
        # A stop string begins a character, so the bytes before it are decoded already.
        return self._send(len(self._text) - len(begun.decode("utf-8", errors="ignore")))

    def finish(self, final_text: str) -> str:
        """The rest of `final_text`, which is `Stopping.text` of the rollout; "" after an error."""
        return final_text[self._sent :]

    def _send(self, count: int) -> str:
        text, self._text = self._text[:count], self._text[count:]
        self._sent += count
        return text


def _begun(stop: bytes, data: bytes) -> bytes:
    """The longest end of `data` with which `stop` begins, without all of it."""
    at = data.find(stop[:1], max(len(data) - len(stop) + 1, 0))
    while at >= 0 and not stop.startswith(data[at:]):
        at = data.find(stop[:1], at + 1)
    return data[at:] if at >= 0 else b""
