"""Tests of what a GGUF file's metadata say about the model: read, or refused by name."""

import warnings

import pytest

from model.config import DecoderConfig, SamplingConfig
from model.errors import InputError
from model.weights.gguf_config import read_gguf_config

gguf = pytest.importorskip("gguf")

from tests.model.weights.gguf_files import (  # noqa: E402  it imports gguf
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    METADATA,
    MLP,
    SHAPES,
    VOCAB,
)


def read(tensors=SHAPES, **changes):
    """The config of METADATA with `changes`; None omits a key."""
    metadata = METADATA | changes
    metadata = {key: value for key, value in metadata.items() if value is not None}
    return read_gguf_config(metadata, tensors, default_name="small")


def test_metadata_of_a_small_file():
    """Guards against a size read from another key, an epsilon rounded by fp32, and a wrong eos."""
    epsilon = {"llama.attention.layer_norm_rms_epsilon": 9.999999747378752e-06}  # fp32 of 1e-05
    config = read(**epsilon)
    assert config.decoder == DecoderConfig(
        VOCAB, HIDDEN, 1, HEADS, KV_HEADS, HEAD_DIM, MLP, 1e-5, 1e5, 128, False, True
    )
    assert (config.name, config.tokens.eos, config.vision) == ("small", (1,), None)
    assert config.sampling == SamplingConfig()
    assert not read({**SHAPES, "output.weight": (VOCAB, HIDDEN)}).decoder.tied_embeddings


def test_defaults_are_those_of_llama_cpp():
    """Guards against a default other than llama.cpp's for keys that older files lack."""
    decoder = read(**{"llama.attention.head_count_kv": None, "llama.rope.freq_base": None}).decoder
    assert (decoder.kv_heads, decoder.rope_theta) == (HEADS, 10000.0)
    assert read(**{"llama.attention.key_length": 8}).decoder.head_dim == 8


