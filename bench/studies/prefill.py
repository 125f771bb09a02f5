"""Reading a prompt: a whole decoder, from the prompt's tokens to the logits of the last one.

Our forms read it as the engine does, in steps of at most TOKEN_BUDGET tokens. Tokens are random.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from bench.errors import compare
from bench.model_peers.peer import LoadedPeer
from bench.model_peers.step_rows import begin, time_step
from kernels.runtime.arithmetic import cdiv
from model.config import DecoderConfig
from model.decoder import Decoder, Step
from model.impls import impl_per_op
from model.kv_cache import PAGE_SIZE
from model.step3vl import Step3VL
from pacore_sched.sched.scheduler import TOKEN_BUDGET

MIN_REPEATS = 3  # a call may take ten seconds


@dataclass(frozen=True)
class PrefillCase:
    """One prompt of `tokens` tokens."""

    tokens: int
    op: ClassVar[str] = "prefill"
    batch: ClassVar[int] = 1  # rows of logits

    @property
    def name(self) -> str:
        return f"N{self.tokens}"

    @property
    def shape(self) -> dict[str, int]:
        return {"tokens": self.tokens}

    def bytes(self, config: DecoderConfig, dtype: torch.dtype) -> int:
        """Bytes to move: every weight once (only the tokens' rows of the embedding), and the KV."""
        weights = decoder_weights(config) + self.tokens * config.hidden
        kv = config.kv_bytes_per_token(dtype.itemsize)
        return weights * dtype.itemsize + self.tokens * kv

    def flops(self, config: DecoderConfig) -> int:
        """Two per weight and token, but of the LM head only for the last token, plus attention's
        two products, in which a token reads itself and those before it."""
        head = config.vocab_size * config.hidden
        products = 2 * (self.tokens * (decoder_weights(config) - head) + head)
        attention = 4 * config.layers * config.heads * config.head_dim
        return products + attention * self.tokens * (self.tokens + 1) // 2


def time_prefill(
    model: Step3VL,
    case: PrefillCase,
    forms: Mapping[str, str | None],
    peers: Mapping[str, LoadedPeer],
    budget_s: float = 3.0,
) -> list[dict]:
    """A row per form (its `impl`) and peer, with `tokens_per_second`; errors compare the logits
    with the eager ones. Leaves the model with the best form of every op."""
    config, decoder = model.config.decoder, model.decoder
    prompt = random_ids(case.tokens, model)
    cache = model.new_cache(cdiv(case.tokens, PAGE_SIZE))
    chunks = [
        (chunk, Step.of_sequence(index * TOKEN_BUDGET, len(chunk), cache))
        for index, chunk in enumerate(prompt.split(TOKEN_BUDGET))
    ]

    def logits(impl: str | None) -> Tensor:
        model.set_impl(impl)
        for ids, step in chunks:
            hidden = decoder(decoder.embed(ids), step, cache)
        return decoder.logits(hidden[-1:])

    with torch.inference_mode():
        expected = logits("eager")
        errors = {name: compare(logits(impl), expected) for name, impl in forms.items()}
    calls: dict[str, Callable] = {name: partial(logits, impl) for name, impl in forms.items()}
    rows = time_step(
        case,
        model,
        calls,
        errors,
        begin(peers, lambda peer: peer.prefill(prompt)),
        expected,
        num_bytes=lambda name: case.bytes(config, model.dtype),
        budget_s=budget_s,
        min_repeats=MIN_REPEATS,
    )
    model.set_impl(None)
    for row in rows:
        if row["median_us"]:
            row["tokens_per_second"] = case.tokens / row["median_us"] * 1e6
    return rows


def random_ids(count: int, model: Step3VL) -> Tensor:
    """Token ids, int64 [count], the same in every run."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.decoder.vocab_size, (count,), generator=generator)
    return ids.to(model.device)


def decoder_weights(config: DecoderConfig) -> int:
    """How many weights every step reads: all of the decoder's but the embedding."""
    with torch.device("meta"):
        decoder = Decoder(config, impl=impl_per_op(None), device="meta", dtype=torch.float32)
    tensors = decoder.checkpoint_tensors()
    return sum(t.numel() for name, t in tensors.items() if "embed_tokens" not in name) + (
        config.vocab_size * config.hidden if config.tied_embeddings else 0
    )
