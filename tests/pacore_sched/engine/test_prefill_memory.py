"""The memory of a prefill in chunks: what the engine's steps allocate, next to `prefill_bytes`."""

from dataclasses import replace

import pytest
import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from kernels.prefix_attention import portable
from model.config import Config, DecoderConfig
from model.memory import WORKSPACE_BYTES, prefill_bytes
from model.step3vl import Step3VL
from pacore_sched.answers.pacore import engine_for
from pacore_sched.sched.request import Sampling


def config_of(hidden: int, heads: int, kv_heads: int, head_dim: int, mlp: int) -> DecoderConfig:
    return DecoderConfig(64, hidden, 2, heads, kv_heads, head_dim, mlp, max_positions=1 << 20)


SHAPES = {
    "as in a model": config_of(128, 4, 2, 32, 256),
    "wide": config_of(512, 2, 1, 16, 64),
    "wide feed-forward": config_of(64, 2, 1, 16, 8192),
    "many heads": config_of(64, 12, 1, 32, 64),
    "fp8": config_of(128, 4, 4, 32, 64),
    "long": config_of(16, 2, 1, 16, 16),  # attention takes most
}


def model_of(config: DecoderConfig, dtype: torch.dtype = torch.float32) -> Step3VL:
    model = Step3VL(Config("probe", config), dtype=dtype)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    model.decoder.pack()
    return model


def prefill(
    model: Step3VL,
    tokens: int,
    chunk: int,
    kv_dtype: torch.dtype | None = None,
    rollouts: int = 1,
) -> int:
    """The most bytes of tensors that are alive while the engine reads a prompt and draws a token
    for each of its rollouts, without weights and KV pages."""
    engine = engine_for(
        model,
        kv_tokens=tokens + 64 * (rollouts + 3),
        max_running=rollouts,
        token_budget=chunk,
        kv_dtype=kv_dtype,
    )
    with engine.executor as executor:
        ids = [token % 64 for token in range(tokens)]
        path, seeds = [executor.segment(ids[:-1])], dict.fromkeys(range(rollouts), 0)
        engine.submit(path, ids[-1], seeds, Sampling(1, ignore_eos=True))
        portable._kept.__dict__.clear()  # a buffer of earlier tests
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
            while engine.busy:
                engine.step()
    assert engine.scheduler.counts.prefilled == tokens - 1
    alive, changes, events = 0, [], run.profiler.kineto_results.experimental_event_tree()
    while events:
        event = events.pop()
        events += event.children
        if event.tag == _EventType.Allocation:
            changes.append((event.start_time_ns, event.extra_fields.alloc_size))
    most = 0
    for _, size in sorted(changes):
        alive += size
        most = max(most, alive)
    return most


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_within_its_bound(shape: str, dtype: torch.dtype):
    """Guards the KV plan: activations that it has no room for end the engine's first long prompt.

    The bound must also be near what is taken, or it would keep memory from the KV.
    """
    config, tokens, chunk = SHAPES[shape], 3072, 1024
    kv_dtype = torch.float8_e4m3fn if shape == "fp8" else None
    taken = prefill(model_of(config, dtype), tokens, chunk, kv_dtype)
    bound = prefill_bytes(config, tokens, chunk, dtype) - WORKSPACE_BYTES
    assert bound / 3 < taken < bound


def test_does_not_grow_with_the_prompt(monkeypatch: pytest.MonkeyPatch):
    """Guards the bound at 256k: scores, a mask, or gathered K and V of a whole prefix would take
    gigabytes there, and so would a partial result of each section of it. What grows is page tables.
    """
    monkeypatch.setattr(portable, "SECTION_TOKENS", 512)
    lengths, model = (4096, 16384), model_of(SHAPES["long"])
    short, long = (prefill(model, tokens, chunk=512) for tokens in lengths)
    assert long - short < 16 * (lengths[1] - lengths[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_all_rollouts(dtype: torch.dtype):
    """Guards steps that draw many tokens from a large vocabulary."""
    config, rollouts = replace(SHAPES["long"], vocab_size=1 << 15), 128
    taken = prefill(model_of(config, dtype), 256, 256, rollouts=rollouts)
    bound = prefill_bytes(config, 256, 256, dtype, sampled=rollouts) - WORKSPACE_BYTES
    assert bound / 3 < taken < bound
