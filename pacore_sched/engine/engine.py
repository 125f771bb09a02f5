"""The engine loop: schedule, launch, update, until every group is done.

Serves any number of groups at the same time, from any problem and round, on one executor. With
`ahead`, the next step is launched before the previous one's tokens are read, so that the device
never waits for the host. A rollout that turns out to have ended has then written one token too
many, into pages that are still its own.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

from kernels.runtime.spans import span, spanned
from model.errors import InputError
from pacore_sched.engine.speculation import SiblingDrafts
from pacore_sched.engine.stopping import Stopping
from pacore_sched.sched.policy import ORACLES, POLICIES, LaterRoundFirst
from pacore_sched.sched.prefix_tree import PrefixTree
from pacore_sched.sched.request import (
    Batch,
    Group,
    Partial,
    Rollout,
    SampledTokens,
    Sampling,
    Segment,
    check_top_logprobs,
)
from pacore_sched.sched.scheduler import TOKEN_BUDGET, Scheduler

IDLE_S = 1e-3  # sleep in a step that could only wait for images


class Executor(Protocol):
    """The executor as the engine uses it: it runs batches on a model (executor.py)."""

    num_pages: int
    page_size: int
    max_running: int
    asynchronous: bool  # whether `launch` returns before the step is done

    def launch(self, tree: PrefixTree, batch: Batch) -> Any:
        """Start a step, on a GPU without waiting for it; returns a handle for `collect`."""

    def collect(self, pending: Any) -> SampledTokens:
        """What a step has sampled."""


ExecutorT = TypeVar("ExecutorT", bound=Executor)


@dataclass
class EngineStats:
    """Totals over an engine's life, in tokens unless noted."""

    steps: int = 0  # steps of the decoder
    generated: int = 0
    wasted: int = 0  # sampled for rollouts that had ended, or after a wrong draft token
    drafted: int = 0
    accepted: int = 0  # of the drafted ones
    kv_read: int = 0  # tokens whose KV decoding read, each node once per step
    kv_read_unshared: int = 0  # the same if every rollout read its whole context itself


