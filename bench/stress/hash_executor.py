"""The executor of the hash model: rows, page tables and LastTokens are those of the real one.

As on a GPU, a launch does all that it will ever do with the tree, tokens stay on the device, and
the host learns them in `collect`. A batch that the scheduler repeats is not laid out again: its
layout advances by one token, as a CUDA graph does. Each row reads its whole context from the pages.
"""

from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bench.stress.hash_model import HashModel, extend
from kernels.plan_node import PlanNode
from pacore_sched.engine.decode_step import LastTokens
from pacore_sched.engine.step_rows import StepRows, build_step_rows
from pacore_sched.sched.prefix_tree import PrefixTree
from pacore_sched.sched.request import Batch, Rollout, SampledTokens, Segment

Entry = tuple[int, int]  # a token's KV: the context's hash before and after it


class Fault(AssertionError):
    """The engine did something wrong."""


def expect(condition: object, message: str) -> None:
    """Raise Fault unless the condition holds."""
    if not condition:
        raise Fault(message)


@dataclass
class _Layout:
    """The rows of a step. Those of a decode-only batch advance by one token per step."""

    batch: Batch
    nodes: list[PlanNode]
    ids: list[int]  # [T]; those in `last` are replaced at launch
    last: list[tuple[int, int]]  # (row, batch index)
    positions: list[int]  # [T]
    slots: list[int]  # [T]
    sampled: list[tuple[int, Rollout]]  # in the order of results
    drafted: set[Rollout]
    steps_left: int = 0  # further steps for which the pages have room

    def advance(self, page_size: int) -> None:
        """Move on to the next token of every rollout, in the pages as they were laid out."""
        self.steps_left -= 1
        for i, node in enumerate(self.nodes):
            if node.num_new:
                row, index = node.row_start, node.kv_len
                self.nodes[i] = PlanNode(node.pages, index + 1, row, node.row_end, 1)
                self.positions[row] += 1
                self.slots[row] = slot_of(node.pages, index, page_size)


