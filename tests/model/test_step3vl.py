"""Tests of Step3VL's public interface: constructors, saving, every kind of image source."""

import importlib
import json
import pkgutil
import sys
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import model
from kernels.errors import ImplError
from kernels.runtime import dispatch
from model import memory
from model.errors import InputError
from model.impls import CHOICES
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
    assert model.impl == dict.fromkeys(CHOICES) | {"prefix_attention": "eager"}
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


@pytest.fixture
def saved(tiny: Step3VL, tmp_path: Path) -> Path:
    """A directory with the tiny model, whose files a test may change."""
    tiny.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def edit(file: Path, **changes: object) -> None:
    """Change top-level keys of a JSON file, creating it if necessary."""
    data = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(data | changes))


def test_the_tokenizers_end_counts(tiny: Step3VL, saved: Path, tmp_path: Path):
    """Guards against rollouts that run past the end of a turn, which only the tokenizer names; and
    against losing ends when a model is saved again."""
    text = {**json.loads((saved / "config.json").read_text())["text_config"], "eos_token_id": 5}
    edit(saved / "config.json", text_config=text, eos_token_id=[5, 6])
    edit(saved / "generation_config.json", eos_token_id=[6, 7])
    edit(saved / "tokenizer_config.json", eos_token="<|im_end|>")
    loaded = Step3VL.from_pretrained(saved)
    end = tiny.tokenizer.encode("<|im_end|>")[0]
    assert loaded.config.tokens.eos == (5, 6, 7, end)
    loaded.save_pretrained(tmp_path / "again")
    assert Step3VL.from_pretrained(tmp_path / "again").config == loaded.config


def test_a_model_without_an_end_is_warned_about(saved: Path):
    """Guards against rollouts that all run to their limit, silently."""
    text = {**json.loads((saved / "config.json").read_text())["text_config"], "eos_token_id": None}
    edit(saved / "config.json", text_config=text)
    (saved / "tokenizer_config.json").unlink()
    with pytest.warns(
        UserWarning, match="names no token that ends an answer.*eos_token_id in conf"
    ):
        assert Step3VL.from_pretrained(saved).config.tokens.eos == ()


