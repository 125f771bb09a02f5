"""A fake executor without a model: the next token is a hash of the context that its pages hold.

It reads the context back from "KV", so a page that is lost, shared, overwritten or written too
late, a stale batch index or a forgotten token changes every token that follows.
"""

import zlib
from collections.abc import Sequence

from pacore_sched.sched.prefix_tree import PrefixTree
from pacore_sched.sched.request import Batch, Group, Rollout, SampledTokens, Segment, TopLogprobs
from pacore_sched.sched.step_batch import build_step_batch

VOCABULARY = 40
EOS = 0


def next_token(context: Sequence[int], seed: int, vocabulary: int = VOCABULARY) -> int:
    """The "model's" token after `context`; with a small vocabulary, texts repeat themselves."""
    read = context[-2:] if vocabulary < VOCABULARY else context  # repetitive, for drafts
    return (
        zlib.crc32(repr((list(read), seed if vocabulary == VOCABULARY else 0)).encode())
        % vocabulary
    )


def top_logprobs(token: int, context_length: int, count: int) -> TopLogprobs:
    """The `count` most "likely" tokens where `token` is sampled after so many."""
    return tuple((token + i, -1.0 * context_length - i) for i in range(count))


def expected(
    group: Group, rollout: Rollout, eos: int = EOS, vocabulary: int = VOCABULARY
) -> list[int]:
    """The tokens of a rollout that runs alone."""
    context = [token for segment in group.path for token in segment.ids] + [group.last_token]
    tokens = []
    while len(tokens) < rollout.max_tokens and (not tokens or tokens[-1] != eos):
        tokens.append(next_token(context + tokens, rollout.seed, vocabulary))
    return tokens


class IdSegment(Segment):
    """A segment whose ids tests can read after its last user has ended."""

    def __init__(self, ids: Sequence[int]) -> None:
        super().__init__(len(ids), inputs=list(ids))
        self.ids = list(ids)


def segment(ids: Sequence[int]) -> IdSegment:
    return IdSegment(ids)


class FakeExecutor:
    """`launch` computes at once; `collect` may come later, as on a GPU."""

    asynchronous = False

    def __init__(
        self,
        num_pages: int,
        page_size: int = 4,
        max_running: int = 16,
        vocabulary: int = VOCABULARY,
    ) -> None:
        self.num_pages, self.page_size, self.max_running = num_pages, page_size, max_running
        self.vocabulary = vocabulary
        self.kv: dict[int, int] = {}  # slot of a token -> token
        self.last: dict[int, tuple[Rollout, int]] = {}  # batch index of a rollout -> its last token
        self.host: dict[Rollout, list[int | None]] = {}
        self.launched: list[Batch] = []

    def reset(self) -> None:
        self.kv.clear()
        self.last.clear()
        self.host.clear()

    def launch(self, tree: PrefixTree, batch: Batch) -> SampledTokens:
        self.launched.append(batch)
        self._move(batch)
        work, drawn, top = {}, [], []
        drafts = batch.drafts or [()] * len(batch.decode)
        for rollout, draft in zip(batch.decode, drafts, strict=True):
            work[rollout.node] = [self._last(rollout), *draft]
        for chunk in batch.chunks:
            owner = chunk.owner
            known = (
                owner.inputs
                if isinstance(owner, Segment)
                else [owner.group.last_token, *owner.tokens]
            )
            work[owner.node] = known[chunk.start : chunk.stop]
            assert len(work[owner.node]) == chunk.stop - chunk.start, "the chunk has unknown tokens"
        for rollout in batch.decode:
            assert tree.length(rollout.node) <= rollout.max_tokens
        build_step_batch(tree, [(node, len(tokens)) for node, tokens in work.items()])  # may raise
        for node, tokens in work.items():
            length = tree.length(node)
            slots = tree.slots(node, length - len(tokens), length)
            self.kv.update(zip(slots, tokens, strict=True))
        for rollout, draft in zip(
            batch.sampled, [*drafts, *[()] * len(batch.chunks)], strict=False
        ):
            context = self._context(tree, rollout)
            for end in range(len(context) - len(draft), len(context) + 1):
                drawn.append(next_token(context[:end], rollout.seed, self.vocabulary))
                top.append(top_logprobs(drawn[-1], end, rollout.group.sampling.top_logprobs))
            self.last[rollout.batch_index] = rollout, drawn[-1]
            if draft:  # the last token depends on how much of the draft the host accepts
                del self.last[rollout.batch_index]
        return SampledTokens(drawn, [-1.0] * len(drawn), top if any(top) else None)

    def collect(self, pending: SampledTokens) -> SampledTokens:
        return pending

    def _last(self, rollout: Rollout) -> int:
        owner, token = self.last.get(rollout.batch_index, (None, 0))
        if owner is rollout:
            return token
        known = [rollout.group.last_token, *rollout.tokens]
        assert len(known) >= rollout.scheduled, "the last token is still in flight"
        return known[-1]

    def _context(self, tree: PrefixTree, rollout: Rollout) -> list[int]:
        path = tree.path(rollout.node)
        return [self.kv[slot] for node in path for slot in tree.slots(node, 0, tree.length(node))]

    def _move(self, batch: Batch) -> None:
        size = self.page_size
        for rollout, pages in batch.evicted:
            slots = [page * size + i for page in pages for i in range(size)]
            self.host[rollout] = [self.kv.get(slot) for slot in slots]
        for rollout, pages in batch.restored:
            slots = [page * size + i for page in pages for i in range(size)]
            self.kv.update(zip(slots, self.host.pop(rollout), strict=False))
