"""Requests as the scheduler sees them: groups of rollouts that share one prompt.

A prompt is a path of segments and one last token. Each segment is prefilled once into its own node
and then shared: a leading image by all rounds of its problem, a round's prompt by its rollouts. The
last token is instead the first token of every rollout's own node. Starting a rollout, decoding it
and resuming it are then the same operation: write the tokens that are known but not yet written,
and sample the next token after the last of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from model.errors import InputError

MAX_TOP_LOGPROBS = 20

TopLogprobs = tuple[tuple[int, float], ...]  # the most likely tokens, and their log-probabilities


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters; temperature 0 is greedy, top_k 0 and top_p 1 truncate nothing.

    logprobs: whether tokens come with "raw" log-probabilities, under the model's own distribution,
    or with "processed" ones, under the distribution that they are drawn from
    top_logprobs: how many of the most likely tokens come with each sampled one, with their
    log-probabilities of the same kind, at most MAX_TOP_LOGPROBS. Tokens of probability 0, such as
    truncated ones, are left out
    """

    max_tokens: int = 512
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    logprobs: str = "raw"
    top_logprobs: int = 0
    stop: tuple[str, ...] = ()  # a rollout ends where its text contains one of these
    ignore_eos: bool = False  # for rollouts of a fixed length


def check_top_logprobs(count: int) -> None:
    """Raise InputError for a number of alternatives that is out of range."""
    if not 0 <= count <= MAX_TOP_LOGPROBS:
        raise InputError(f"top_logprobs must be from 0 to {MAX_TOP_LOGPROBS}, not {count}")


def _ready() -> bool:
    return True


@dataclass(eq=False, slots=True)
class Segment:
    """A run of prompt tokens that several rollouts share.

    content: what identifies its tokens, for the prefix cache (prefix_cache.py); empty: nothing does
    salt: prompts find only each other's KV if theirs is the same
    """

    tokens: int  # how many
    inputs: object = None  # what the executor computes their embeddings from
    ready: Callable[[], bool] = _ready  # whether it can: images may still be encoding
    content: tuple[int, ...] = ()
    salt: str = ""
    # Set by the scheduler:
    users: int = field(default=0, init=False)  # groups and problems that will still read it
    node: int = field(default=-1, init=False)  # in the prefix tree; -1 without KV
    written: int = field(default=0, init=False)  # tokens whose KV has been written, or was found
    dropped: int = field(default=0, init=False)  # tokens whose KV was dropped and not found again
    reached: int = field(default=0, init=False)  # the most that `written` was

    def forget(self) -> None:
        """Release what its embeddings are computed from: the segment will not be read again."""
        self.inputs, self.ready = None, _ready


@dataclass(frozen=True, slots=True)
class Partial:
    """What an unfinished rollout has generated. It goes on from there on any engine: its draws
    depend on its seed and the position only."""

    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()


@dataclass(eq=False, slots=True)
class Rollout:
    """One generated continuation of its group's prompt.

    `finish_reason` is None until the rollout ends, then "stop" (an eos id, the last of `tokens`, or
    a stop string), "length", "cancelled", "error" (the next logits held NaN, or nothing but -inf),
    or "moved" (it goes on in another scheduler).
    """

    group: "Group" = field(repr=False)
    index: int
    seed: int
    max_tokens: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[TopLogprobs] = field(default_factory=list)  # aligned with tokens, if asked
    finish_reason: str | None = None
    # Set by the scheduler:
    scheduled: int = field(default=0, init=False)  # generated tokens, and those in flight
    node: int = field(default=-1, init=False)  # in the prefix tree; -1 while waiting or ended
    batch_index: int = field(default=-1, init=False)  # in the executor's tables, while running
    preemptions: int = field(default=0, init=False)


@dataclass(eq=False, slots=True)
class Group:
    """The rollouts of one prompt. Done when `need` of them have ended; the rest are cancelled.

    Policies use `problem` and `round`; problems are numbered in order of arrival.
    """

    path: Sequence[Segment]
    last_token: int
    sampling: Sampling
    problem: int = 0
    round: int = 0
    need: int = 0
    rollouts: list[Rollout] = field(default_factory=list)
    # Set by the scheduler:
    number: int = field(default=0, init=False)  # in order of submission
    ended: int = field(default=0, init=False)  # ended rollouts, without cancelled ones
    found: int = field(default=0, init=False)  # prompt tokens whose KV other prompts had written
    waiting: list[Rollout] = field(default_factory=list, init=False)  # neither running nor ended

    @property
    def prompt_tokens(self) -> int:
        return sum(segment.tokens for segment in self.path) + 1


PageMove = tuple[Rollout, tuple[int, ...]]  # device <-> host, with the pages on the device


@dataclass(frozen=True, eq=False, slots=True)
class Chunk:
    """Tokens [start, stop) of a segment, or of a rollout that is being resumed, to be written.

    A rollout's tokens are its prompt's last one, then those generated. `samples` means that the
    chunk contains the rollout's last known token, so its next token is sampled.
    """

    owner: Segment | Rollout
    start: int
    stop: int
    samples: bool = False


@dataclass(frozen=True, eq=False, slots=True)
class Batch:
    """The work of one step.

    Tokens come back for the rollouts of `decode`, then for chunks that sample. Every rollout of
    `decode` writes its last known token and samples the next one. With `drafts` (aligned with
    `decode`, or empty) it also writes its draft after that token, and samples a token after each.
    The scheduler returns the same object again as long as only lengths change.
    """

    decode: tuple[Rollout, ...]
    chunks: tuple[Chunk, ...] = ()
    drafts: tuple[tuple[int, ...], ...] = ()
    steps: int = 1  # consecutive steps in which only lengths change
    # Pages to copy to the host and back before the step.
    evicted: tuple[PageMove, ...] = ()
    restored: tuple[PageMove, ...] = ()

    @property
    def sampled(self) -> tuple[Rollout, ...]:
        """The rollouts for which a token is sampled, in the order in which the tokens come back."""
        return (*self.decode, *self.resumed)

    @property
    def resumed(self) -> tuple[Rollout, ...]:
        """The rollouts whose chunks sample: the chunk completes their written tokens."""
        owners = (chunk.owner for chunk in self.chunks if chunk.samples)
        return tuple(owner for owner in owners if isinstance(owner, Rollout))


class SampledTokens(NamedTuple):
    """What a step has sampled; each list is in the order of `Batch.sampled`.

    A rollout with a draft has 1 + len(draft) entries: after its last token, and after each drafted
    one.
    """

    tokens: list[int]
    logprobs: list[float]
    top_logprobs: list[TopLogprobs] | None = None  # None if no rollout asks for them
