"""The engine: schedule, execute, update, until the last rollout of the last group has ended.

It serves any number of groups at once, from any problem and round, on one executor. With `ahead`
the next step is launched before the last one's tokens are read, so that the device never waits for
the host; a rollout found to have ended then has written one token too many, into pages that are
still its own.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar

from kernels.runtime.spans import span, spanned
from model.errors import InputError
from pacore_sched.engine.speculation import SiblingDrafts
from pacore_sched.engine.stopping import Stopping
from pacore_sched.sched.policy import KNOW_LENGTHS, POLICIES, LaterRoundFirst
from pacore_sched.sched.prefix_tree import PrefixTree
from pacore_sched.sched.request import Batch, Group, Rollout, Sampling, Segment
from pacore_sched.sched.scheduler import Scheduler

IDLE_S = 1e-3  # how long a step takes in which there was nothing to do but to wait for images


class Executor(Protocol):
    """Runs batches on a model: what the engine asks of pacore_sched/engine/executor.py."""

    num_pages: int
    page_size: int
    max_running: int
    asynchronous: bool  # whether `launch` returns before the step is done

    def launch(self, tree: PrefixTree, batch: Batch) -> Any:
        """Begin a step, on a GPU without waiting for it; its pending, of a type of one's own."""

    def collect(self, pending: Any) -> tuple[list[int], list[float]]:
        """A step's tokens and log-probabilities in the order of `batch.sampled`.

        A rollout with a draft has 1 + len(draft) of them: after its last token, and each drafted.
        """


ExecutorT = TypeVar("ExecutorT", bound=Executor)


@dataclass
class EngineStats:
    """Counts over an engine's life, of tokens unless said otherwise."""

    steps: int = 0  # of the decoder
    generated: int = 0
    wasted: int = 0  # drawn for rollouts that had ended, or behind a wrong draft
    drafted: int = 0
    accepted: int = 0  # of the drafted ones
    kv_read: int = 0  # tokens whose KV decoding had to read, each node once per step
    kv_read_unshared: int = 0  # the same if every rollout had read its whole context itself


