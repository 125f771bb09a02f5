"""`generate(model, input_ids, num_return_sequences=16)`: transformers' own, with the prompt's KV
computed and stored once.

transformers reads the prompt once for each sequence that it returns, and holds a copy of the
prompt's KV for each. Here all of them share the pages of a `PagedCache`. Sampling, processors of
logits and stopping criteria remain those of transformers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from kernels.runtime.dispatch import IMPLS
from model.hf.paged_attention import NAME, register

MODES = ("greedy_search", "sample")
# Arguments of transformers' `generate` that are passed on, besides those of GenerationConfig.
PASSED_ON = {
    *("attention_mask", "generation_config", "logits_processor", "prefix_allowed_tokens_fn"),
    *("stopping_criteria", "streamer", "synced_gpus", "tokenizer"),
}


@torch.no_grad()
def generate(
    model: Any,  # noqa: ANN401
    input_ids: Tensor,
    *,
    num_return_sequences: int | None = None,
    impl: str | None = None,
    **options: Any,  # noqa: ANN401
) -> Any:  # noqa: ANN401
    """What model.generate(input_ids, num_return_sequences=..., **options) returns.

    model: a decoder of transformers with causal attention, on one device, such as Qwen3ForCausalLM
    input_ids: int [B, P], without padding
    num_return_sequences: for each prompt; None: as the generation config says
    impl: of attention: "eager", "portable" or "triton"; None takes Triton on CUDA, else portable
    options: greedy search or sampling, and how to end

    The model's attention implementation is ours during the call. Raises ValueError for padding,
    for beams and other searches, for inputs besides token ids, and for outputs of whole prompts.
    """
    from model.hf.paged_cache import PagedCache

    if impl not in (None, *IMPLS):
        raise ValueError(f"generate: impl must be one of {', '.join(IMPLS)}, not {impl!r}")
    if num_return_sequences is not None:
        options["num_return_sequences"] = num_return_sequences
    config = _checked_config(model, input_ids, options)
    prompt = input_ids[:, :-1].to(model.device)  # the first step reads the last token
    cache = PagedCache(model.config, device=model.device, dtype=model.dtype, impl=impl)
    # Earlier versions of transformers call it past_key_values.
    name = "cache" if "cache" in signature(model.forward).parameters else "past_key_values"
    argument = {name: cache}
    for module in model.modules():  # an offset of positions that images of earlier calls left
        if getattr(module, "rope_deltas", None) is not None:
            module.rope_deltas = None
    with _paged(model):
        if prompt.shape[1]:
            model(prompt, use_cache=True, logits_to_keep=1, **argument)
        cache.batch_repeat_interleave(config.num_return_sequences or 1)
        return model.generate(input_ids, **argument, **options)


@contextmanager
def _paged(model: Any) -> Iterator[None]:  # noqa: ANN401
    """Let the model's decoder attend to pages."""
    register()
    decoder = model.get_decoder()
    before = decoder.config._attn_implementation
    try:
        decoder.set_attn_implementation(NAME)
        if decoder.config._attn_implementation != NAME:
            raise ValueError(
                f"generate: {type(decoder).__name__} does not call attention through transformers'"
                " AttentionInterface"
            )
        yield
    finally:
        decoder.set_attn_implementation(before)


def _checked_config(model: Any, input_ids: Tensor, options: dict[str, Any]) -> Any:  # noqa: ANN401
    """The generation config with `options`. Raises ValueError for what is not supported."""
    if input_ids.ndim != 2 or input_ids.is_floating_point() or not input_ids.numel():
        raise ValueError(f"generate: input_ids must be int [B, P], not {list(input_ids.shape)}")
    mask = options.get("attention_mask")
    if mask is not None and not mask.all():
        raise ValueError(
            "generate: attention_mask has zeros: pass prompts of equal length, or one at a time"
        )
    config = deepcopy(model.generation_config)
    if (given := options.get("generation_config")) is not None:
        config.update(**{n: v for n, v in given.to_dict().items() if v is not None})
    unknown = set(config.update(**options)) - PASSED_ON
    for name in sorted(unknown):
        raise ValueError(f"generate: {name} is not supported")
    if model.config.is_encoder_decoder:
        raise ValueError("generate: encoder-decoder models are not supported")
    mode = config.get_generation_mode().value
    if mode not in MODES:
        raise ValueError(
            f"generate: {mode.replace('_', ' ')} is not supported, only greedy search and sampling"
        )
    for name, usual in {
        "use_cache": True,
        "guidance_scale": 1.0,
        "prefill_chunk_size": None,  # earlier versions of transformers then ignore a filled cache
        "output_attentions": False,
        "output_hidden_states": False,
    }.items():
        if (value := getattr(config, name)) not in (None, usual):
            raise ValueError(f"generate: {name}={value} is not supported")
    return config
