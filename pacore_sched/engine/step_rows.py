"""A batch as rows of the model: the input of each row, and the rows that sample tokens.

Consists of ints, like the batch's layout (sched/step_batch.py). The host does not know a running
rollout's last token: its row reads it from the executor's LastTokens, by batch index.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from model.errors import InputError
from pacore_sched.sched.prefix_tree import PrefixTree
from pacore_sched.sched.request import (
    Batch,
    Chunk,
    Rollout,
    SampledTokens,
    Segment,
    TopLogprobs,
    check_top_logprobs,
)
from pacore_sched.sched.step_batch import StepBatch, build_step_batch


class ImageFeatures(Protocol):
    """Embeddings of images, perhaps still being computed (image_encoder.py)."""

    @property
    def count(self) -> int: ...

    @property
    def contents(self) -> Sequence[int]:
        """As of Features."""

    def result(self, start: int = 0, stop: int | None = None) -> Any:
        """Rows [start, stop) of a tensor [count, hidden]; opaque here."""


@dataclass(eq=False)
class PromptScores:
    """The raw log-probability of each token of a text prompt, given those before it.

    The executor fills them in while the prompt's only segment is prefilled; entry i is token i's.
    The first token has None, and a prompt of one token, which has no segment, nothing else. All
    entries are there when the first token of a rollout is.

    last_token: of the prompt, which follows its segment
    top: how many of the most likely tokens come with each entry, at most MAX_TOP_LOGPROBS

    Raises InputError for another `top`.
    """

    last_token: int
    top: int = 0
    logprobs: list[float | None] = field(default_factory=lambda: [None], init=False)
    top_logprobs: list[TopLogprobs | None] = field(init=False)  # empty without `top`

    def __post_init__(self) -> None:
        check_top_logprobs(self.top)
        self.top_logprobs = [None] if self.top else []

    def targets(self, ids: Sequence[int], start: int, stop: int) -> list[int]:
        """The tokens that follow tokens [start, stop) of the segment's `ids`, if they need to be
        scored: not again when KV that was dropped is recomputed."""
        if stop < len(self.logprobs):
            return []
        following = [*ids[start + 1 : stop + 1]]
        return following if stop < len(ids) else [*following, self.last_token]

    def fill(self, start: int, columns: SampledTokens) -> None:
        """Enter the scores of the tokens that follow those from `start` on."""
        stop = start + len(columns.tokens)
        self.logprobs[start + 1 : stop + 1] = columns.logprobs
        if self.top:
            self.top_logprobs[start + 1 : stop + 1] = columns.top_logprobs or []


@dataclass(frozen=True)
class Prompt:
    """A segment's `inputs`: ids, and image embeddings that replace some of them."""

    ids: Sequence[int]
    placeholders: Sequence[int] = ()  # positions of the replaced ids, ascending
    features: ImageFeatures | None = None
    first: int = 0  # the row of `features` for the first placeholder
    scores: PromptScores | None = None  # to be filled in

    @property
    def content(self) -> tuple[int, ...]:
        """What identifies the tokens, for the prefix cache (sched/prefix_cache.py); empty if the
        prompt is to be scored, and so must be computed, or its images are not known."""
        contents = self.features.contents if self.features else ()
        if self.scores or len(contents) < len(self.placeholders):
            return ()
        content = [*self.ids]
        for row, position in enumerate(self.placeholders, self.first):
            content[position] = contents[row]
        return tuple(content)

    @staticmethod
    def of(
        ids: Sequence[int],
        vocabulary: int,
        placeholder_id: int | None,
        features: ImageFeatures | None,
        first: int,
        scores: PromptScores | None = None,
    ) -> "Prompt":
        """Check ids; those equal to `placeholder_id` (None: none) take `features` in order.

        Raises InputError for ids outside the vocabulary, and for more placeholders than features.
        """
        checked = [*ids, scores.last_token] if scores else ids
        invalid = next((id for id in checked if not 0 <= id < vocabulary), None)
        if invalid is not None:
            raise InputError(f"prompt id {invalid} is not in [0, {vocabulary})")
        placeholders = [position for position, id in enumerate(ids) if id == placeholder_id]
        count = features.count if features else 0
        if placeholders and first + len(placeholders) > count:
            raise InputError(
                f"the prompt has {first + len(placeholders)} <im_patch> tokens,"
                f" but the images need {count}"
            )
        return Prompt(ids, placeholders, features, first, scores)