class Engine(Generic[ExecutorT]):
    """Groups of rollouts in, ended rollouts out.

    policy: a name in POLICIES, or a policy
    max_running: rollouts that decode at once, at most the executor's
    token_budget: tokens that a step writes at most: long prompts are cut into chunks of it
    ahead: whether the next step is launched before the last one's tokens are known; the default is
        as the executor works
    speculate: draft from siblings while at most so many rollouts run; 0 is never. The tokens are
        the same, but for the rounding of matrix products
    host_pages: pages of preempted rollouts that may be moved to the host rather than recomputed
    """

    def __init__(
        self,
        executor: ExecutorT,
        stopping: Stopping,
        *,
        policy: LaterRoundFirst | str = "later-round-first",
        max_running: int | None = None,
        token_budget: int = 2048,
        ahead: bool | None = None,
        speculate: int = 0,
        host_pages: int = 0,
    ) -> None:
        self.executor, self.stopping = executor, stopping
        self.ahead = executor.asynchronous if ahead is None else ahead
        self.speculate = speculate
        running = min(max_running or executor.max_running, executor.max_running)
        self.scheduler = Scheduler(
            executor.num_pages,
            executor.page_size,
            policy_named(policy) if isinstance(policy, str) else policy,
            max_running=running,
            token_budget=max(token_budget, running),
            host_pages=host_pages,
        )
        self.stats = EngineStats()
        self._drafts = SiblingDrafts()
        self._in_flight: tuple[Batch, object] | None = None
        self._shape: tuple[Batch | None, int, int, int] = (None, 0, 0, 0)

    @property
    def busy(self) -> bool:
        """Whether there is a group that is not done, or a step whose tokens are not read."""
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
    ) -> Group:
        """Ask for one rollout per entry of `seeds` (index -> seed) behind a prompt.

        path, last_token: the prompt, its last token apart (sched/request.py)
        problem, round: what policies go by
        need: the group is done when so many rollouts have ended; the default is all
        lengths: index -> max_tokens where that is not the sampling's

        Raises InputError for a group without rollouts, or one that could never fit into memory.
        """
        path = [segment for segment in path if segment.tokens]
        need = len(seeds) if need is None else need
        if not 1 <= need <= len(seeds):
            raise InputError(
                f"{need} of {len(seeds)} rollouts are to end: at least one must, of one"
            )
        limits = {index: (lengths or {}).get(index, sampling.max_tokens) for index in seeds}
        if min(limits.values()) < 1:
            raise InputError(f"max_tokens must be at least 1, not {min(limits.values())}")
        group = Group(path, last_token, sampling, problem, round, need)
        for index, seed in seeds.items():
            group.rollouts.append(Rollout(group, index, seed, limits[index]))
        pages, size = self.scheduler.max_pages(group), self.executor.page_size
        if pages > self.executor.num_pages:
            longest = max(limits.values())
            raise InputError(
                f"a prompt of {group.prompt_tokens} tokens and a rollout of up to {longest} need"
                f" KV for {pages * size} tokens, there is memory for"
                f" {self.executor.num_pages * size}: lower max_tokens"
            )
        self.scheduler.submit(group)
        return group

    def step(self) -> list[Rollout]:
        """Run one step; the rollouts that have ended by it or for it.

        With `ahead` a step's tokens are known after the next one has been launched. [] also if
        nothing can be done yet because all that is left waits for its images.
        """
        with span("engine step", self.stats.steps):
            return self._step()

    def cancel(self, group: Group) -> list[Rollout]:
        """End a group now; its rollouts that had not ended."""
        self._drafts.forget(group)
        return self.scheduler.cancel(group)

    def text(self, rollout: Rollout) -> str:
        """What an ended rollout said; "" after an error."""
        return self.stopping.text(rollout)

    def _step(self) -> list[Rollout]:
        speculating = 0 < len(self.scheduler.running) <= self.speculate
        ended = self._collect() if speculating else []
        batch = spanned("schedule", self.scheduler.schedule)()
        if batch and speculating:
            batch = self._with_drafts(batch)
        execute = spanned("execute", self.executor.launch)
        pending = execute(self.scheduler.tree, batch) if batch else None
        before, self._in_flight = self._in_flight, None
        if batch:
            self._count(batch)
            self._in_flight = batch, pending
        if before:
            ended += spanned("update", self._update)(*before)
        if not self.ahead or (batch and batch.drafts):
            ended += self._collect()
        if not before and not batch and self.scheduler.groups:
            time.sleep(IDLE_S)
        return ended

    def _collect(self) -> list[Rollout]:
        """Wait for the step in flight, if there is one."""
        if self._in_flight is None:
            return []
        before, self._in_flight = self._in_flight, None
        return spanned("update", self._update)(*before)

    def _update(self, batch: Batch, pending: object) -> list[Rollout]:
        """Hand out a step's tokens; the rollouts that they end, and siblings cancelled for it."""
        tokens, logprobs = self.executor.collect(pending)
        if batch.drafts:
            return self._verify(batch, tokens, logprobs)
        ended = []
        for rollout, token, logprob in zip(batch.sampled, tokens, logprobs, strict=True):
            if rollout.finish_reason:
                self.stats.wasted += 1
            elif reason := self._take(rollout, token, logprob):
                ended += self._finish(rollout, reason)
        return ended

    def _take(self, rollout: Rollout, token: int, logprob: float) -> str | None:
        """Give a rollout its next token; the reason why it ends, if it does."""
        if token < 0:
            return "error"
        rollout.tokens.append(token)
        rollout.logprobs.append(logprob)
        self.stats.generated += 1
        return self.stopping.reason(rollout)

    def _finish(self, rollout: Rollout, reason: str) -> list[Rollout]:
        ended = [rollout, *self.scheduler.finish(rollout, reason)]
        if rollout.group not in self.scheduler.groups:
            self._drafts.forget(rollout.group)
        return ended

    def _with_drafts(self, batch: Batch) -> Batch:
        """The batch with what siblings suggest, where there are pages for it."""
        drafts, budget = [], self.scheduler.token_budget - len(batch.decode)
        for rollout in () if batch.chunks else batch.decode:
            most = min(rollout.max_tokens - rollout.scheduled, budget)
            draft = self._drafts.draft(rollout, most) if most > 0 else ()
            if draft and not self.scheduler.append_draft(rollout, len(draft)):
                draft = ()
            budget -= len(draft)
            drafts.append(draft)
        if not any(drafts):
            return batch
        return replace(batch, drafts=tuple(drafts), steps=1)

    def _verify(self, batch: Batch, tokens: list[int], logprobs: list[float]) -> list[Rollout]:
        """Hand out the tokens drawn behind drafts, up to the first that a draft did not foresee."""
        ended, at = [], 0
        for rollout, draft in zip(batch.decode, batch.drafts, strict=True):
            drawn = tokens[at : at + len(draft) + 1], logprobs[at : at + len(draft) + 1]
            at += len(draft) + 1
            if rollout.finish_reason:  # cancelled by a sibling's end in this very step
                continue
            right, reason = 0, None
            for place, (token, logprob) in enumerate(zip(*drawn, strict=True)):
                reason = self._take(rollout, token, logprob)
                if reason or place == len(draft) or token != draft[place]:
                    break
                right += 1
            self.stats.drafted += len(draft)
            self.stats.accepted += right
            self.stats.wasted += len(draft) - right
            self._drafts.verified(rollout, len(draft), right)
            self.scheduler.settle_draft(rollout, right)
            if reason:
                ended += self._finish(rollout, reason)
        return ended

    def _count(self, batch: Batch) -> None:
        """Add a step, and the KV that its decoding rollouts read."""
        same, shared, unshared, rows = self._shape
        if batch is same:  # every rollout has grown by one token
            shared, unshared = shared + rows, unshared + rows
        else:
            nodes: dict[int, int] = {}
            rows, unshared = len(batch.decode), 0
            tree = self.scheduler.tree
            for rollout in batch.decode:
                unshared += tree.context_length(rollout.node)
                nodes |= {node: tree.length(node) for node in tree.path(rollout.node)}
            shared = sum(nodes.values())
        self._shape = batch, shared, unshared, rows
        self.stats.steps += 1
        self.stats.kv_read += shared
        self.stats.kv_read_unshared += unshared


def policy_named(name: str) -> LaterRoundFirst:
    """A policy by its name. Raises InputError for unknown ones, and those of the simulator."""
    known = [known for known in POLICIES if known not in KNOW_LENGTHS]
    if name in KNOW_LENGTHS:
        raise InputError(f"policy {name!r} knows lengths beforehand: it is for `simulate`")
    if name not in known:
        raise InputError(f"there is no policy {name!r}: take one of {', '.join(known)}")
    return POLICIES[name]()
