"""transformers as a peer: its steps are ours."""

from dataclasses import replace

import pytest
import torch

from bench.model_peers import transformers_peer
from bench.model_peers.transformers_peer import Transformers
from bench.peers.peer import Unavailable
from bench.studies import decode
from bench.studies.decode import DecodeCase, Tokens
from model.config import PRESETS
from model.step3vl import Step3VL
from model.weights.random_init import random_init

pytestmark = pytest.mark.judge
CASE = DecodeCase(3, 20, 5)


@pytest.fixture(scope="module", params=["qwen3", "llama"])
def model(request):
    """The tiny model's decoder, and one without qk-norm and with tied embeddings."""
    config = replace(PRESETS["tiny"], vision=None)
    if request.param == "llama":
        decoder = replace(config.decoder, qk_norm=False, tied_embeddings=True)
        config = replace(config, decoder=decoder)
    model = Step3VL(config)
    random_init(model.checkpoint_tensors(), seed=0)
    return model


@pytest.fixture(scope="module")
def peer(model):
    return Transformers(model)


@torch.inference_mode()
def test_a_decode_step(model, peer):
    """Guards the peer's step: the rows' logits are ours, in our order, and every call is the same
    step."""
    tokens = Tokens.of(CASE, model)
    step, cache = decode.prepare(CASE, model, tokens)
    hidden = model.decoder(model.decoder.embed(tokens.suffixes[:, -1]), step, cache)
    expected = model.decoder.logits(hidden)
    work = peer.decode_step(tokens.prompt, tokens.suffixes)
    assert work.settings == "float32 weights and KV, sdpa, copies of the prompt"
    for _ in range(2):
        torch.testing.assert_close(work.call(), expected, rtol=0, atol=1e-4)


def test_a_prompt(model, peer):
    """Guards the logits of the last token only, and a cache that the next call would append to."""
    prompt = Tokens.of(CASE, model).prompt
    work = peer.prefill(prompt)
    for _ in range(2):
        torch.testing.assert_close(work.call(), model(prompt)[-1:], rtol=0, atol=1e-4)


def test_an_answer(model, peer):
    """Guards equal work: no rollout ends early, at an end token of the config's defaults."""
    peer.causal_lm.generation_config.eos_token_id = [*range(model.config.decoder.vocab_size)]
    generate, _ = peer.generator([[1, 2, 3]], [[30] * 4], 1.0)
    steps = []
    generate([1, 2, 3], [30] * 4, steps.append)
    assert steps == [4] * 30


def test_too_large(model, peer, monkeypatch):
    """Guards against memory of 16 prompts that runs out in the middle of a run."""
    monkeypatch.setattr(transformers_peer, "free_bytes", lambda device: 1000)
    tokens = Tokens.of(CASE, model)
    with pytest.raises(Unavailable, match="3 copies of the prompt's KV: 0.0 GB, 0.0 GB are free"):
        peer.decode_step(tokens.prompt, tokens.suffixes)
