"""Tests of Step3VL's public interface: constructors, saving, every kind of image source."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kernels.errors import ImplError
from kernels.runtime import dispatch
from model.errors import InputError
from model.impls import OPS
from model.step3vl import Step3VL
from model.text.prompt import build_prompt
from model.vision.image import load_image, preprocess

QUESTION = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]


@pytest.fixture(scope="module")
def tiny() -> Step3VL:
    return Step3VL.from_preset("tiny", seed=3)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.effect_noise((640, 300), 60).convert("RGB").save(path)
    return path


def test_presets_are_repeatable(tiny: Step3VL):
    """Guards against weights that the seed does not determine, or that ignore it."""
    again, other = (Step3VL.from_preset("tiny", seed=seed) for seed in (3, 4))
    for name, tensor in tiny.checkpoint_tensors().items():
        assert torch.equal(tensor, again.checkpoint_tensors()[name])
        assert not torch.equal(tensor, other.checkpoint_tensors()[name]), name


def test_save_and_load(tiny: Step3VL, photo: Path, tmp_path: Path):
    """Guards against a saved model that lacks a part: weights (bit-exact, also after use), config,
    vision, tokenizer."""
    fresh = Step3VL.from_preset("tiny", seed=3).checkpoint_tensors()
    tiny.encode_images([photo])
    tiny.save_pretrained(tmp_path / "saved")
    loaded = Step3VL.from_pretrained(tmp_path / "saved")
    assert loaded.config == tiny.config
    for name, tensor in loaded.checkpoint_tensors().items():
        assert torch.equal(tensor, fresh[name]), name
    views = preprocess(load_image(photo), tiny.config.vision)
    ids = build_prompt(QUESTION, tiny.tokenizer, tiny.config, [views])
    assert build_prompt(QUESTION, loaded.tokenizer, loaded.config, [views]) == ids
    assert torch.equal(loaded(ids, images=[photo]), tiny(ids, images=[photo]))
    half = Step3VL.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    assert half(ids, images=[photo]).dtype == torch.bfloat16


def test_images_in_any_form(tiny: Step3VL, photo: Path):
    """Guards against a path, an array, a PIL image and prepared views that give different logits,
    and against reading one image as a list of its rows or letters."""
    image = load_image(photo)
    views = preprocess(image, tiny.config.vision)
    ids = build_prompt(QUESTION, tiny.tokenizer, tiny.config, [views])
    expected = tiny(ids, images=[views])
    assert torch.equal(tiny(ids, images=[image]), expected)
    assert torch.equal(tiny(ids, images=[str(photo)]), expected)
    array = np.array(image)
    assert torch.equal(tiny(ids, images=[array]), expected)
    assert tiny.generate(ids, [photo], max_tokens=3)
    for single in (str(photo), photo, photo.read_bytes(), array, torch.from_numpy(array), image):
        with pytest.raises(InputError, match=r"images must be a list, such as \[image\], not"):
            tiny.encode_images(single)


def test_impl_of_single_ops(tiny: Step3VL, monkeypatch: pytest.MonkeyPatch):
    """Guards `impl` as one name or a dict by op, and later changes: both parts must follow them."""
    model = Step3VL.from_preset("tiny", seed=3, impl={"prefix_attention": "eager"})
    assert model.impl == dict.fromkeys(OPS) | {"prefix_attention": "eager"}
    ids = list(range(1, 20))
    assert torch.allclose(model(ids), tiny(ids), atol=1e-4)
    model.set_impl("triton")
    assert set(model.decoder.impl.values()) == set(model.vision.impl.values()) == {"triton"}
    monkeypatch.setattr(dispatch, "_interpreting", lambda: False)
    with pytest.raises(ImplError, match="impl 'triton' of rms_norm needs a CUDA device"):
        model(ids)
    for impl in ("fast", {"rms_norm": "fast"}, {"softmax": "eager"}):
        with pytest.raises(ImplError):
            Step3VL.from_preset("tiny", impl=impl)


def test_a_model_without_a_tokenizer(tiny: Step3VL, tmp_path: Path):
    """Guards against a need for tokenizer.json where only ids are used, and a vague error."""
    tiny.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "tokenizer.json").unlink()
    model = Step3VL.from_pretrained(tmp_path / "saved")
    assert model([1, 2, 3]).shape == (3, 512)
    with pytest.raises(InputError, match=r"needs a tokenizer\.json"):
        _ = model.tokenizer


def test_unknown_names():
    """Guards against a traceback for an unknown preset or a path that does not exist."""
    with pytest.raises(InputError, match="unknown preset 'huge'; choose one of step3-vl-10b, tiny"):
        Step3VL.from_preset("huge")
    with pytest.raises(InputError, match="nowhere"):
        Step3VL.from_pretrained("nowhere")