def test_mistakes_are_found_before_weights_are_read(saved: Path, monkeypatch: pytest.MonkeyPatch):
    """Guards against a damaged tokenizer that is found after minutes of reading weights, and a
    wrong checkpoint that is found after its model was allocated."""
    devices: list[str] = []
    init = nn.Parameter.__new__
    monkeypatch.setattr(
        nn.Parameter,
        "__new__",
        lambda cls, data, **k: devices.append(data.device.type) or init(cls, data, **k),
    )
    shard = next(saved.glob("*.safetensors"))
    whole = shard.read_bytes()
    save_file({"x": torch.zeros(1)}, shard)
    with pytest.raises(InputError, match="shards disagree"):
        Step3VL.from_pretrained(saved)
    assert set(devices) == {"meta"}
    (saved / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        Step3VL.from_pretrained(saved)
    shard.write_bytes(whole)
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        Step3VL.from_pretrained(saved)
    assert set(devices) == {"meta"}


def test_weights_must_fit_into_memory(saved: Path, monkeypatch: pytest.MonkeyPatch):
    """Guards against a process that the system kills while it allocates weights, and a limit that
    forgets what the tower derives."""
    loaded = Step3VL.from_pretrained(saved, dtype=torch.bfloat16)
    tensors = [
        *loaded.parameters(),
        *loaded.vision._derived.folded,
        loaded.vision._derived.patch_embedding,
    ]
    need = sum(tensor.nbytes for tensor in tensors)
    monkeypatch.setattr(memory, "free_bytes", lambda device: need)
    Step3VL.from_pretrained(saved, dtype=torch.bfloat16)
    Step3VL.from_preset("tiny", dtype=torch.bfloat16)
    words = "the weights of tiny need 0.03 GB in float32, but cpu has 0.01 GB of free memory: in bf"
    for load, name in ((Step3VL.from_pretrained, saved), (Step3VL.from_preset, "tiny")):
        with pytest.raises(InputError, match=words.replace("bf", "bfloat16 they need 0.01 GB")):
            load(name)
    monkeypatch.setattr(memory, "free_bytes", lambda device: need - 1)
    with pytest.raises(InputError, match="in bfloat16, but .*: use a device with more memory"):
        Step3VL.from_pretrained(saved, dtype=torch.bfloat16)


def test_a_machine_without_the_tokenizers_package(saved: Path, monkeypatch: pytest.MonkeyPatch):
    """Guards against a GPU node that cannot load weights for want of a package that only text
    needs, and against a traceback where text is needed."""
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    for loaded in (Step3VL.from_pretrained(saved), Step3VL.from_preset("tiny")):
        assert loaded([1, 2, 3]).shape == (3, 512)
        with pytest.raises(InputError, match="tiny needs the package tokenizers; run: pip install"):
            _ = loaded.tokenizer


def test_a_tokenizer_of_another_model_is_refused(tiny: Step3VL, saved: Path):
    """Guards against an end that the model cannot write, and so never writes."""
    tokenizer = json.loads((saved / "tokenizer.json").read_text())
    extra = {**tokenizer["added_tokens"][0], "id": 600, "content": "<|end|>"}
    tokenizer["model"]["vocab"] |= {"<|end|>": 600}
    edit(saved / "tokenizer.json", **tokenizer | {"added_tokens": [extra]})
    edit(saved / "tokenizer_config.json", eos_token="<|end|>")
    with pytest.raises(InputError, match="eos_token has the id 600, .* vocabulary ends at 511"):
        Step3VL.from_pretrained(saved)


def properties() -> list[tuple[type[nn.Module], str]]:
    """Every property of every nn.Module of the package."""
    for info in pkgutil.walk_packages(model.__path__, "model."):
        if not info.name.endswith("__main__"):
            importlib.import_module(info.name)
    modules, found = [nn.Module], []
    for module in modules:
        modules += module.__subclasses__()
        if module.__module__.startswith("model."):
            kinds = property | cached_property
            found += [(module, k) for k, v in vars(module).items() if isinstance(v, kinds)]
    return found


def test_errors_inside_properties_are_seen():
    """Guards against nn.Module's "has no attribute 'tokenizer'" for a mistake inside it."""
    assert (Step3VL, "tokenizer") in properties()
    for module, name in properties():
        instance = module.__new__(module)
        nn.Module.__init__(instance)  # it lacks all that the property needs
        with pytest.raises(RuntimeError, match=f"{name}: .* has no attribute '(?!{name})"):
            getattr(instance, name)


def test_damaged_weights_end_generation():
    """Guards against an IndexError when the id of a draw from NaN, -1, is embedded."""
    damaged = Step3VL.from_preset("tiny")
    damaged.checkpoint_tensors()["model.norm.weight"].fill_(float("nan"))
    with pytest.raises(InputError, match="tiny gives logits that are not numbers; .* of float32"):
        damaged.generate([1, 2], max_tokens=2)


@pytest.mark.parametrize(
    "wrong",
    [{"seed": 2**63}, {"seed": -(2**63) - 1}, {"seed": 1.5}, {"seed": None}]
    + [{"max_tokens": -1}, {"max_tokens": 1.5}],
)
def test_generate_takes_integers(tiny: Step3VL, wrong: dict):
    """An error of torch that does not name the argument, or no tokens and no error."""
    (name,) = wrong
    with pytest.raises(InputError, match=f"{name} must be an integer"):
        tiny.generate([1, 2], **wrong)
    assert len(tiny.generate([1, 2], seed=-(2**63), max_tokens=np.int64(2), temperature=1.0)) == 2


def test_unknown_names():
    """Guards against a traceback for an unknown preset or a path that does not exist."""
    with pytest.raises(InputError, match="'Qwen/Qwen3-8B' is neither a preset .* nor a checkpoint"):
        Step3VL.from_pretrained("Qwen/Qwen3-8B")
    with pytest.raises(InputError, match="unknown preset 'huge'; choose one of step3-vl-10b, tiny"):
        Step3VL.from_preset("huge")
    with pytest.raises(InputError, match="nowhere"):
        Step3VL.from_pretrained("nowhere")