def slot_of(pages: Sequence[int], index: int, page_size: int) -> int:
    """The slot of a node's token."""
    return pages[index // page_size] * page_size + index % page_size


def owners_of(batch: Batch) -> set[Rollout | Segment]:
    """The rollouts and segments that a batch writes."""
    return {*batch.decode, *(chunk.owner for chunk in batch.chunks)}


class HashExecutor:
    """Runs batches on the hash model; raises Fault for a batch that the real model would get wrong.

    counts: what was launched, in the terms of the engine's own counters
    """

    asynchronous = True

    def __init__(
        self, model: HashModel, *, num_pages: int, page_size: int, max_running: int, budget: int
    ) -> None:
        self.model, self.num_pages, self.page_size = model, num_pages, page_size
        self.max_running, self.budget = max_running, budget
        self.counts: Counter[str] = Counter()
        self.host: dict[Rollout, list[Entry | None]] = {}
        self._kv: list[Entry | None] = [None] * (num_pages * page_size)  # by slot
        self._tree: PrefixTree | None = None
        self._taken: list[int] = []  # pages since the last step
        self._last_tokens = LastTokens(max_running, torch.device("cpu"))
        self._cached: _Layout | None = None
        self._pending: deque[SampledTokens] = deque()
        self._newest_node = -1  # of a rollout
        self.last_batch = Batch(())

    def launch(self, tree: PrefixTree, batch: Batch) -> SampledTokens:
        """Run a step on the device."""
        self._watch(tree)
        self._check(tree, batch)
        self.last_batch = batch
        self._evict(batch)
        self._erase_taken()
        layout = self._cached
        if layout and layout.batch is batch and layout.steps_left:
            layout.advance(self.page_size)
            self.counts["repeated"] += 1
        else:
            layout = self._lay_out(tree, batch)
        self._restore(batch)
        self._cached = None if batch.chunks or any(batch.drafts) else layout
        for rollout in batch.decode:
            leaf_tokens = tree.context_length(rollout.node)
            row = next(row for row, other in reversed(layout.sampled) if other is rollout)
            expect(layout.positions[row] + 1 == leaf_tokens, "the layout is not the tree's")
        self._count(batch, layout)
        results = self._run(layout)
        self._pending.append(results)
        return results

    def collect(self, pending: SampledTokens) -> SampledTokens:
        """Hand the results of a step to the host."""
        expect(self._pending and self._pending.popleft() is pending, "steps collected out of order")
        self.counts["sampled"] += len(pending[0])
        return pending

    def _check(self, tree: PrefixTree, batch: Batch) -> None:
        """Check a batch against its own documentation."""
        expect(len(self._pending) < 2, "more than two steps in flight")
        expect(not batch.drafts or not self._pending, "drafts on top of unknown tokens")
        for rollout in batch.sampled:
            expect(rollout.finish_reason is None, "a rollout runs after its end")
            written = tree.length(rollout.node)
            expect(written <= rollout.max_tokens, "a rollout is written beyond its max_tokens")
        for chunk in batch.chunks:
            owner, length = chunk.owner, tree.length(chunk.owner.node)
            if isinstance(owner, Segment):  # it may begin in a node above
                expect(owner.ready(), "a segment is written before it is ready")
                expect(0 < chunk.stop - chunk.start <= length, "a chunk is not in its node")
                length = owner.written
            expect(chunk.start < chunk.stop == length, "a chunk ends elsewhere in the tree")

    def _evict(self, batch: Batch) -> None:
        self.host = {r: copy for r, copy in self.host.items() if not r.finish_reason}
        for rollout, pages in batch.evicted:
            if not rollout.finish_reason:
                self.host[rollout] = [entry for page in pages for entry in self._page(page)]
                self.counts["evicted"] += 1

    def _restore(self, batch: Batch) -> None:
        size = self.page_size
        for rollout, pages in batch.restored:
            copy = self.host.pop(rollout)
            expect(len(copy) == len(pages) * size, "pages of the host and the device differ")
            for i, page in enumerate(pages):
                self._kv[page * size : (page + 1) * size] = copy[i * size : (i + 1) * size]
            self.counts["restored"] += 1

    def _page(self, page: int) -> list[Entry | None]:
        return self._kv[page * self.page_size : (page + 1) * self.page_size]

    def _watch(self, tree: PrefixTree) -> None:
        """Note the pages that a tree takes for its nodes."""
        if self._tree is tree:
            return
        self._tree, reserve = tree, tree.reserve

        def erasing(node: int, tokens: int) -> None:
            before = len(tree.pages(node))
            reserve(node, tokens)
            self._taken += tree.pages(node)[before:]

        tree.reserve = erasing  # type: ignore[method-assign]

    def _erase_taken(self) -> None:
        """Nothing in pages that were taken is of their new nodes."""
        for page in self._taken:
            start = page * self.page_size
            self._kv[start : start + self.page_size] = [None] * self.page_size
        self._taken.clear()

    def _lay_out(self, tree: PrefixTree, batch: Batch) -> _Layout:
        rows: StepRows = build_step_rows(tree, batch)
        self._last_tokens.claim(rows.claims)
        for rollout in rows.drafted:
            self._last_tokens.forget(rollout)
        for image in rows.images:
            embeddings = image.features.result()
            for i, row in enumerate(image.rows):
                rows.ids[row] = embeddings[image.first + i]
        step = rows.step
        room = [len(n.pages) * self.page_size - n.kv_len for n in step.plan_nodes if n.num_new]
        return _Layout(
            batch, list(step.plan_nodes), rows.ids, rows.last, list(step.positions),
            list(step.slots), rows.sampled, rows.drafted, min(room),
        )  # fmt: skip

    def _run(self, layout: _Layout) -> SampledTokens:
        ids, last_tokens = layout.ids, self._last_tokens.tokens.tolist()
        for row, index in layout.last:
            ids[row] = last_tokens[index]
        contexts = self._attend(layout)
        tokens: list[int] = []
        logprobs: list[float] = []
        for row, rollout in layout.sampled:
            position = layout.positions[row] + 1
            token, logprob = self.model.draw(rollout.seed, position, contexts[row], ids[row])
            tokens.append(token)
            logprobs.append(logprob)
            last_tokens[rollout.batch_index] = max(token, 0)  # as `sample` does
        self._last_tokens.tokens = torch.tensor(last_tokens)
        return SampledTokens(tokens, logprobs)

    def _attend(self, layout: _Layout) -> list[int]:
        """Write each row's KV and return the context that it reads, itself included."""
        positions, size, kv = layout.positions, self.page_size, self._kv
        contexts, lengths = [0] * len(positions), [0] * len(positions)
        for node in layout.nodes:
            first, end, new = node.row_start, node.row_end, node.num_new
            context, length = contexts[first], lengths[first]
            above = contexts[first:end]
            expect(above == [context] * (end - first), "readers of a node differ above it")
            old = node.kv_len - new
            for index in range(node.kv_len):
                slot = slot_of(node.pages, index, size)
                if index >= old:
                    row = first + index - old
                    expect(positions[row] == length, "a row has a wrong position")
                    expect(layout.slots[row] == slot, "a row is written to a wrong slot")
                    kv[slot] = context, extend(context, layout.ids[row], length)
                entry = kv[slot]
                if entry is None or entry[0] != context:
                    held = "another context" if entry else "nothing"
                    raise Fault(f"slot {slot} is read, but holds {held}")
                context, length = entry[1], length + 1
                if index >= old:
                    contexts[row], lengths[row] = context, length
            for row in range(first + new, end):
                contexts[row], lengths[row] = context, length
        return contexts

    def _count(self, batch: Batch, layout: _Layout) -> None:
        """Count from the rows what the engine counts from the tree."""
        rows, counts = len(layout.positions), self.counts
        expect(0 < rows <= self.budget, "a step has no rows, or more than the token budget")
        decoding = set(batch.decode)
        read = sorted(row for row, rollout in layout.sampled if rollout in decoding)
        for node in layout.nodes:
            at = bisect_left(read, node.row_start)
            counts["kv_read"] += node.kv_len * (at < len(read) and read[at] < node.row_end)
        ends = {rollout: row for row, rollout in layout.sampled if rollout in decoding}
        counts["kv_read_unshared"] += sum(layout.positions[row] + 1 for row in ends.values())
        counts["steps"] += 1
        counts["rows"] += rows
        counts["drafted"] += sum(map(len, batch.drafts))
        for chunk in batch.chunks:
            of = "segment" if isinstance(chunk.owner, Segment) else "rollout"
            counts[f"{of} rows"] += chunk.stop - chunk.start
            owner = chunk.owner
            known = owner.tokens if isinstance(owner, Segment) else 1 + len(owner.tokens)
            counts[f"{of} chunks"] += chunk.stop - chunk.start < known
        started = [owner for owner in owners_of(batch)
                   if isinstance(owner, Rollout) and owner.node > self._newest_node]  # fmt: skip
        for rollout in started:
            counts["prefix_hits"] += rollout.group.prompt_tokens - 1
        self._newest_node = max([self._newest_node, *(rollout.node for rollout in started)])
