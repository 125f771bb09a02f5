"""The scheduler: which tokens each rollout writes in the next step, and into which pages.

Continuous batching over all groups: a step decodes every running rollout, and spends the rest of
its token budget on prompts and on rollouts that are being resumed, in the policy's order. A
prompt's segments are written once; its rollouts start when the segments are complete. Ints only:
the model and the simulator use the same scheduler. What a prompt's segments share with earlier
prompts is not written again (prefix_cache.py).
"""

from bisect import insort
from collections import Counter
from collections.abc import Sequence
from heapq import heapify, heappop, heappush
from operator import itemgetter

from kernels.runtime.arithmetic import cdiv
from pacore_sched.sched.policy import LaterRoundFirst
from pacore_sched.sched.prefix_tree import PrefixTree
from pacore_sched.sched.prompts import Counts, Prompts
from pacore_sched.sched.request import Batch, Chunk, Group, PageMove, Rollout, Segment

TOKEN_BUDGET = 2048  # tokens of a step
MIN_ENDS = 64  # a heap of fewer entries is not worth rebuilding


class Scheduler:
    """Takes groups, returns batches. Segments and running rollouts have nodes in `tree`.

    max_running: rollouts that decode at the same time
    token_budget: the most tokens that one step may write
    host_pages: pages of preempted rollouts that may be moved to host memory instead of recomputed
    prefix_cache: whether prompts find the KV of earlier ones with the same beginning
    counts: totals to go on from
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        policy: LaterRoundFirst,
        *,
        max_running: int = 256,
        token_budget: int = TOKEN_BUDGET,
        host_pages: int = 0,
        prefix_cache: bool = True,
        counts: Counts | None = None,
    ) -> None:
        if not 1 <= max_running <= token_budget:
            raise ValueError(
                f"max_running must be from 1 to token_budget ({token_budget}), not {max_running}"
            )
        self.tree = PrefixTree(num_pages, page_size)
        self.counts = counts or Counts()
        self.prompts = Prompts(self.tree, self.counts, prefix_cache=prefix_cache)
        self.policy = policy
        self.max_running, self.token_budget = max_running, token_budget
        self.running: dict[Rollout, None] = {}  # in the order in which they started
        self.groups: dict[Group, None] = {}  # in the order of submission
        self.steps = 0
        self.host_pages = host_pages  # free ones
        self._queue: list[tuple[tuple, Group]] = []  # groups with waiting rollouts, in order
        self._free_indices = list(reversed(range(max_running)))
        self._num_submitted = 0
        self._decoding: dict[int, Rollout] = {}  # by node: running, only the last token unwritten
        self._catching_up: dict[Rollout, None] = {}  # running, with more tokens to write
        self._pages_until = 0  # the step before which decoding rollouts need new pages
        self._ends: list[tuple[int, int]] = []  # heap of (step of max_tokens, node)
        self._batch = Batch(())  # the last one
        self._nodes: list[int] = []  # of its decoding rollouts
        self._repeats_left = 0  # further steps for which `_batch` is valid
        self._host_tokens: dict[Rollout, int] = {}  # preempted rollout -> its tokens on the host
        self._evicted: list[PageMove] = []

    def max_pages(self, path: Sequence[Segment], max_tokens: int) -> int:
        """Pages that a rollout of up to `max_tokens` tokens takes, including its prompt."""
        size = self.tree.page_size
        return cdiv(max_tokens, size) + sum(cdiv(segment.tokens, size) for segment in path)

    def max_tokens(self, path: Sequence[Segment]) -> int:
        """The most tokens that a rollout of a prompt can have: all pages that the prompt leaves."""
        size = self.tree.page_size
        return size * (self.tree.num_pages - sum(cdiv(segment.tokens, size) for segment in path))

    def submit(self, group: Group) -> None:
        """Add a group. Raises ValueError if one of its rollouts can never fit."""
        longest = max(rollout.max_tokens for rollout in group.rollouts)
        if (pages := self.max_pages(group.path, longest)) > self.tree.num_pages:
            raise ValueError(f"the group needs {pages} pages, the pool has {self.tree.num_pages}")
        group.number, self._num_submitted = self._num_submitted, self._num_submitted + 1
        group.waiting = self.policy.order(group.rollouts)
        for segment in group.path:
            segment.users += 1
        self.groups[group] = None
        self._enqueue(group)
        self._repeats_left = 0

    def keep(self, segment: Segment) -> None:
        """Let a segment's KV outlive the groups that use it, until `drop`."""
        segment.users += 1

    def drop(self, segment: Segment) -> None:
        """Undo one `keep`. Without users, a segment's KV and inputs are released."""
        segment.users -= 1
        if segment.users:
            return
        if segment.node >= 0:
            self._free_prompt(segment)
        # Ended groups and old batches may still refer to the segment, but not to its images.
        segment.forget()

    def schedule(self) -> Batch | None:
        """The next step's batch, its tokens appended to the tree; None if nothing can be done."""
        if self._repeats_left:
            self.repeat(1)
            return self._batch
        self._drop_at_max_tokens()
        before = self.counts.preemptions
        if self._pages_until <= self.steps:
            self._reserve_pages()
        chunks: list[Chunk] = []
        decoding = self._decoding
        budget = self.token_budget - len(decoding)
        for rollout in self._catching_up:
            budget -= self._write_rollout(rollout, budget, chunks)
        restored: list[PageMove] = []
        waits = True
        # A rollout preempted just now may have its last token in flight: it must not restart yet.
        if self.counts.preemptions == before:
            restored, waits = self._admit(budget, chunks)
        if not decoding and not chunks:
            return None
        evicted, self._evicted = tuple(self._evicted), []
        one_step = bool(chunks or restored or evicted or waits)
        until = min(self._pages_until, self._ends[0][0]) if self._ends else self._pages_until
        steps = 1 if one_step else max(1, until - self.steps)
        decode, self._nodes = tuple(decoding.values()), list(decoding)
        self._batch = Batch(
            decode, tuple(chunks), steps=steps, evicted=evicted, restored=tuple(restored)
        )
        self._repeats_left = steps
        self.repeat(1)
        for rollout in self._batch.resumed:
            self._start_decoding(rollout)
        return self._batch

    def repeat(self, steps: int) -> None:
        """Append `steps` more steps of the last batch, at most as many as it allows."""
        self.tree.grow(self._nodes, steps)
        for rollout in self._batch.decode:
            rollout.scheduled += steps
        self._repeats_left -= steps
        self.steps += steps

    def finish(self, rollout: Rollout, reason: str) -> list[Rollout]:
        """Record that a rollout has ended; returns the siblings that are cancelled as a result."""
        group = rollout.group
        self._end(rollout, reason)
        group.ended += 1
        self.policy.ended(rollout)
        return self.cancel(group) if group.ended >= group.need else []

    def cancel(self, group: Group) -> list[Rollout]:
        """End a group now; returns its rollouts that had not ended, which are now "cancelled"."""
        if group not in self.groups:
            return []
        unfinished = [rollout for rollout in group.rollouts if not rollout.finish_reason]
        for rollout in unfinished:
            self._end(rollout, "cancelled")
            self.counts.cancelled += rollout.scheduled
        del self.groups[group]
        self._repeats_left = 0  # the policy may let another group start
        self.policy.forget(group)
        for segment in group.path:
            self.drop(segment)
        return unfinished

    def detach(self, rollout: Rollout) -> None:
        """Remove an unfinished rollout, which goes on in another scheduler as "moved" from here.

        Its group still waits for it: see `ended_elsewhere`. The other scheduler gets a group with
        a Rollout that has the same tokens, and `scheduled` tokens to be written again.
        """
        if rollout.node >= 0:
            self.counts.recomputed += self.tree.length(rollout.node)
        self._end(rollout, "moved")
        rollout.group.rollouts.remove(rollout)

    def ended_elsewhere(self, group: Group) -> list[Rollout]:
        """Count the end of a detached rollout; returns the siblings that are cancelled as a result.
        Does nothing if the group is done."""
        if group not in self.groups:
            return []
        group.ended += 1
        return self.cancel(group) if group.ended >= group.need else []

    def append_draft(self, rollout: Rollout, tokens: int) -> bool:
        """Append a draft to a rollout of the last batch; False if there are no pages for it."""
        if self.tree.pages_needed(rollout.node, tokens) > self.tree.free_pages:
            return False
        self.tree.append(rollout.node, tokens)
        return True

    def settle_draft(self, rollout: Rollout, accepted: int) -> None:
        """Keep only the accepted tokens of a rollout's draft."""
        rollout.scheduled += accepted
        self.tree.truncate(rollout.node, rollout.scheduled)
        self._push_end(rollout)
        self._pages_until = self._repeats_left = 0

    def check_integrity(self) -> None:
        """Raise IntegrityError or AssertionError if the tree and the rollouts' states disagree."""
        nodes = [rollout.node for rollout in self.running]
        nodes += [segment.node for segment in self.prompts.segments]
        self.tree.check_integrity(Counter(nodes))
        self.prompts.check_integrity(self.groups)
        indices = [rollout.batch_index for rollout in self.running]
        assert sorted([*indices, *self._free_indices]) == [*range(self.max_running)], (
            "batch indices"
        )
        for group in self.groups:
            for rollout in group.rollouts:
                states = rollout in self.running, rollout in group.waiting, rollout.finish_reason
                assert sum(map(bool, states)) == 1, rollout
            queued = sum(entry is group for _, entry in self._queue)
            assert queued == bool(group.waiting), group
        for rollout in self.running:
            length = self.tree.length(rollout.node)
            assert length <= rollout.scheduled <= rollout.max_tokens, rollout

    def _unwritten(self, rollout: Rollout) -> int:
        """Tokens of a running rollout that are known or in flight, but not written."""
        return 1 + rollout.scheduled - self.tree.length(rollout.node)

    def _drop_at_max_tokens(self) -> None:
        """Stop decoding rollouts whose max_tokens are all scheduled: the rest is in flight."""
        while self._ends and self._ends[0][0] <= self.steps:
            node = heappop(self._ends)[1]
            rollout = self._decoding.get(node)
            if rollout and rollout.scheduled >= rollout.max_tokens:
                del self._decoding[node]

    def _push_end(self, rollout: Rollout) -> None:
        """Note the step of a decoding rollout's max_tokens; an accepted draft brings it forward.

        Entries that no longer hold stay in the heap. It is rebuilt when they are most of it.
        """
        if len(self._ends) > 2 * len(self._decoding) + MIN_ENDS:
            self._ends = [(self._end_step(r), node) for node, r in self._decoding.items()]
            heapify(self._ends)
        heappush(self._ends, (self._end_step(rollout), rollout.node))

    def _end_step(self, rollout: Rollout) -> int:
        return self.steps + rollout.max_tokens - rollout.scheduled

    def _start_decoding(self, rollout: Rollout) -> None:
        """Decode a rollout from the next step on, and reserve its pages as far as the others'."""
        self._decoding[rollout.node] = rollout
        self._catching_up.pop(rollout, None)
        self._push_end(rollout)
        tokens = max(self._pages_until - self.steps, 0)
        if self.tree.pages_needed(rollout.node, tokens) <= self.tree.free_pages:
            self.tree.reserve(rollout.node, tokens)
        else:
            self._pages_until = self.steps

    def _reserve_pages(self) -> None:
        """Reserve pages for the next page_size steps of all decoding rollouts.

        Fewer steps if pages are short; if even one step does not fit, drops idle segments, then
        preempts the policy's victims. All rollouts reserve at the same time, so that plans seldom
        change.
        """
        tree, steps = self.tree, self.tree.page_size
        while True:
            pages = tree.pages_needed_by(self._decoding, steps)
            if pages <= tree.free_pages:
                break
            if steps > 1:
                steps //= 2
            elif not self._drop_idle_prompt():
                self._preempt()
        if pages:
            for node in self._decoding:
                tree.reserve(node, steps)
        self._pages_until = self.steps + steps

    def _admit(self, budget: int, chunks: list[Chunk]) -> tuple[list[PageMove], bool]:
        """Prefill prompts and start rollouts that the policy admits.

        Returns the pages to fetch from the host, and whether a group waits for something other than
        pages, batch indices or tokens, so that the next step may differ.
        """
        restored: list[PageMove] = []
        waits = False
        written_now: set[int] = set()  # nodes
        self.policy.before_admission(self)
        if not self.policy.fixed_keys:
            entries = ((self.policy.key(group), group) for _, group in self._queue)
            self._queue = sorted(entries, key=itemgetter(0))
        for _, group in self._queue:  # removing a group replaces the list: safe while iterating
            if budget <= 0 or len(self.running) == self.max_running:
                break
            if not self.policy.may_start(group):
                continue
            search = self.prompts.search(group, written_now)
            segment, ready = search.next, search.wait or not search.next or search.next.ready()
            fits = ready and not search.wait and self._fits(group, busy=bool(chunks))
            # Not below an ancestor that is written in this step.
            if not fits or not written_now.isdisjoint(segment.node for segment in group.path):
                self.prompts.give_back(search)
                waits |= not ready
                if fits or search.wait or not ready:
                    continue
                break
            self.prompts.confirm(group, search)
            if segment is not None:
                chunks.append(self.prompts.write(group, segment, budget))
                budget -= chunks[-1].stop - chunks[-1].start
                written_now.add(segment.node)
                continue
            budget -= self._start_rollouts(group, budget, chunks, restored)
            if group.waiting:
                break
        return restored, waits

    def _fits(self, group: Group, *, busy: bool) -> bool:
        """Whether the free pages suffice for a group's next rollout and its prompt."""
        size, rollout = self.tree.page_size, group.waiting[0]
        pages = cdiv(1 + rollout.scheduled, size)
        pages += self.prompts.pages_needed(group)
        if self.running or busy:
            return self.policy.admits(rollout, pages, self)
        while pages > self.tree.free_pages:
            if not self._drop_idle_prompt(keep=group.path):
                return False
        return True

    def _start_rollouts(
        self, group: Group, budget: int, chunks: list[Chunk], restored: list[PageMove]
    ) -> int:
        """Start as many rollouts of a group as fit, its prompt complete; returns the tokens
        written."""
        left = budget
        while group.waiting and left and len(self.running) < self.max_running:
            if not self._fits(group, busy=bool(chunks)):
                break
            rollout = self._start(group)
            if rollout in self._host_tokens:
                restored.append((rollout, self._restore(rollout)))
            if self._unwritten(rollout) == 1:
                self._start_decoding(rollout)
                left -= 1
            else:
                self._catching_up[rollout] = None
                left -= self._write_rollout(rollout, left, chunks)
        return budget - left

    def _start(self, group: Group) -> Rollout:
        """Move a group's next waiting rollout to the running ones; reserves its known tokens."""
        rollout = group.waiting.pop(0)
        if not group.waiting:
            self._dequeue(group)
        rollout.node = self.tree.add(group.path[-1].node if group.path else None)
        self.tree.reserve(rollout.node, 1 + rollout.scheduled)
        rollout.batch_index = self._free_indices.pop()
        self.running[rollout] = None
        self.counts.prefix_hits += group.prompt_tokens - 1
        self.counts.started += not rollout.scheduled
        return rollout

    def _write_rollout(self, rollout: Rollout, budget: int, chunks: list[Chunk]) -> int:
        """Write the next chunk of a rollout that was preempted; returns its tokens."""
        start = self.tree.length(rollout.node)
        tokens = min(self._unwritten(rollout), budget)
        if tokens > 0:
            samples = tokens == self._unwritten(rollout)
            self.tree.grow([rollout.node], tokens)
            rollout.scheduled += samples
            chunks.append(Chunk(rollout, start, start + tokens, samples))
        return max(tokens, 0)

    def _preempt(self) -> Rollout:
        """Take the pages of the policy's victim, which keeps its tokens and waits again."""
        rollout = self.policy.victim(self.running)
        pages, length = self.tree.pages(rollout.node), self.tree.length(rollout.node)
        used = pages[: cdiv(length, self.tree.page_size)]
        if len(used) <= self.host_pages:
            self._evicted.append((rollout, used))
            self._host_tokens[rollout] = length
            self.host_pages -= len(used)
        else:
            self.counts.recomputed += length
        self._stop(rollout)
        group = rollout.group
        if not group.waiting:
            self._enqueue(group)
        group.waiting.insert(0, rollout)
        rollout.preemptions += 1
        self.counts.preemptions += 1
        return rollout

    def _drop_idle_prompt(self, keep: Sequence[Segment] = ()) -> bool:
        """Drop the youngest KV that no running rollout reads, to be recomputed later."""
        segment = self.prompts.idle(keep)
        if segment is None:
            return False
        self.counts.recomputed += segment.written
        segment.dropped = segment.written
        self._free_prompt(segment)
        return True

    def _free_prompt(self, segment: Segment) -> None:
        self.prompts.free(segment)
        self._repeats_left = 0  # a waiting rollout may start in its pages

    def _end(self, rollout: Rollout, reason: str) -> None:
        """Remove an ended rollout from the running or the waiting ones."""
        rollout.finish_reason = reason
        if rollout.node >= 0:
            self._stop(rollout)
            return
        group = rollout.group
        group.waiting.remove(rollout)
        if not group.waiting:
            self._dequeue(group)
        if rollout in self._host_tokens:
            self._free_host_pages(rollout)

    def _restore(self, rollout: Rollout) -> tuple[int, ...]:
        """Append a starting rollout's tokens on the host; returns the pages to copy them into."""
        tokens = self._host_tokens[rollout]
        self.tree.grow([rollout.node], tokens)
        return self.tree.pages(rollout.node)[: self._free_host_pages(rollout)]

    def _free_host_pages(self, rollout: Rollout) -> int:
        """Free a rollout's pages on the host; returns their number."""
        pages = cdiv(self._host_tokens.pop(rollout), self.tree.page_size)
        self.host_pages += pages
        return pages

    def _stop(self, rollout: Rollout) -> None:
        self.tree.release(rollout.node)
        self._decoding.pop(rollout.node, None)
        self._catching_up.pop(rollout, None)
        self._free_indices.append(rollout.batch_index)
        rollout.node = rollout.batch_index = -1
        del self.running[rollout]
        self._repeats_left = 0

    def _enqueue(self, group: Group) -> None:
        insort(self._queue, (self.policy.key(group), group), key=itemgetter(0))

    def _dequeue(self, group: Group) -> None:
        self._queue = [entry for entry in self._queue if entry[1] is not group]
