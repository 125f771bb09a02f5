"""Tests with real weights: SmolLM2-135M from its GGUF file, which transformers reads too."""

import pytest
import torch

from model.step3vl import Step3VL
from model.text.prompt import build_prompt
from model.weights.gguf import smollm2_path
from tests.support.errors import max_error

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def smollm2() -> Step3VL:
    return Step3VL.from_preset("smollm2-135m")


def transformers_model() -> torch.nn.Module:
    """The GGUF model as transformers reads it; its `from_pretrained` would need accelerate."""
    from transformers import AutoConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    path = smollm2_path()
    reference = LlamaForCausalLM(AutoConfig.from_pretrained(path.parent, gguf_file=path.name))
    tensors = load_gguf_checkpoint(path, return_tensors=True, model_to_load=reference)["tensors"]
    reference.load_state_dict(tensors, strict=False)
    assert reference.state_dict().keys() - tensors.keys() == {"lm_head.weight"}
    reference.tie_weights()
    return reference.eval()


@pytest.mark.judge
def test_logits_equal_transformers(smollm2: Step3VL):
    """Guards dequantisation, row order, rotation, norms and tied head, over all 30 layers."""
    ids = build_prompt(QUESTION, smollm2.tokenizer, smollm2.config)
    with torch.inference_mode():
        expected = transformers_model()(torch.tensor([ids])).logits[0]
    assert max_error(smollm2(ids), expected) < 1e-4


def test_it_knows_the_capital_of_france(smollm2: Step3VL):
    """Guards the whole path on a real question: template, tokenizer, prefill, decode, text."""
    ids = build_prompt(QUESTION, smollm2.tokenizer, smollm2.config)
    answer = smollm2.generate(ids, max_tokens=20)
    assert "Paris" in smollm2.tokenizer.decode(answer)
    assert answer[-1] in smollm2.config.tokens.eos