# (key, a value with which some reader computes something else, a neutral value)
OTHER_MODELS = [
    ("rope.scaling.factor", 8.0, 1.0),  # without a type: linear
    ("rope.scaling.factor", float("nan"), 0.0),
    ("rope.scale_linear", 2.0, 1.0),
    ("rope.scaling.type", "yarn", "none"),
    ("rope.scaling.type", "longrope", "linear"),
    ("rope.scaling.attn_factor", 2.0, 1.0),
    ("rope.dimension_count", HEAD_DIM // 2, HEAD_DIM),
    ("attention.value_length", HEAD_DIM * 2, HEAD_DIM),
    ("attention.sliding_window", 64, 0),
    ("attention.clamp_kqv", 8.0, 0.0),
    ("attention.max_alibi_bias", 8.0, 0.0),
    ("attention.causal", False, True),
    ("attention.scale", 0.5, 0.0),
    ("attn_logit_softcapping", 50.0, 0.0),
    ("logit_scale", 2.0, 1.0),
    ("residual_scale", 0.5, 1.0),
    ("embedding_scale", 12.0, 1.0),
    ("expert_count", 8, 0),
    ("nextn_predict_layers", 1, 0),
    ("pooling_type", 3, 0),
    ("use_parallel_residual", True, False),
    ("tensor_data_layout", "reference", "Meta AI original pth"),
    ("vocab_size", VOCAB - 1, VOCAB),
    ("block_count", 4_000_000_000, 1),
    ("context_length", 4_000_000_000, 128),
    ("embedding_length", 4_000_000_000, HIDDEN),
    ("feed_forward_length", 4_000_000_000, MLP),
    ("attention.key_length", 4_000_000_000, HEAD_DIM),
    ("attention.layer_norm_rms_epsilon", 1e30, 1e-5),
    ("attention.head_count", [4, 2], [4]),
    ("attention.head_count_kv", [2, 2], [2]),
    ("feed_forward_length", [], [MLP]),
]


@pytest.mark.parametrize(("key", "value", "neutral"), OTHER_MODELS)
def test_other_models_are_refused_by_name(key, value, neutral):
    """Guards against a model that loads although it computes something else than asked for."""
    with pytest.raises(InputError, match=rf"llama\.{key} is ") as error:
        read(**{f"llama.{key}": value})
    assert repr(value) in str(error.value)
    assert read(**{f"llama.{key}": neutral}) == read()


def test_every_llama_key_is_read_or_refused():
    """Guards against a key of the package gguf that is ignored although it has a meaning."""
    groups = [gguf.Keys.LLM, gguf.Keys.Attention, gguf.Keys.Attention.Indexer, gguf.Keys.Rope]
    names = [name for group in groups for name in vars(group).values() if isinstance(name, str)]
    names = [name.removeprefix("{arch}") for name in names if name.startswith("{arch}.")]
    accepted = set()
    for name in names:
        try:
            read(**{f"llama{name}": "another"})
            accepted.add(name)
        except InputError as error:
            assert f"llama{name} is 'another'" in str(error)
    assert len(names) > 90
    assert accepted == {".rope.scaling.original_context_length", ".rope.scaling.finetuned"}


@pytest.mark.parametrize("value", ["1", True, [1, 2], 0, -1, float("nan"), float("inf"), b""])
@pytest.mark.parametrize(
    "key",
    [
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.layer_norm_rms_epsilon",
        "rope.freq_base",
    ],
)
def test_wrong_numbers_are_named(key, value):
    """Guards against a traceback for a value of another type or sign, and a bool taken for 1."""
    with pytest.raises(InputError, match=rf"llama\.{key} is "):
        read(**{f"llama.{key}": value})


@pytest.mark.parametrize("key", [key for key in METADATA if key.startswith("llama.")])
def test_missing_keys_are_named(key):
    """Guards against a guess for a key that every file has."""
    if key.removeprefix("llama.") in ("vocab_size", "rope.freq_base", "attention.head_count_kv"):
        read(**{key: None})
    else:
        with pytest.raises(InputError, match=f"there is no metadata key {key}"):
            read(**{key: None})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"general.architecture": "qwen3"}, "general.architecture is 'qwen3'; only 'llama'"),
        ({"general.architecture": None}, "general.architecture is None; only 'llama'"),
        ({"general.type": "adapter"}, "general.type is 'adapter'; only 'model'"),
        ({"general.type": "imatrix", "general.architecture": None}, "general.type is 'imatrix'"),
        ({"split.count": 3, "general.architecture": None}, "one of 3 files .*llama-gguf-split"),
        ({"split.count": "x"}, "one of 'x' files of a split model"),
        ({"general.basename": 5}, "general.basename is 5; it must be a printable string"),
        ({"general.basename": "a\n\x1b[31m"}, r"general.basename is 'a\\n\\x1b\[31m'"),
        ({"general.size_label": "x" * 101}, "general.size_label is .* at most 100 characters"),
        (
            {"llama.attention.head_count": 2 * HIDDEN},
            "is 128, but embedding_length is 64",
        ),
        ({"llama.attention.head_count_kv": 3}, r"a multiple of kv_heads \(3\)"),
        ({"tokenizer.ggml.eos_token_id": VOCAB}, "tokenizer.ggml.eos_token_id is 20"),
        ({"general.sampling.temp": "x"}, "temperature is 'x'"),
        ({"general.sampling.top_p": 2.0}, "top_p is 2.0"),
    ],
)
def test_other_content_is_refused(changes, words):
    """Guards against a name that commands the terminal, and files that are no llama model."""
    with pytest.raises(InputError, match=words) as error:
        read(**changes)
    assert str(error.value).isprintable()


def test_content_that_is_accepted():
    """Guards against refusing what has no effect: a single part, a model, a name, other tables."""
    changes = {"split.count": 1, "general.type": "model", "quantize.imatrix.file": "x"}
    named = {"general.basename": "Small", "general.size_label": "1M"}
    assert read(**changes, **named).name == "small-1m"


def test_recommended_sampling():
    """Guards against ignoring the sampling settings of the file silently."""
    settings = {
        "general.sampling.temp": 0.6000000238418579,  # fp32 of 0.6
        "general.sampling.top_p": 0.949999988079071,
        "general.sampling.top_k": -1,
        "general.sampling.penalty_repeat": 1.0,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(**settings).sampling == SamplingConfig(0.6, 0.95, 0)
    with pytest.warns(UserWarning, match=r"general.sampling.min_p \(0.05\) is not implemented"):
        read(**{"general.sampling.min_p": 0.05})


def test_ends_are_all_that_the_file_names():
    """Guards against generating beyond the end of a turn, and against refusing a file without."""
    ids = {"tokenizer.ggml.eot_token_id": 0, "tokenizer.ggml.eom_token_id": 1}
    assert read(**ids).tokens.eos == (1, 0)
    assert read(**{"tokenizer.ggml.eos_token_id": None}).tokens.eos == ()
