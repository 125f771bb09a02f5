"""The engine: prefill a prompt once, then decode all rollouts of a round as one batch over it.

This first engine serves one round of one problem at a time and keeps enough pages for all of it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kernels.prefix_plan import PrefixPlan
from kernels.sampling import sample
from model.decoder import Step
from model.step3vl import Step3VL
from pacore_sched.plan import StepBatch, plan_step
from pacore_sched.prefix_tree import PrefixTree

PREFILL_CHUNK = 512  # tokens per prefill step: bounds the memory of a long prompt's activations


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; temperature 0 is greedy, top_k 0 and top_p 1 truncate nothing."""

    max_tokens: int = 512
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


@dataclass
class Rollout:
    """One generation.

    `finish_reason`, once it has ended, is "stop" (the last of `tokens` is an eos id), "length", or
    "error" (the next logits held NaN, or nothing else than -inf).
    """

    index: int
    seed: int
    node: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None


@dataclass
class Stats:
    """Counts over an engine's life, of tokens unless said otherwise."""

    steps: int = 0  # forwards of the decoder
    prefilled: int = 0
    generated: int = 0
    kv_read: int = 0  # tokens whose KV decode steps had to read, each node once per step
    kv_read_unshared: int = 0  # the same if every rollout had read its whole context itself


class Engine:
    """A model, its KV pages, and the prefix tree that says who owns them."""

    def __init__(self, model: Step3VL, num_pages: int) -> None:
        self.model = model
        self.cache = model.new_cache(num_pages)
        self.tree = PrefixTree(num_pages, self.cache.page_size)
        self.stats = Stats()

    @torch.inference_mode()
    def prefill(self, embeddings: Tensor, parent: int | None = None) -> tuple[int, Tensor]:
        """Write embeddings [T, hidden] into a new node below `parent`.

        Returns the node, held by the caller, and the last token's final hidden state [1, hidden].
        Raises OutOfPages, having changed nothing, if the pool is too small.
        """
        node = self.tree.add(parent)
        try:
            for chunk in embeddings.split(PREFILL_CHUNK):
                self.tree.append(node, len(chunk))
                hidden = self._forward(chunk, plan_step(self.tree, [(node, len(chunk))]))
        except BaseException:
            self.tree.release(node)
            raise
        self.stats.prefilled += len(embeddings)
        return node, hidden

    @torch.inference_mode()
    def decode(
        self,
        prompt: int,
        hidden: Tensor,
        seeds: Sequence[int],
        sampling: Sampling,
        on_step: Callable[[int], None] = lambda tokens: None,
    ) -> Iterator[Rollout]:
        """Generate one rollout per seed below node `prompt`; yield each as it ends.

        hidden: [1, hidden], as `prefill` returned it. A rollout's tokens depend on its seed, not on
        its neighbours or its place among them, as far as matrix products of other batch sizes
        round alike. `on_step` is told the number of tokens of each step. A rollout's pages are
        free as soon as it has ended, and all of them if the caller stops early.
        Raises OutOfPages if the pool runs dry.
        """
        running = [Rollout(index, seed, self.tree.add(prompt)) for index, seed in enumerate(seeds)]
        hidden = hidden.expand(len(running), -1)
        try:
            while running:
                tokens = self._sample(running, hidden, sampling)
                on_step(len(running))
                for rollout in [r for r in running if r.finish_reason]:
                    self.tree.release(rollout.node)
                    running.remove(rollout)
                    yield rollout
                if running:
                    hidden = self._advance(running, tokens)
        finally:
            for rollout in running:
                self.tree.release(rollout.node)

    def _sample(self, running: list[Rollout], hidden: Tensor, sampling: Sampling) -> Tensor:
        """Draw every rollout's next token, note which have ended, return those of the others."""
        device = self.model.device
        positions = [self.tree.context_length(rollout.node) for rollout in running]
        tokens, logprobs = sample(
            self.model.decoder.logits(hidden),
            torch.tensor([rollout.seed for rollout in running], device=device),
            torch.tensor(positions, device=device),
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            impl=self.model.impl["sample"],
        )
        pairs = zip(tokens.tolist(), logprobs.tolist(), strict=True)
        for rollout, (token, logprob) in zip(running, pairs, strict=True):
            if token < 0:
                rollout.finish_reason = "error"
                continue
            rollout.tokens.append(token)
            rollout.logprobs.append(logprob)
            self.stats.generated += 1
            if token in self.model.config.tokens.eos:
                rollout.finish_reason = "stop"
            elif len(rollout.tokens) == sampling.max_tokens:
                rollout.finish_reason = "length"
        return tokens[[rollout.finish_reason is None for rollout in running]]

    def _advance(self, running: list[Rollout], tokens: Tensor) -> Tensor:
        """One decode step that appends each rollout's token; hidden states [B, hidden]."""
        for rollout in running:
            self.tree.append(rollout.node, 1)
        batch = plan_step(self.tree, [(rollout.node, 1) for rollout in running])
        # Siblings stand in the order in which they were added, which is that of `running`.
        hidden = self._forward(self.model.decoder.embed(tokens), batch)
        for node in batch.plan_nodes:
            self.stats.kv_read += node.kv_len
            self.stats.kv_read_unshared += node.kv_len * (node.row_end - node.row_start)
        return hidden

    def _forward(self, embeddings: Tensor, batch: StepBatch) -> Tensor:
        """Run a batch; the final hidden states of its work items' last tokens."""
        device = self.model.device
        self.stats.steps += 1
        plan = PrefixPlan.build(
            batch.plan_nodes,
            num_rows=len(batch.positions),
            num_pages=self.tree.num_pages,
            page_size=self.tree.page_size,
            device=device,
        )
        step = Step(
            torch.tensor(batch.positions, device=device),
            torch.tensor(batch.slots, device=device),
            plan,
        )
        return self.model.decoder(embeddings, step, self.cache)[list(batch.last_rows)]
