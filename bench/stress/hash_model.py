"""A model of hashes, and what a rollout on it must become without any scheduling.

The KV of a token is a hash of the whole context up to it. The next token depends on the seed, the
position, the last token and this hash. Its log-probability is a part of the hash as well: a context
that differs anywhere is seen in the first token that is drawn from it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import nan

from pacore_sched.engine.stopping import Stopping
from pacore_sched.sched.request import Sampling

# The text of each token; stop strings begin and end inside some of them.
TEXTS = (b"<eos>", b"a", b"b", b"ab", b"ba", b"c", b"\xc3", b"\xa4")
EOS = 0
PLACEHOLDER = len(TEXTS)  # the prompt id that image embeddings replace
STOP_STRINGS = ((), (), (), ("bab",), ("ca", "bb"), ("\xe4",))


class Texts:
    """The tokenizer as `Stopping` needs it."""

    def token_bytes(self, id: int) -> bytes:
        return TEXTS[id]


STOPPING = Stopping(Texts(), [EOS])


def extend(context: int, token: int, position: int) -> int:
    """The hash of a context after one more token."""
    return hash((context, token, position))  # hashes of ints are the same in every process


@dataclass(frozen=True)
class HashModel:
    """How texts look: of `surprise` tokens, one is random and the others follow a fixed cycle,
    which drafts predict. One of `failure` draws finds NaN; 0 is never."""

    surprise: int
    failure: int

    def draw(self, seed: int, position: int, context: int, last: int) -> tuple[int, float]:
        """The token at a position and its log-probability; -1 and NaN for NaN logits."""
        bits = hash((seed, position, context))
        if self.failure and bits % self.failure == 0:
            return -1, nan
        bits >>= 12
        token = last % (len(TEXTS) - 1) + 1 if bits % self.surprise else (bits >> 8) % len(TEXTS)
        return token, -((bits >> 16) % 65536) / 4096


@dataclass(frozen=True)
class Expected:
    """What a rollout is when it ends by itself."""

    tokens: list[int]
    logprobs: list[float]
    reason: str
    text: str


def expected(
    model: HashModel, prompt: Sequence[int], seed: int, max_tokens: int, sampling: Sampling
) -> Expected:
    """A rollout over `prompt`, one token after the other."""
    context = 0
    for position, token in enumerate(prompt):
        context = extend(context, token, position)
    stops = [stop.encode() for stop in sampling.stop]
    tokens: list[int] = []
    logprobs: list[float] = []
    text, reason, last = b"", "", prompt[-1]
    while not reason:
        position = len(prompt) + len(tokens)
        last, logprob = model.draw(seed, position, context, last)
        if last < 0:
            return Expected(tokens, logprobs, "error", "")
        tokens.append(last)
        logprobs.append(logprob)
        context = extend(context, last, position)
        if last == EOS and not sampling.ignore_eos:
            reason = "stop"
            break
        text += TEXTS[last]
        ends = [text.find(stop) for stop in stops if stop in text]
        if ends:
            text, reason = text[: min(ends)], "stop"
        elif len(tokens) == max_tokens:
            reason = "length"
    return Expected(tokens, logprobs, reason, text.decode(errors="replace"))