class Engine(Generic[ExecutorT]):
    """Takes groups of rollouts, returns ended rollouts.

    policy: a name in POLICIES, or a policy
    max_running: rollouts that decode at the same time, at most the executor's
    token_budget: the most tokens that one step writes; longer prompts are cut into chunks
    ahead: whether the next step is launched before the last one's tokens are known; by default, if
        the executor is asynchronous
    speculate: draft from siblings while at most this many rollouts run; 0 is never. The tokens are
        the same, except for the rounding of matrix products
    host_pages: pages of preempted rollouts that may be moved to host memory instead of recomputed
    prefix_cache: whether prompts find the KV of earlier ones with the same beginning
    """

    def __init__(
        self,
        executor: ExecutorT,
        stopping: Stopping,
        *,
        policy: LaterRoundFirst | str = "later-round-first",
        max_running: int | None = None,
        token_budget: int = TOKEN_BUDGET,
        ahead: bool | None = None,
        speculate: int = 0,
        host_pages: int = 0,
        prefix_cache: bool = True,
    ) -> None:
        self.executor, self.stopping = executor, stopping
        self.ahead = executor.asynchronous if ahead is None else ahead
        self.speculate = speculate
        running = min(max_running or executor.max_running, executor.max_running)
        self._new_scheduler = partial(
            Scheduler,
            executor.num_pages,
            executor.page_size,
            max_running=running,
            token_budget=max(token_budget, running),
            host_pages=host_pages,
            prefix_cache=prefix_cache,
        )
        self.scheduler = self._new_scheduler(
            find_policy(policy) if isinstance(policy, str) else policy
        )
        self.stats = EngineStats()
        self._begin()

    @property
    def busy(self) -> bool:
        """Whether a group is not done, or a step's tokens have not been read."""
        return bool(self.scheduler.groups or self._in_flight)

    def submit(
        self,
        path: Sequence[Segment],
        last_token: int,
        seeds: Mapping[int, int],
        sampling: Sampling,
        *,
        problem: int = 0,
        round: int = 0,
        need: int | None = None,
        lengths: Mapping[int, int] | None = None,
        partial: Mapping[int, Partial] | None = None,
    ) -> Group:
        """Add a group with one rollout per entry of `seeds` (index -> seed) over one prompt.

        path, last_token: the prompt without its last token, and that token (sched/request.py)
        problem, round: used by policies
        need: the group is done when this many rollouts have ended; the default is all
        lengths: index -> max_tokens where it differs from the sampling's
        partial: index -> what a rollout has generated elsewhere; its KV is written again

        Raises InputError for a group without rollouts, one that can never fit in memory, and
        limits that are out of range.
        """
        check_top_logprobs(sampling.top_logprobs)
        path = [segment for segment in path if segment.tokens]
        need = len(seeds) if need is None else need
        if not 1 <= need <= len(seeds):
            raise InputError(
                f"need must be from 1 to the group's {len(seeds)} rollouts, not {need}"
            )
        limits = {index: (lengths or {}).get(index, sampling.max_tokens) for index in seeds}
        if min(limits.values()) < 1:
            raise InputError(f"max_tokens must be at least 1, not {min(limits.values())}")
        group = Group(path, last_token, sampling, problem, round, need)
        longest, size = max(limits.values()), self.executor.page_size
        pages = self.scheduler.max_pages(path, longest)
        if pages > self.executor.num_pages:
            raise InputError(
                f"a prompt of {group.prompt_tokens} tokens and a rollout of up to {longest} need"
                f" {pages} KV pages of {size} tokens, but there are {self.executor.num_pages}:"
                " lower max_tokens, or give the KV more memory (--kv-tokens)"
            )
        group.rollouts = [Rollout(group, i, seed, limits[i]) for i, seed in seeds.items()]
        for rollout in group.rollouts:
            before = (partial or {}).get(rollout.index, Partial())
            rollout.tokens, rollout.logprobs = list(before.tokens), list(before.logprobs)
            rollout.scheduled = len(before.tokens)
        self.scheduler.submit(group)
        return group

    def step(self) -> list[Rollout]:
        """Run one step; returns the rollouts that ended, and siblings cancelled with them.

        With `ahead`, a step's tokens are known after the next one has been launched. Returns []
        also if everything left waits for its images.
        """
        with span("engine step", self.stats.steps):
            try:
                return self._step()
            except BaseException:
                self.scheduler.prompts.distrust()
                raise

    def detach(self, rollout: Rollout) -> Partial:
        """Remove an unfinished rollout, which goes on in another engine; its group waits for it."""
        self.scheduler.detach(rollout)
        self._drafts.forget_rollout(rollout)
        return Partial(tuple(rollout.tokens), tuple(rollout.logprobs))

    def ended_elsewhere(self, group: Group) -> list[Rollout]:
        """Count a detached rollout that has ended; returns the siblings cancelled with it."""
        cancelled = self.scheduler.ended_elsewhere(group)
        if group not in self.scheduler.groups:
            self._drafts.forget(group)
        return cancelled

    def cancel(self, group: Group) -> list[Rollout]:
        """End a group now; returns its rollouts that had not ended."""
        self._drafts.forget(group)
        return self.scheduler.cancel(group)

    def reset(self) -> None:
        """Forget all groups, after a step has failed; the executor must have been reset before.

        The totals and the policy are kept.
        """
        before = self.scheduler
        self.scheduler = self._new_scheduler(before.policy, counts=before.counts)
        self.scheduler.steps = before.steps
        self._begin()

    def text(self, rollout: Rollout) -> str:
        """The text of an ended rollout; "" after an error."""
        return self.stopping.text(rollout)

    def _begin(self) -> None:
        self._drafts = SiblingDrafts()
        self._in_flight: tuple[Batch, object] | None = None
        self._last_reads: tuple[Batch | None, int, int, int] = (None, 0, 0, 0)

    def _step(self) -> list[Rollout]:
        speculating = 0 < len(self.scheduler.running) <= self.speculate
        ended = self._collect() if speculating else []
        batch = spanned("schedule", self.scheduler.schedule)()
        if batch and speculating:
            batch = self._with_drafts(batch)
        execute = spanned("execute", self.executor.launch)
        pending = execute(self.scheduler.tree, batch) if batch else None
        previous, self._in_flight = self._in_flight, None
        if batch:
            self._count(batch)
            self._in_flight = batch, pending
        if previous:
            ended += spanned("update", self._update)(*previous)
        if not self.ahead or (batch and batch.drafts):
            ended += self._collect()
        if not previous and not batch and self.scheduler.groups:
            time.sleep(IDLE_S)
        return ended

    def _collect(self) -> list[Rollout]:
        """Wait for the step in flight, if there is one."""
        if self._in_flight is None:
            return []
        previous, self._in_flight = self._in_flight, None
        return spanned("update", self._update)(*previous)

    def _update(self, batch: Batch, pending: object) -> list[Rollout]:
        """Append a step's tokens to their rollouts; returns those that end, cancelled ones
        included."""
        sampled = self.executor.collect(pending)
        if batch.drafts:
            return self._verify(batch, sampled)
        ended = []
        for index, rollout in zip(range(len(sampled.tokens)), batch.sampled, strict=True):
            if rollout.finish_reason:
                self.stats.wasted += 1
            elif reason := self._take(rollout, sampled, index):
                ended += self._finish(rollout, reason)
        return ended

    def _take(self, rollout: Rollout, sampled: SampledTokens, index: int) -> str | None:
        """Append a rollout's next token, entry `index` of `sampled`; returns why the rollout ends,
        or None."""
        if sampled.tokens[index] < 0:
            return "error"
        rollout.tokens.append(sampled.tokens[index])
        rollout.logprobs.append(sampled.logprobs[index])
        if sampled.top_logprobs and rollout.group.sampling.top_logprobs:
            rollout.top_logprobs.append(sampled.top_logprobs[index])
        self.stats.generated += 1
        return self.stopping.reason(rollout)

    def _finish(self, rollout: Rollout, reason: str) -> list[Rollout]:
        ended = [rollout, *self.scheduler.finish(rollout, reason)]
        if rollout.group not in self.scheduler.groups:
            self._drafts.forget(rollout.group)
        return ended

    def _with_drafts(self, batch: Batch) -> Batch:
        """The batch with drafts from siblings, where there are pages for them."""
        drafts, budget = [], self.scheduler.token_budget - len(batch.decode)
        for rollout in () if batch.chunks else batch.decode:
            max_tokens = min(rollout.max_tokens - rollout.scheduled, budget)
            draft = self._drafts.draft(rollout, max_tokens) if max_tokens > 0 else ()
            if draft and not self.scheduler.append_draft(rollout, len(draft)):
                draft = ()
            budget -= len(draft)
            drafts.append(draft)
        if not any(drafts):
            return batch
        return replace(batch, drafts=tuple(drafts), steps=1)

    def _verify(self, batch: Batch, sampled: SampledTokens) -> list[Rollout]:
        """Append the tokens sampled after drafts, up to the first that the draft did not
        predict."""
        ended, start = [], 0
        for rollout, draft in zip(batch.decode, batch.drafts, strict=True):
            first = start
            start += len(draft) + 1
            if rollout.finish_reason:  # cancelled when a sibling ended in this step
                self.stats.wasted += 1 + len(draft)
                continue
            accepted, reason = 0, None
            for i, token in enumerate(sampled.tokens[first:start]):
                reason = self._take(rollout, sampled, first + i)
                if reason or i == len(draft) or token != draft[i]:
                    break
                accepted += 1
            self.stats.drafted += len(draft)
            self.stats.accepted += accepted
            self.stats.wasted += len(draft) - accepted
            self._drafts.verified(rollout, len(draft), accepted)
            self.scheduler.settle_draft(rollout, accepted)
            if reason:
                ended += self._finish(rollout, reason)
        return ended

    def _count(self, batch: Batch) -> None:
        """Count a step, and the KV that its decoding rollouts read."""
        batch_before, shared, unshared, rows = self._last_reads
        if batch is batch_before:  # every rollout has grown by one token
            shared, unshared = shared + rows, unshared + rows
        else:
            nodes: dict[int, int] = {}
            rows, unshared = len(batch.decode), 0
            tree = self.scheduler.tree
            for rollout in batch.decode:
                unshared += tree.context_length(rollout.node)
                nodes |= {node: tree.length(node) for node in tree.path(rollout.node)}
            shared = sum(nodes.values())
        self._last_reads = batch, shared, unshared, rows
        self.stats.steps += 1
        self.stats.kv_read += shared
        self.stats.kv_read_unshared += unshared


def find_policy(name: str) -> LaterRoundFirst:
    """The policy of a name. Raises InputError for unknown ones, and those only for simulation."""
    available = [key for key in POLICIES if key not in ORACLES]
    if name in ORACLES:
        raise InputError(f"policy {name!r} knows lengths beforehand: it works in `simulate` only")
    if name not in available:
        raise InputError(f"unknown policy {name!r}; choose one of: {', '.join(available)}")
    return POLICIES[name]()
