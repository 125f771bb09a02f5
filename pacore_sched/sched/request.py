"""What is asked of the engine: groups of rollouts over one prompt, as the scheduler sees them.

A prompt is a path of segments and one last token. Segments are prefilled once, into nodes of their
own, and shared: an opening image by all rounds of its problem, a round's prompt by its rollouts.
The last token opens every rollout's own node instead, so that starting a rollout, decoding it and
taking it up again are one thing: write the tokens that are known and not yet written, and draw the
next one behind the last of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; temperature 0 is greedy, top_k 0 and top_p 1 truncate nothing."""

    max_tokens: int = 512
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()  # a rollout ends where its text contains one of them
    ignore_eos: bool = False  # for pinned lengths


@dataclass(eq=False, slots=True)
class Segment:
    """A run of prompt tokens that several rollouts have in common."""

    tokens: int  # how many
    inputs: object = None  # what the executor makes their embeddings of
    ready: Callable[[], bool] = lambda: True  # whether it can: images may be still in the tower
    # The scheduler's:
    users: int = field(default=0, init=False)  # groups, and problems, that will still read it
    node: int = field(default=-1, init=False)  # in the prefix tree; -1: it has no KV
    written: int = field(default=0, init=False)  # tokens whose KV is there


@dataclass(eq=False, slots=True)
class Rollout:
    """One generation.

    `finish_reason`, once it has ended, is "stop" (an eos id, the last of `tokens`, or a stop
    string), "length", "cancelled", or "error" (the next logits held NaN, or nothing but -inf).
    """

    group: "Group" = field(repr=False)
    index: int
    seed: int
    max_tokens: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    # The scheduler's:
    asked: int = field(default=0, init=False)  # tokens asked for: known, or in flight
    node: int = field(default=-1, init=False)  # in the prefix tree; -1: waiting, or ended
    batch_index: int = field(default=-1, init=False)  # in the executor's tables, while running
    preemptions: int = field(default=0, init=False)


@dataclass(eq=False, slots=True)
class Group:
    """The rollouts of one prompt. It is done when `need` of them have ended; others are cancelled.

    `problem` and `round` are what policies go by: problems count in order of arrival.
    """

    path: Sequence[Segment]
    last_token: int
    sampling: Sampling
    problem: int = 0
    round: int = 0
    need: int = 0
    rollouts: list[Rollout] = field(default_factory=list)
    # The scheduler's:
    number: int = field(default=0, init=False)  # in order of submission
    ended: int = field(default=0, init=False)  # rollouts that have, cancelled ones not counted
    waiting: list[Rollout] = field(default_factory=list, init=False)  # neither running nor ended

    @property
    def prompt_tokens(self) -> int:
        return sum(segment.tokens for segment in self.path) + 1


Moved = tuple[Rollout, tuple[int, ...]]  # between device and host, with its pages on the device


@dataclass(frozen=True, eq=False, slots=True)
class Chunk:
    """Tokens [start, stop) of a segment, or of a rollout that is taken up again, to be written.

    A rollout's tokens are its prompt's last one, then those generated. `samples`: these are all
    that is known of a rollout, and its next token is to be drawn.
    """

    owner: Segment | Rollout
    start: int
    stop: int
    samples: bool = False


@dataclass(frozen=True, eq=False, slots=True)
class Batch:
    """One step's work. Tokens come back for the rollouts of `decode`, then of chunks that sample.

    Every rollout of `decode` writes its last known token and draws the next. With `drafts` (aligned
    with `decode`, or empty) it also writes its draft behind that, and draws a token after each.
    The scheduler gives the same object again while nothing changes but lengths.
    """

    decode: tuple[Rollout, ...]
    chunks: tuple[Chunk, ...] = ()
    drafts: tuple[tuple[int, ...], ...] = ()
    steps: int = 1  # for so many steps in a row nothing will change but lengths
    # To be copied to the host and back before the step.
    evicted: tuple[Moved, ...] = ()
    restored: tuple[Moved, ...] = ()

    @property
    def sampled(self) -> tuple[Rollout, ...]:
        """The rollouts that draw a token, in the order in which these come back."""
        return (*self.decode, *self.resumed)

    @property
    def resumed(self) -> tuple[Rollout, ...]:
        """The rollouts whose chunks sample: all their tokens are written with them."""
        owners = (chunk.owner for chunk in self.chunks if chunk.samples)
        return tuple(owner for owner in owners if isinstance(owner, Rollout))
