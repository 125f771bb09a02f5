"""A batch as rows of the model: what each row is fed, and whose token is drawn where.

Made of ints, as sched/step_batch.py's layout is, whose rows these are. The last token of a running
rollout is not known here: the row takes it from the executor's LastTokens, by batch index.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from model.errors import InputError
from pacore_sched.sched.prefix_tree import PrefixTree
from pacore_sched.sched.request import Batch, Chunk, Rollout, Segment
from pacore_sched.sched.step_batch import StepBatch, build_step_batch


class ImageFeatures(Protocol):
    """Embeddings of images, perhaps still on their way (image_encoder.py)."""

    count: int

    def result(self) -> Any:
        """[count, hidden], a tensor: nothing is known of it here."""


@dataclass(frozen=True)
class Prompt:
    """A segment's `inputs`: ids, and embeddings that take the place of some of them."""

    ids: Sequence[int]
    holes: Sequence[int] = ()  # where, ascending
    features: ImageFeatures | None = None
    first: int = 0  # the row of `features` for the first hole

    @staticmethod
    def of(
        ids: Sequence[int],
        vocabulary: int,
        hole: int | None,
        features: ImageFeatures | None,
        first: int,
    ) -> "Prompt":
        """Check ids; those equal to `hole` (None: there are none) take `features` in order.

        Raises InputError for ids outside the vocabulary, and for more holes than features.
        """
        wrong = next((id for id in ids if not 0 <= id < vocabulary), None)
        if wrong is not None:
            raise InputError(f"id {wrong} of the prompt is not in [0, {vocabulary})")
        holes = [place for place, id in enumerate(ids) if id == hole]
        count = features.count if features else 0
        if holes and first + len(holes) > count:
            raise InputError(
                f"the prompt has {first + len(holes)} <im_patch> tokens, the images give {count}"
            )
        return Prompt(ids, holes, features, first)


@dataclass(frozen=True)
class ImageRows:
    """StepRows that take embeddings of images, one after the other from row `first` of these."""

    rows: Sequence[int]
    features: ImageFeatures
    first: int


@dataclass
class StepRows:
    """A step on the host. Lists are aligned with what their comments name."""

    step: StepBatch
    ids: list[int]  # [T] 0 where the token is in the table
    last: list[tuple[int, int]] = field(default_factory=list)  # (row, batch index) of those
    patches: list[ImageRows] = field(default_factory=list)
    drawn: list[tuple[int, Rollout]] = field(default_factory=list)  # in the order of collection
    claims: list[tuple[Rollout, int | None]] = field(default_factory=list)  # and last known token
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
        _decode(rows, tree, rollout, draft, ends[rollout.node])
    for chunk in batch.chunks:
        _write(rows, chunk, ends[chunk.owner.node])
    return rows


def _decode(
    rows: StepRows, tree: PrefixTree, rollout: Rollout, draft: tuple[int, ...], end: int
) -> None:
    """A rollout's last token, its draft behind it, and what is drawn after each."""
    first = end - 1 - len(draft)
    rows.ids[first + 1 : end] = draft
    rows.last.append((first, rollout.batch_index))
    # What the host knows of the last token counts when the table does not hold this rollout's.
    written = tree.length(rollout.node) - 1 - len(draft)
    known = rollout.group.last_token if not written else None
    if 0 < written <= len(rollout.tokens):
        known = rollout.tokens[written - 1]
    rows.claims.append((rollout, known))
    rows.drawn.extend((row, rollout) for row in range(first, end))
    if draft:
        rows.drafted.add(rollout)


def _write(rows: StepRows, chunk: Chunk, end: int) -> None:
    """Known tokens: a segment's, or a rollout's that is taken up again."""
    owner, first = chunk.owner, end - (chunk.stop - chunk.start)
    if isinstance(owner, Segment):
        prompt = owner.inputs
        assert isinstance(prompt, Prompt)
        rows.ids[first:end] = prompt.ids[chunk.start : chunk.stop]
        low, high = (bisect_left(prompt.holes, place) for place in (chunk.start, chunk.stop))
        if low < high:
            assert prompt.features is not None  # `Prompt.of` has seen to that
            holes = [first + place - chunk.start for place in prompt.holes[low:high]]
            rows.patches.append(ImageRows(holes, prompt.features, prompt.first + low))
        return
    known = [owner.group.last_token, *owner.tokens][chunk.start : chunk.stop]
    if len(known) != chunk.stop - chunk.start:
        raise ValueError(f"tokens {chunk.start}..{chunk.stop} of {owner} are not all known")
    rows.ids[first:end] = known
    if chunk.samples:
        rows.claims.append((owner, 0))  # the table gets what is drawn now
        rows.drawn.append((end - 1, owner))
