"""Tests of config.json in all its forms; those of text-only models against transformers."""

import json
from dataclasses import asdict, replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from model.config import (
    PRESETS,
    STEP3_VL_10B,
    TINY,
    Config,
    DecoderConfig,
    SamplingConfig,
    TokenIds,
    VisionConfig,
)
from model.errors import InputError
from model.rope import Linear, Llama3, Yarn
from model.weights.hf_config import read_config, write_config
from tests.model.weights.config_files import QWEN3, STEP_VL, merged


def test_published_step_vl(read):
    """Guards against a published key read under another name or left at its default."""
    assert replace(read(STEP_VL), name="step3-vl-10b") == STEP3_VL_10B
    tower = {"width": 64, "heads": 2, "layers": 3, "layer_norm_eps": 1e-3, "ls_init_value": 0.5}
    small = merged(STEP_VL, "vision_config", STEP_VL["vision_config"] | tower)
    small = merged(small, "text_config.eos_token_id", 5)
    small = merged(small, "image_token_id", 6)
    config = read(merged(small, "text_config.num_hidden_layers", 3), name="mine")
    assert config.vision == VisionConfig(64, 3, 2, 373, norm_eps=1e-3, layer_scale=0.5)
    assert (config.decoder.layers, config.name) == (3, "mine")
    assert config.tokens == replace(TokenIds(), eos=(5,), im_patch=6)


def test_flat_step_vl(read):
    """Guards configs whose text keys are next to the vision keys instead of in text_config."""
    flat = {k: v for k, v in STEP_VL["text_config"].items() if k != "architectures"}
    assert read({**flat, **merged(STEP_VL, "text_config", ...)}).decoder == STEP3_VL_10B.decoder


@pytest.mark.parametrize("config", PRESETS.values(), ids=PRESETS)
def test_what_we_write_reads_back(config, read):
    """Guards against a field that config.json loses, in our form or the published one."""
    assert read(write_config(config)) == config
    assert read(asdict(config)) == config


def test_every_field_reads_back(read):
    """Guards against a field that config.json loses unnoticed, because it has its default."""
    vision = VisionConfig(96, 3, 6, 111, 7, 63, 49, 1000, 100, 50, 1e-3, 0.5, 2e4)
    yarn = Yarn(2.5, 40, 1.25, 16.0, 2.0, False)
    decoder = DecoderConfig(300, 48, 5, 6, 3, 10, 70, 1e-2, 3e4, 999, False, True, yarn)
    tokens = TokenIds((1, 2), 3, 4, 5, 6, 7, 8)
    config = Config("odd", decoder, vision, tokens, SamplingConfig(0.5, 0.25, 9))
    default = Config("", DecoderConfig(), VisionConfig(), TokenIds())
    for part in ("decoder", "vision", "tokens", "sampling"):
        values, defaults = asdict(getattr(config, part)), asdict(getattr(default, part))
        assert not [name for name in values if values[name] == defaults[name]]
    assert read(write_config(config)) == config
    text = replace(config, vision=None)
    assert read(write_config(text)) == text
    for scaling in (Linear(2.5), Llama3(2.5, 40, 1.5, 2.5)):
        scaled = replace(text, decoder=replace(decoder, rope_scaling=scaling))
        assert read(write_config(scaled)) == scaled


@example(1, 7, 61, True, False)  # int(28 * (61 / 28)) is 60
@given(st.integers(1, 4), st.integers(1, 20), st.integers(1, 20000), st.booleans(), st.booleans())
def test_any_width_reads_back(tmp_path_factory, heads, quarter, mlp_width, qk_norm, tied):
    """Guards against an MLP width rounded away in mlp_ratio: readers truncate the product."""
    vision = replace(TINY.vision, width=4 * heads * quarter, heads=heads, mlp_width=mlp_width)
    decoder = replace(TINY.decoder, qk_norm=qk_norm, tied_embeddings=tied)
    path = tmp_path_factory.mktemp("model")
    for config in (replace(TINY, vision=vision), Config("text", decoder, tokens=TINY.tokens)):
        (path / "config.json").write_text(json.dumps(write_config(config)))
        assert read_config(path) == config


@pytest.mark.judge
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("qwen3", {"vocab_size": 99, "num_hidden_layers": 3, "eos_token_id": [4, 5]}),
        ("qwen3", {"rope_theta": 1e6, "tie_word_embeddings": True}),
        ("llama", {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 3e4}}),
    ],
)
def test_agrees_with_transformers(kind, options, tmp_path):
    """Guards against a key whose meaning or default differs from transformers', read or written."""
    from transformers import AutoConfig

    theirs = AutoConfig.for_model(kind, **options)
    theirs.save_pretrained(tmp_path)
    ours = read_config(tmp_path)
    eos = theirs.eos_token_id
    assert ours.tokens.eos == tuple(eos if isinstance(eos, list) else [] if eos is None else [eos])
    (tmp_path / "config.json").write_text(json.dumps(write_config(ours)))
    for config in (theirs, AutoConfig.from_pretrained(tmp_path)):
        assert ours.decoder == DecoderConfig(
            vocab_size=config.vocab_size,
            hidden=config.hidden_size,
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            mlp_width=config.intermediate_size,
            norm_eps=config.rms_norm_eps,
            rope_theta=config.rope_parameters["rope_theta"],
            max_positions=config.max_position_embeddings,
            qk_norm=kind == "qwen3",
            tied_embeddings=config.tie_word_embeddings,
        )
        assert config.model_type == kind


