"""llama.cpp as a peer, without its package: which calls make a step, a prompt, an answer."""

import gc
import re
import time
from pathlib import Path

import pytest
import torch

from bench.model_peers import llama_cpp_peer
from bench.model_peers.llama_cpp_peer import SETTINGS, LlamaCpp
from bench.peers.peer import Unavailable
from model.config import PRESETS
from model.errors import InputError
from tests.bench.model_peers.fake_llama_cpp import VOCAB, FakeLlamaCpp

PROMPT = torch.tensor([1, 2, 3])
SUFFIXES = torch.tensor([[4, 5], [6, 7]])


@pytest.fixture
def fake(monkeypatch):
    functions = FakeLlamaCpp()
    monkeypatch.setattr(llama_cpp_peer, "imported", lambda name: functions)
    return functions


@pytest.fixture
def peer(fake):
    return LlamaCpp(Path("model.gguf"))


def last_context(fake):
    """The calls since the last context was made."""
    starts = [i for i, call in enumerate(fake.calls) if call[0] == "decode" and len(call[1]) == 3]
    return fake.calls[starts[-1] :]


def test_a_decode_step(peer, fake):
    """Guards the work: the prompt is read once and shared, each rollout's own tokens follow it, and
    every call is the same step, because its tokens are removed again."""
    work = peer.decode_step(PROMPT, SUFFIXES)
    fill = [
        ("decode", [(1, 0, 0, False), (2, 1, 0, False), (3, 2, 0, True)]),
        ("copy", 1),
        ("decode", [(4, 3, 0, False), (6, 3, 1, False)]),
    ]
    step = [
        ("decode", [(5, 4, 0, True), (7, 4, 1, True)]),
        ("remove", 0, 4),
        ("remove", 1, 4),
    ]
    assert last_context(fake) == fill + step  # with the one call that chooses the settings
    assert work.call().tolist() == [[5.0] * VOCAB, [7.0] * VOCAB]
    assert last_context(fake) == fill + 2 * step


def test_a_step_after_the_prompt_alone(peer, fake):
    """Guards suffixes of one token, where nothing follows the prompt before the step."""
    peer.decode_step(PROMPT, SUFFIXES[:, 1:])
    assert last_context(fake)[2] == ("decode", [(5, 3, 0, True), (7, 3, 1, True)])


def test_a_prompt(peer, fake):
    """Guards against a prompt appended to the last call's, and against logits of every token."""
    work = peer.prefill(PROMPT)
    read = ("decode", [(1, 0, 0, False), (2, 1, 0, False), (3, 2, 0, True)])
    del fake.calls[:]
    assert work.call().tolist() == [[3.0] * VOCAB]
    assert fake.calls == [("remove", 0, 0), read]


def test_an_answer(peer, fake):
    """Guards the work of a round: its prompt once, then as many tokens per rollout as asked for,
    the last of which is not read back."""
    generate, _ = peer.generator([[1, 2, 3], [1]], [[3, 1], [2]], 1.0)
    del fake.calls[:]
    steps = []
    generate([1, 2, 3], [3, 1], steps.append)
    generate([1], [2], steps.append)
    assert steps == [2, 1, 1, 1, 1]
    assert fake.calls == [
        ("clear",),
        ("decode", [(1, 0, 0, False), (2, 1, 0, False), (3, 2, 0, True)]),
        ("copy", 1),
        ("decode", [(4, 3, 0, True)]),
        ("decode", [(5, 4, 0, True)]),
        ("clear",),
        ("decode", [(1, 0, 0, True)]),
        ("decode", [(2, 1, 0, True)]),
    ]


def test_contexts(peer, fake):
    """Guards what the comparison rests on: one KV cache for all sequences with room for all tokens,
    torch's number of threads, and a whole step in one pass."""
    peer.decode_step(PROMPT, SUFFIXES)
    assert len(fake.contexts) == len(SETTINGS)
    for context, settings in zip(fake.contexts, SETTINGS, strict=True):
        assert context.kv_unified is True
        assert context.n_ctx == 3 + 2 * 2
        assert context.n_seq_max == 2
        assert context.n_threads == context.n_threads_batch == torch.get_num_threads()
        assert (context.flash_attn_type, context.n_ubatch) == settings
    peer.decode_step(PROMPT, torch.zeros(200, 1, dtype=torch.int64))
    assert fake.contexts[-2].n_ubatch == 200


@pytest.mark.parametrize("fast", SETTINGS)
def test_the_fastest_settings_are_taken(monkeypatch, fake, peer, fast):
    """Guards against a peer at its second best, and a row that names other settings."""
    clock = [0.0]

    def pass_time(context):
        clock[0] += 1 if (context.flash_attn_type, context.n_ubatch) == fast else 2

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    fake.on_decode = pass_time
    work = peer.prefill(PROMPT)
    flash = "flash attention" if fast.flash else "no flash attention"
    assert work.settings == f"Q4_1 weights, f16 KV, {flash}, ubatch {fast.ubatch}"
    start = clock[0]
    work.call()
    assert clock[0] == start + 1


def test_contexts_are_freed(peer, fake):
    """Guards the memory of a run of many cases, whose KV caches are of hundreds of megabytes."""
    work = peer.prefill(PROMPT)
    gc.collect()
    assert len(fake.freed) == len(SETTINGS) - 1, "only the fastest is kept"
    del work
    gc.collect()
    assert len(fake.freed) == len(SETTINGS)


def test_failures(fake, monkeypatch):
    """Guards the reasons: each is one line, with llama.cpp's own words if it said something."""
    config = PRESETS["smollm2-135m"]
    with pytest.raises(Unavailable, match=r"needs a GGUF file, which only smollm2-135m has"):
        llama_cpp_peer.gguf_file(PRESETS["tiny"])
    scaled = PRESETS["smollm2-135m"].with_rope_scaling({"rope_type": "linear", "factor": 2})
    with pytest.raises(Unavailable, match="runs without --rope-scaling only"):
        llama_cpp_peer.gguf_file(scaled)
    monkeypatch.setattr(fake, "loads", False)
    with pytest.raises(Unavailable, match=r"cannot load a\.gguf: unknown architecture$"):
        LlamaCpp(Path("a.gguf"))
    monkeypatch.setattr(fake, "loads", True)
    peer = LlamaCpp(Path("a.gguf"))
    with pytest.raises(Unavailable, match="257 sequences; at most 256"):
        peer.decode_step(PROMPT, torch.zeros(257, 1, dtype=torch.int64))
    fake.code = 1
    with pytest.raises(RuntimeError, match=re.escape("llama_decode returned 1")):
        peer.prefill(PROMPT)

    def missing():
        raise InputError("SmolLM2's weights are not installed")

    monkeypatch.setitem(llama_cpp_peer.GGUF_FILES, "smollm2-135m", missing)
    with pytest.raises(Unavailable, match="SmolLM2's weights are not installed"):
        llama_cpp_peer.gguf_file(config)
    monkeypatch.setattr(FakeLlamaCpp, "llama_context_params", object())
    with pytest.raises(Unavailable, match="too old: it has no unified KV cache"):
        llama_cpp_peer.library()
