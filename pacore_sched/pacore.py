"""PaCoRe on an engine: every round's rollouts over one shared prompt, messages passed to the next.

    for each width: prompt -> rollouts in parallel -> compacted messages -> the next round's prompt

The images stand first in every round's prompt, in a node of their own that all rounds share.
"""

import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from model.image import Views
from model.kv_cache import PAGE_SIZE
from model.prompt import build_prompt, image_head_length
from model.step3vl import Step3VL
from model.terminal import InputError
from pacore_sched.engine import Engine, Rollout, Sampling
from pacore_sched.rounds import compact, round_messages, round_widths

if TYPE_CHECKING:
    from jinja2 import Template


@dataclass(frozen=True)
class Round:
    """One round as it happened; rollouts and texts in the order of their seeds."""

    prompt_tokens: int
    rollouts: tuple[Rollout, ...]
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Answer:
    """The outcome: `text` is the compacted message of the last round's only rollout."""

    text: str
    failed: bool  # that rollout ended in an error, and there is no text
    rounds: list[Round]
    prefix_tokens_saved: int  # prompt tokens that were not prefilled again for every rollout


class Pacore:
    """Answers one problem after another on its own engine."""

    def __init__(
        self,
        model: Step3VL,
        widths: Sequence[int],
        sampling: Sampling,
        *,
        seed: int = 0,
        template: "Template | None" = None,
    ) -> None:
        """`widths` are the exploring rounds'; a last round of one rollout follows them.

        Raises InputError if the KV of the widest round may not fit into memory.
        """
        self.model, self.widths, self.sampling = model, round_widths(widths), sampling
        self.seed, self.template = seed, template
        self.engine = Engine(model, _pages_for(model, max(self.widths), sampling.max_tokens))

    def answer(
        self,
        messages: Sequence[dict],
        views: Sequence[Views] = (),
        *,
        on_rollout: Callable[[int, Rollout, str], None] = lambda number, rollout, text: None,
        on_step: Callable[[int], None] = lambda tokens: None,
    ) -> Answer:
        """Run all rounds on a conversation whose image parts are `views`, in order.

        `on_rollout` gets the round's number, counted from 0, each rollout as it ends, and its text.
        Raises InputError for a prompt that leaves no room in the model's context.
        """
        stats = self.engine.stats
        before, rounds = stats.prefilled, []
        shared = _SharedImages(self.engine, views)
        try:
            for number, width in enumerate(self.widths):
                asked = messages
                if rounds:
                    asked = round_messages(messages, rounds[-1].texts, template=self.template)
                ids = build_prompt(asked, self.model.tokenizer, self.model.config, views)
                seeds = [rollout_seed(self.seed, number, index) for index in range(width)]
                rounds.append(self._round(ids, seeds, shared, partial(on_rollout, number), on_step))
        finally:
            shared.release()
        last = rounds[-1]
        return Answer(
            text=compact(last.texts[0]),
            failed=last.rollouts[0].finish_reason == "error",
            rounds=rounds,
            prefix_tokens_saved=sum(r.prompt_tokens * len(r.rollouts) for r in rounds)
            - (stats.prefilled - before),
        )

    def _round(
        self,
        ids: list[int],
        seeds: list[int],
        shared: "_SharedImages",
        on_rollout: Callable[[Rollout, str], None],
        on_step: Callable[[int], None],
    ) -> Round:
        """Prefill a prompt and decode one rollout per seed over it."""
        sampling = self._fitting(len(ids))
        prompt, hidden = shared.prefill(ids)
        done: dict[int, tuple[Rollout, str]] = {}
        try:
            for rollout in self.engine.decode(prompt, hidden, seeds, sampling, on_step):
                done[rollout.index] = rollout, self._text(rollout)
                on_rollout(*done[rollout.index])
        finally:
            self.engine.tree.release(prompt)
        rollouts, texts = zip(*(done[index] for index in range(len(seeds))), strict=True)
        return Round(len(ids), rollouts, texts)

    def _fitting(self, prompt_tokens: int) -> Sampling:
        """The sampling options, with max_tokens cut to what the context leaves room for."""
        context = self.model.config.decoder.max_positions
        if prompt_tokens >= context:
            raise InputError(f"the prompt has {prompt_tokens} tokens, the context is {context}")
        room = min(self.sampling.max_tokens, context - prompt_tokens)
        return replace(self.sampling, max_tokens=room)

    def _text(self, rollout: Rollout) -> str:
        """What a rollout said; a failed one has nothing to pass on."""
        if rollout.finish_reason == "error":
            return ""
        tokens = rollout.tokens[:-1] if rollout.finish_reason == "stop" else rollout.tokens
        return self.model.tokenizer.decode(tokens)


class _SharedImages:
    """The node of the images that open a conversation, kept from round to round."""

    def __init__(self, engine: Engine, views: Sequence[Views]) -> None:
        self.engine = engine
        self.features = engine.model.encode_images(views)
        self.node: int | None = None
        self.ids: list[int] = []

    def prefill(self, ids: Sequence[int]) -> tuple[int, torch.Tensor]:
        """Prefill a prompt, behind the shared node where it begins with the same ids."""
        model, engine = self.engine.model, self.engine
        if self.node is None:
            head = image_head_length(ids, model.tokenizer, model.config.tokens)
        else:
            head = len(self.ids) if ids[: len(self.ids)] == self.ids else 0
        embeddings = model.embed(torch.tensor(ids, device=model.device), self.features)
        if head and self.node is None:
            self.node, _ = engine.prefill(embeddings[:head])
            self.ids = list(ids[:head])
        return engine.prefill(embeddings[head:], self.node if head else None)

    def release(self) -> None:
        if self.node is not None:
            self.engine.tree.release(self.node)


def rollout_seed(seed: int, number: int, index: int) -> int:
    """The seed of rollout `index` in round `number`: the same whatever the other widths are."""
    return random.Random(f"{seed}/{number}/{index}").getrandbits(63)


def _pages_for(model: Step3VL, width: int, max_tokens: int) -> int:
    """Pages for `width` rollouts over the longest prompt. Raises InputError if they do not fit."""
    decoder = model.config.decoder
    tokens = min(max_tokens, decoder.max_positions)
    # A node's last page may be partly empty: one more for each of images, prompt and rollouts.
    pages = -(-decoder.max_positions // PAGE_SIZE) + 2 + width * -(-tokens // PAGE_SIZE)
    page_bytes = PAGE_SIZE * decoder.kv_bytes_per_token(model.dtype.itemsize)
    if pages * page_bytes > 0.9 * _free_bytes(model.device):
        raise InputError(
            f"{width} rollouts of {tokens} tokens over a prompt of up to {decoder.max_positions}"
            f" need {pages * page_bytes / 1e9:.1f} GB of KV,"
            f" {_free_bytes(model.device) / 1e9:.1f} GB of memory are free:"
            " lower the widths or max_tokens"
        )
    return pages


def _free_bytes(device: torch.device) -> int:
    """Memory that can be allocated on `device`; on a CPU that does not tell, all there is."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():  # what the page cache holds can be had as well
        lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
