"""A model of transformers that runs over a PagedCache, called directly."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kernels.rotary_attention import rotary_attention
from kernels.rotary_tables import rotary_frequencies
from model.hf.paged_attention import NAME, no_mask, paged_attention, register
from tests.model.hf.test_generate import causal_lm, prompts
from tests.support.errors import max_error

pytestmark = pytest.mark.judge


@pytest.fixture
def model() -> Any:
    register()
    model = causal_lm("Llama")
    model.set_attn_implementation(NAME)
    return model


def paged_cache(model: Any, **options: object) -> Any:
    from model.hf.paged_cache import PagedCache

    return PagedCache(model.config, **options)


def logits(model: Any, ids: torch.Tensor, *cache: object, **options: object) -> torch.Tensor:
    """Of ids, with the cache by place: its name depends on the version."""
    with torch.no_grad():
        return model(ids, options.get("attention_mask"), None, *cache, use_cache=bool(cache)).logits


def test_a_conversation(model: Any):
    """Guards steps of any length, before and after a fork, and the cache after `reset`."""
    cache, stock = paged_cache(model), causal_lm("Llama")
    prompt, turns = prompts(2, 21), prompts(4, 130)
    for _ in range(2):
        assert (cache.get_seq_length(), cache.batch_size) == (0, -1)
        logits(model, prompt[:, :8], cache)
        logits(model, prompt[:, 8:], cache)
        cache.batch_repeat_interleave(2)
        assert (cache.get_seq_length(), cache.batch_size, len(cache)) == (21, 4, 3)
        assert cache.get_mask_sizes(5, 0) == (26, 0)
        ours = [logits(model, part, cache) for part in turns.split([1, 1, 100, 1, 27], dim=1)]
        expected = logits(stock, torch.cat([prompt.repeat_interleave(2, dim=0), turns], dim=1))
        assert max_error(torch.cat(ours, dim=1), expected[:, 21:]) < 1e-4
        cache.reset()


def test_attention_that_calls_the_ops_itself(model: Any):
    """Guards `begin` and `pages`, for attention that rotates and writes K and V in one op."""
    cache, stock, config = paged_cache(model), causal_lm("Llama"), model.config
    frequencies = rotary_frequencies(model.model.rotary_emb.inv_freq)

    def attend(self: Any, hidden_states: torch.Tensor, **kwargs: Any) -> tuple:
        batch, tokens, _ = hidden_states.shape
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        step = cache.begin(self.layer_idx, batch, tokens)
        rows = hidden_states.flatten(0, 1)
        qkv = torch.cat([f(rows) for f in (self.q_proj, self.k_proj, self.v_proj)], dim=1)
        out = rotary_attention(
            qkv,
            None,
            None,
            frequencies,
            step.positions,
            step.slots,
            cache.pages(self.layer_idx),
            step.plan,
            scale=self.scaling,
        )
        return self.o_proj(out.view(batch, tokens, -1)), None

    for layer in model.model.layers:
        layer.self_attn.forward = attend.__get__(layer.self_attn)
    config._attn_implementation = "sdpa"
    prompt, turns = prompts(1, 21), prompts(3, 4)
    logits(model, prompt, cache)
    cache.batch_repeat_interleave(3)
    ours = torch.cat([logits(model, ids, cache) for ids in turns.split(1, dim=1)], dim=1)
    expected = logits(stock, torch.cat([prompt.expand(3, -1), turns], dim=1))[:, 21:]
    assert max_error(ours, expected) < 1e-4


@torch.no_grad()
def test_a_window_that_only_the_module_knows(model: Any):
    """Guards models whose attention has a sliding window and does not pass it on."""
    cache, q, kv = paged_cache(model), torch.randn(1, 4, 9, 16), torch.randn(2, 1, 2, 9, 16)
    pages, step = cache.update(*kv, 0)
    silent, windowed = (SimpleNamespace(sliding_window=w, is_causal=True) for w in (None, 3))
    with_window, _ = paged_attention(windowed, q, pages, step, None)
    expected, _ = paged_attention(silent, q, pages, step, None, sliding_window=3)
    assert torch.equal(with_window, expected)
    assert not torch.equal(expected, paged_attention(silent, q, pages, step, None)[0])


def test_refusals(model: Any):
    """Guards one clear line in place of wrong numbers or an error deep inside."""
    from transformers import DynamicCache

    ids, cache = prompts(2, 5), paged_cache(model)
    for other in ((), (DynamicCache(),)):
        with pytest.raises(ValueError, match="needs a PagedCache"):
            logits(model, ids, *other)
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    with pytest.raises(ValueError, match="padding is not supported"):
        logits(model, ids, cache, attention_mask=mask)
    with pytest.raises(ValueError, match="only causal masks are supported, without padding"):
        logits(model, ids, cache, attention_mask=torch.zeros(2, 1, 5, 5))
    with pytest.raises(ValueError, match="the last step did not reach all layers: call reset"):
        logits(model, ids, cache)  # layer 0 alone holds the refused tokens
    cache.reset()
    for size, window in ((None, None), (4, 4)):
        no_mask(local_size=size, config=SimpleNamespace(sliding_window=window))
    with pytest.raises(ValueError, match="chunked attention is not supported"):
        no_mask(local_size=4, config=SimpleNamespace(sliding_window=None))
    logits(model, ids, cache, attention_mask=torch.ones_like(mask))
    cache.reorder_cache(torch.tensor([0, 1]))
    cache.crop(0)
    for call, message in (
        (lambda: cache.reorder_cache(torch.tensor([1, 0])), "cannot be reordered, as beam search"),
        (lambda: cache.crop(-1), "cannot be removed, as assisted generation"),
        (lambda: cache.batch_select_indices(torch.tensor([0])), "cannot be selected"),
        (lambda: logits(model, ids[:1], cache), "has 2 sequences, the input has 1 rows"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="needs attention 'pacore_paged', not 'sdpa'"):
        logits(model, ids, paged_cache(model))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"softcap": 30.0}, "softcap"),
        ({"s_aux": torch.zeros(4)}, "attention sinks"),
        ({"dropout": 0.1}, "dropout is not supported"),
    ],
)
def test_what_the_op_does_not_compute(model: Any, options: dict, message: str):
    """Guards models whose attention has more than softmax(Q K^T) V."""
    cache = paged_cache(model)
    logits(model, prompts(1, 3), cache)
    query = torch.zeros(1, 4, 3, 16)
    module = model.model.layers[0].self_attn
    with pytest.raises(ValueError, match=message):
        paged_attention(module, query, cache.pages(0), cache, None, **options)
    module.is_causal = False
    with pytest.raises(ValueError, match="only causal attention"):
        paged_attention(module, query, cache.pages(0), cache, None)
