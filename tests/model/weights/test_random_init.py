"""Tests of random weights: what determines them, and the scale of the activations."""

import pytest
import torch

from model.config import TINY, Config, DecoderConfig, VisionConfig
from model.step3vl import Step3VL
from model.weights.random_init import random_init


def filled(tensors, seed=0):
    random_init(tensors, seed)
    return tensors


def test_depends_on_seed_and_name_alone():
    """Guards against weights that depend on the order, the sharding or on other tensors."""
    shapes = {"a.weight": (40, 30), "b.weight": (40, 30), "c.bias": (50,)}
    whole = filled({name: torch.empty(shape) for name, shape in shapes.items()})
    for name, shape in shapes.items():
        alone = filled({name: torch.empty(shape)})[name]
        assert torch.equal(alone, whole[name])
        assert not torch.equal(alone, filled({name: torch.empty(shape)}, seed=1)[name])
    assert not torch.equal(whole["a.weight"], whole["b.weight"])


def test_depends_on_neither_dtype_nor_layout(monkeypatch):
    """Guards against a bf16 model that is not the rounded fp32 one, and kernels filled in memory
    order."""
    monkeypatch.setattr("model.weights.random_init._CHUNK", 128)
    plain = filled({"a.weight": torch.empty(16, 8, 3, 3)})["a.weight"]
    half = filled({"a.weight": torch.empty(16, 8, 3, 3, dtype=torch.bfloat16)})["a.weight"]
    last = torch.empty(16, 8, 3, 3).to(memory_format=torch.channels_last)
    storage = torch.empty(48, 8, 3, 3)
    assert torch.equal(half, plain.bfloat16())
    assert torch.equal(filled({"a.weight": last})["a.weight"], plain)
    assert torch.equal(filled({"a.weight": storage[16:32]})["a.weight"], plain)


def test_fills_every_tensor_of_the_model():
    """Guards against an uninitialised tensor, and exact ones and zeros, which hide a forgotten
    weight."""
    model = Step3VL(TINY)
    for parameter in model.parameters():
        parameter.fill_(torch.nan)
    tensors = filled(model.checkpoint_tensors())
    for parameter in model.parameters():
        assert parameter.isfinite().all()
    for name, tensor in tensors.items():
        assert tensor.std() > 0, name
        mean = 1.0 if "norm" in name or name.endswith(("ln_1.weight", "ln_2.weight")) else 0.0
        mean = 0.1 if name.endswith("gamma") else mean
        mean = 1.0 if name.endswith("ln_pre.weight") else mean
        assert abs(tensor.mean() - mean) < 6 * tensor.std() / tensor.numel() ** 0.5, name


def test_refuses_a_name_without_a_rule():
    """Guards against a vector of a new kind that silently gets another's scale."""
    with pytest.raises(ValueError, match="no rule to initialise scale"):
        random_init({"scale": torch.empty(3)}, 0)


@pytest.mark.parametrize("width", [32, 96])
def test_activations_keep_their_scale_at_full_depth(width):
    """Guards against activations that vanish or explode over 36 decoder or 47 tower layers, at any
    width."""
    decoder = DecoderConfig(128, width, 36, 4, 2, width // 4, 2 * width, max_positions=256)
    vision = VisionConfig(width, 47, 4, 2 * width, image_size=56, crop_size=28)
    model = Step3VL(Config("deep", decoder, vision))
    random_init(model.checkpoint_tensors(), 0)
    features = model.vision([torch.randn(3, 56, 56)])
    assert 0.3 < features.square().mean().sqrt() < 5
    logits = model(torch.arange(100))
    assert 0.5 < logits.std() < 2
    probabilities = logits.softmax(-1)
    assert probabilities.amax(-1).mean() < 0.3  # no degenerate distribution


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_on_a_gpu(dtype):
    """Guards against draws in bf16, which are coarse, and results that depend on other tensors."""
    a = filled({"a.weight": torch.empty(1000, 1000, device="cuda", dtype=dtype)})["a.weight"]
    b = {"z.bias": torch.empty(7, device="cuda"), "a.weight": torch.empty_like(a)}
    assert torch.equal(filled(b)["a.weight"], a)
    assert abs(a.float().std() * 1000**0.5 - 1) < 0.01
    assert a.isfinite().all()
