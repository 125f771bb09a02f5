"""transformers with our decoder's weights, in SDPA: its own copies of the prompt's KV.

That is what its `generate` does for several continuations of a prompt; `generate` also reads the
prompt once for each of them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bench.model_peers.peer import Generate, ModelPeer, OnStep, Work, on_cpu
from bench.peers.peer import Library, Unavailable, distribution, imported
from bench.validate.transformers_judge import causal_lm
from kernels.runtime.dtypes import dtype_name
from model.memory import free_bytes
from model.step3vl import Step3VL


class Transformers:
    """LlamaForCausalLM or Qwen3ForCausalLM."""

    def __init__(self, model: Step3VL) -> None:
        self.config, self.device = model.config.decoder, model.device
        self.causal_lm = causal_lm(model)
        name = dtype_name(model.dtype)
        attention = self.causal_lm.config._attn_implementation
        self.settings = f"{name} weights and KV, {attention}"
        self.kv_bytes = self.config.kv_bytes_per_token(model.dtype.itemsize)

    @torch.inference_mode()
    def decode_step(self, prompt: Tensor, suffixes: Tensor) -> Work:
        batch, suffix = suffixes.shape
        # A step copies the whole cache, one layer after the other, to append to it.
        needed = batch * (len(prompt) + suffix) * self.kv_bytes * (1 + 1 / self.config.layers)
        if needed > (free := free_bytes(self.device)):
            copies = f"{batch} copies of the prompt's KV"
            raise Unavailable(f"{copies}: {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
        cache = imported("transformers").DynamicCache()
        self._logits(prompt[None], cache)
        cache.batch_repeat_interleave(batch)
        if suffix > 1:
            self._logits(suffixes[:, :-1], cache)
        last = suffixes[:, -1:]

        def step() -> Tensor:
            logits = self._logits(last, cache)
            cache.crop(-1)
            return logits

        return Work(step, f"{self.settings}, copies of the prompt")

    def prefill(self, prompt: Tensor) -> Work:
        cache = imported("transformers").DynamicCache
        return Work(lambda: self._logits(prompt[None], cache()), self.settings)

    def generator(
        self, prompts: Sequence[Sequence[int]], lengths: Sequence[Sequence[int]], temperature: float
    ) -> tuple[Generate, str]:
        return _Generator(self.causal_lm, temperature), f"{self.settings}, copies of the prompt"

    @torch.inference_mode()
    def _logits(self, ids: Tensor, cache: Any) -> Tensor:  # noqa: ANN401
        """The logits of the last token of each row of ids, int [B, S]: fp32 [B, vocab]."""
        # By place: the fourth argument is called past_key_values in some versions, cache in others.
        out = self.causal_lm(ids, None, None, cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].float()


class _Generator:
    """`generate` with `num_return_sequences`: all continuations get as many tokens as the longest
    one needs."""

    def __init__(self, causal_lm: Any, temperature: float) -> None:  # noqa: ANN401
        self.causal_lm, self.temperature = causal_lm, temperature
        causal_lm.generation_config.eos_token_id = None  # no continuation ends early

    def __call__(self, prompt: Sequence[int], lengths: Sequence[int], on_step: OnStep) -> None:
        def count(ids: Tensor, scores: Tensor) -> Tensor:
            on_step(len(ids))
            return scores

        ids = torch.tensor([list(prompt)], device=self.causal_lm.device)
        self.causal_lm.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            num_return_sequences=len(lengths),
            max_new_tokens=max(lengths),
            do_sample=True,
            temperature=self.temperature,
            top_k=0,
            top_p=1.0,
            pad_token_id=0,
            logits_processor=[count],
        )


def _check(device: torch.device) -> None:
    on_cpu(device)
    imported("transformers")


LIBRARY = Library("transformers", "pip install transformers", distribution("transformers"), _check)
TRANSFORMERS = ModelPeer("transformers", LIBRARY, lambda config: None, Transformers)