JUDGED = {
    "vocab_size": 12,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}
CHANGES_NOTHING = {"base_model_tp_plan", "base_model_pp_plan"}
# Another value for every key that transformers' classes declare, and rope's.
CHANGES = [
    {"vocab_size": 13},
    {"hidden_size": 20},
    {"intermediate_size": 25},
    {"num_hidden_layers": 1},
    {"num_attention_heads": 2},
    {"num_key_value_heads": 1},
    {"num_key_value_heads": None},
    {"head_dim": 8},
    {"hidden_act": "gelu"},
    {"max_position_embeddings": 128},
    {"initializer_range": 0.5},
    {"rms_norm_eps": 0.5},
    {"use_cache": False},
    {"tie_word_embeddings": True},
    {"attention_bias": True},
    {"mlp_bias": True},
    {"pretraining_tp": 2},
    {"attention_dropout": 0.5},
    {"pad_token_id": 3},
    {"bos_token_id": 4},
    {"eos_token_id": 5},
    {"use_sliding_window": True, "sliding_window": 2, "max_window_layers": 0},
    {"use_sliding_window": False, "sliding_window": 2, "max_window_layers": 0},
    {"layer_types": ["full_attention", "full_attention"]},
    {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 2}
    | {"use_sliding_window": True},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}},
    {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
    {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}},
    *(
        {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4} | more}
        for more in (
            {"original_max_position_embeddings": 4},
            {"attention_factor": 1.0},
            {"beta_fast": 2.0, "beta_slow": 0.5},
            {"truncate": False},
            {"mscale": 0.5, "mscale_all_dim": 0.25},
            {"mscale": 0.5},
        )
    ),
    {
        "rope_parameters": {
            "rope_type": "llama3",
            "factor": 2.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8,
            "rope_theta": 1e4,
        }
    },
    {"original_max_position_embeddings": 8},
    {"rope_parameters": {"type": "default", "rope_theta": 1e4}},
    {"rope_scaling": {"type": "linear", "factor": 2.0}},
    {"rope_scaling": {"rope_theta": 1e5}, "rope_parameters": None},
    {"rope_theta": 1e5, "rope_parameters": None},
    {"rope_theta": 1e5},
    {"rope_parameters": None},
]


@pytest.mark.judge
@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_whatever_changes_transformers_logits(kind, tmp_path):
    """Guards against a key that changes what transformers computes and that we pass over: with it,
    the model must be another one for us too, or be refused. Without effect there, our model is the
    same one, if it is not refused. Keys that newer versions declare must be added here."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    declared = set(CONFIG_MAPPING[kind].__annotations__) - {"model_type", *CHANGES_NOTHING}
    assert declared <= {key for change in CHANGES for key in change}
    weights = None
    ids = torch.arange(12)[None] % 12

    def logits(options):
        nonlocal weights
        torch.manual_seed(0)
        theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **options)).eval()
        if weights is None:
            weights = {k: v * 20 if v.ndim > 1 else v for k, v in theirs.state_dict().items()}
        theirs.load_state_dict(weights)
        return theirs(ids).logits

    def ours(options):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind} | options))
        return read_config(tmp_path).decoder

    base, base_logits = ours(JUDGED), logits(JUDGED)
    for change in CHANGES:
        options = JUDGED | change
        try:
            same = torch.equal(logits(options), base_logits)
        except (RuntimeError, ValueError, KeyError):  # other shapes, or refused
            same = False
        try:
            decoder = replace(ours(options), max_positions=base.max_positions)
        except InputError:
            continue
        assert (decoder == base) == same, (kind, change)


def test_old_llama_leaves_keys_out(read):
    """Guards the defaults that old files rely on."""
    old = {k: v for k, v in QWEN3.items() if k not in ("rope_theta", "head_dim")}
    del old["num_key_value_heads"]
    decoder = read(old | {"model_type": "llama"}).decoder
    assert (decoder.head_dim, decoder.kv_heads, decoder.rope_theta) == (8, 4, 1e4)


YARN4 = {"rope_type": "yarn", "factor": 4.0}
LLAMA31 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    ("changes", "context"),
    [
        # Qwen3-8B with what its card adds, and the release of July 2025 times four.
        ({"rope_scaling": YARN4 | {"original_max_position_embeddings": 32768}}, 131072),
        ({"max_position_embeddings": 262144, "rope_parameters": YARN4}, 1048576),
        ({"rope_scaling": YARN4, "original_max_position_embeddings": 32768}, 131072),
        ({"max_position_embeddings": 131072, "rope_scaling": LLAMA31}, 131072),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, 40960),
        ({"rope_scaling": {"rope_type": "default"}, "rope_parameters": None}, 40960),
    ],
)
def test_context_of_a_scaled_model(read, changes, context):
    """Guards the length that a published config.json means."""
    decoder = read(QWEN3 | {"max_position_embeddings": 40960} | changes).decoder
    assert decoder.max_positions == context


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_parameters": YARN4 | {"factor": 2.0}}, "rope_scaling is Yarn.*in one place and"),
        ({"rope_parameters": {"rope_type": "default"}}, "in one place and None in another"),
        ({"original_max_position_embeddings": 256}, "original_max_position_embeddings is 256 in"),
    ],
)
def test_two_scalings_must_agree(read, changes, words):
    """Guards against one of two readings of a file."""
    yarn = YARN4 | {"original_max_position_embeddings": 512}
    with pytest.raises(InputError, match=words):
        read(QWEN3 | {"rope_scaling": yarn} | changes)
