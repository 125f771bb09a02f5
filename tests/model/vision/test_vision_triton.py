"""Tests of the whole model with every op in Triton, from a photo to logits."""

from dataclasses import replace

import pytest
import torch
from PIL import Image
from skimage import data

from kernels.runtime.configs import use_config
from model.config import TINY
from model.step3vl import Step3VL
from model.text.prompt import build_prompt
from model.text.tokenizer import Tokenizer
from model.vision.image import load_image, preprocess
from model.weights.random_init import random_init
from tests.support.errors import max_error

# Smaller than `tiny`, because interpreted kernels are slow. Two blocks have every kind of layer
# norm, and a head has the 10B's width.
SMALL = replace(
    TINY,
    vision=replace(TINY.vision, width=96, heads=1, mlp_width=224, image_size=98, crop_size=56),
    decoder=replace(TINY.decoder, layers=1),
)


@pytest.fixture
def models(triton_device: str) -> tuple[Step3VL, Step3VL]:
    """The model in eager form, and with every op in Triton."""
    models = []
    for impl in ("eager", "triton"):
        model = Step3VL(SMALL, impl=impl, device=triton_device)
        random_init(model.checkpoint_tensors(), 1)
        models.append(model)
    return tuple(models)


def test_a_photo_through_every_op(models: tuple[Step3VL, Step3VL], monkeypatch: pytest.MonkeyPatch):
    """Guards embeddings, their rows and logits, for crops, global view and text."""
    photo = load_image(Image.fromarray(data.astronaut())).resize((96, 48))
    views = preprocess(photo, SMALL.vision)
    assert len(views.crops) == 2
    question = [{"role": "user", "content": [{"type": "image"}]}]
    ids = torch.tensor(build_prompt(question, Tokenizer.byte_level(SMALL), SMALL, [views]))
    eager, ours = models
    features = eager.encode_images([views])
    assert len(features) == SMALL.vision.image_tokens + 2 * SMALL.vision.crop_tokens
    assert max_error(ours(ids, images=[views]), eager(ids, images=[views])) < 1e-4
    assert max_error(ours.encode_images([views]), features) < 1e-4


def test_tiny_whole(triton_device: str):
    """Guards the preset `tiny` on a photo that is not cropped: two heads of 96, two layers."""
    logits = {}
    for impl in ("eager", "triton"):
        model = Step3VL.from_preset("tiny", seed=0, impl=impl, device=triton_device)
        views = preprocess(load_image(Image.fromarray(data.astronaut())), TINY.vision)
        question = [{"role": "user", "content": [{"type": "image"}]}]
        ids = torch.tensor(build_prompt(question, model.tokenizer, TINY, [views]))
        logits[impl] = model(ids, images=[views])
    assert logits["triton"].shape[0] > TINY.vision.image_tokens
    assert max_error(logits["triton"], logits["eager"]) < 1e-4


@pytest.mark.parametrize("turn_q", [0, 1])
@pytest.mark.parametrize("sides", [(), (70, 14, 70)])
def test_views_of_odd_grids(models: tuple[Step3VL, Step3VL], sides: tuple[int, ...], turn_q: int):
    """Guards no views, a single token, and sides that are no multiple of four, out of order;
    queries rotated with the keys or where they are used."""
    eager, ours = (model.vision for model in models)
    views = [torch.randn(3, side, side) for side in sides]
    with use_config("vision_attention", turn_q=turn_q):
        out, expected = ours(views), eager(views)
    assert out.shape == expected.shape == (ours.count(views), SMALL.decoder.hidden)
    if views:
        assert max_error(out, expected) < 1e-4