@dataclass(frozen=True)
class ImageRows:
    """Rows whose inputs are consecutive image embeddings, from row `first` of `features` on."""

    rows: Sequence[int]
    features: ImageFeatures
    first: int


@dataclass(frozen=True)
class ScoredRows:
    """Rows of a prompt, from `first` on, whose next tokens are to be scored."""

    first: int
    targets: Sequence[int]  # the next tokens
    scores: PromptScores
    start: int  # position of the first row's token in the prompt


@dataclass
class StepRows:
    """A step on the host. Each list is aligned with what its comment names."""

    step: StepBatch
    ids: list[int]  # [T] 0 where the token is in LastTokens
    last: list[tuple[int, int]] = field(default_factory=list)  # (row, batch index) of those
    images: list[ImageRows] = field(default_factory=list)
    scored: list[ScoredRows] = field(default_factory=list)
    sampled: list[tuple[int, Rollout]] = field(default_factory=list)  # in the order of results
    claims: list[tuple[Rollout, int | None]] = field(default_factory=list)  # last known token
    drafted: set[Rollout] = field(default_factory=set)


def build_step_rows(tree: PrefixTree, batch: Batch) -> StepRows:
    """Lay out a batch whose tokens have been appended to the tree."""
    drafts = batch.drafts or ((),) * len(batch.decode)
    decode = list(zip(batch.decode, drafts, strict=True))
    work = [(rollout.node, 1 + len(draft)) for rollout, draft in decode]
    work += [(chunk.owner.node, chunk.stop - chunk.start) for chunk in batch.chunks]
    step = build_step_batch(tree, work)
    ends = {node: end + 1 for (node, _), end in zip(step.work, step.last_rows, strict=True)}
    rows = StepRows(step, [0] * len(step.positions))
    for rollout, draft in decode:
        _add_decode(rows, tree, rollout, draft, ends[rollout.node])
    for chunk in batch.chunks:
        _add_chunk(rows, chunk, ends[chunk.owner.node])
    return rows


def _add_decode(
    rows: StepRows, tree: PrefixTree, rollout: Rollout, draft: tuple[int, ...], end: int
) -> None:
    """Add a rollout's last token and its draft; a token is sampled after each."""
    first = end - 1 - len(draft)
    rows.ids[first + 1 : end] = draft
    rows.last.append((first, rollout.batch_index))
    # The host's last token is used if LastTokens does not have this rollout's.
    written = tree.length(rollout.node) - 1 - len(draft)
    last_token = rollout.group.last_token if not written else None
    if 0 < written <= len(rollout.tokens):
        last_token = rollout.tokens[written - 1]
    rows.claims.append((rollout, last_token))
    rows.sampled.extend((row, rollout) for row in range(first, end))
    if draft:
        rows.drafted.add(rollout)


def _add_chunk(rows: StepRows, chunk: Chunk, end: int) -> None:
    """Add known tokens: a segment's, or those of a rollout that is being resumed."""
    owner, first = chunk.owner, end - (chunk.stop - chunk.start)
    if isinstance(owner, Segment):
        prompt = owner.inputs
        assert isinstance(prompt, Prompt), "its last user has ended: see Scheduler.keep"
        rows.ids[first:end] = prompt.ids[chunk.start : chunk.stop]
        low, high = (
            bisect_left(prompt.placeholders, position) for position in (chunk.start, chunk.stop)
        )
        if low < high:
            assert prompt.features is not None  # checked by `Prompt.of`
            placeholders = [
                first + position - chunk.start for position in prompt.placeholders[low:high]
            ]
            rows.images.append(ImageRows(placeholders, prompt.features, prompt.first + low))
        if prompt.scores:
            targets = prompt.scores.targets(prompt.ids, chunk.start, chunk.stop)
            if targets:
                rows.scored.append(ScoredRows(first, targets, prompt.scores, chunk.start))
        return
    known = [owner.group.last_token, *owner.tokens][chunk.start : chunk.stop]
    if len(known) != chunk.stop - chunk.start:
        raise ValueError(f"tokens {chunk.start}..{chunk.stop} of {owner} are not all known yet")
    rows.ids[first:end] = known
    if chunk.samples:
        rows.claims.append((owner, 0))  # LastTokens gets the token sampled now
        rows.sampled.append((end - 1, owner))
