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
from model.weights.hf_config import read_config, write_config

# The keys of the published StepVL config.json, with the 10B's sizes.
STEP_VL = {
    "architectures": ["StepVLForConditionalGeneration"],
    "auto_map": {"AutoConfig": "configuration_step_vl.StepRoboticsConfig"},
    "model_type": "step_robotics",
    "im_end_token": "<im_end>",
    "im_patch_token": "<im_patch>",
    "im_start_token": "<im_start>",
    "image_token_len": 169,
    "patch_token_len": 81,
    "image_token_id": 151679,
    "understand_projector_stride": 2,
    "use_im_start_end": "true",
    "vision_select_layer": -1,
    "projector_bias": False,
    "vision_config": {
        "image_size": 728,
        "patch_size": 14,
        "width": 1536,
        "layers": 47,
        "heads": 16,
        "pool_type": "none",
        "output_dim": None,
        "use_cls_token": False,
        "ls_init_value": 0.1,
        "use_ln_post": False,
        "hidden_act": "quick_gelu",
    },
    "text_config": {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": [151643, 151645, 151679],
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 12288,
        "max_position_embeddings": 65536,
        "max_window_layers": 36,
        "model_type": "qwen3",
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "torch_dtype": "bfloat16",
    "transformers_version": "4.57.0",
}
QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "rope_theta": 5e5,
    "eos_token_id": 7,
}


@pytest.fixture
def read(tmp_path):
    """A function that reads a config.json with the given content, text or object."""

    def read_content(content, name="model"):
        (tmp_path / name).mkdir(exist_ok=True)
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / name / "config.json").write_text(text)
        return read_config(tmp_path / name)

    return read_content


def merged(data, path, value):
    """`data` with `value` at the dotted `path`; a value of ... removes the key."""
    first, _, rest = path.partition(".")
    if rest:
        return data | {first: merged(data.get(first, {}), rest, value)}
    return {k: v for k, v in (data | {first: value}).items() if v is not ...}


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
    decoder = DecoderConfig(300, 48, 5, 6, 3, 10, 70, 1e-2, 3e4, 999, False, True)
    tokens = TokenIds((1, 2), 3, 4, 5, 6, 7, 8)
    config = Config("odd", decoder, vision, tokens, SamplingConfig(0.5, 0.25, 9))
    default = Config("", DecoderConfig(), VisionConfig(), TokenIds())
    for part in ("decoder", "vision", "tokens", "sampling"):
        values, defaults = asdict(getattr(config, part)), asdict(getattr(default, part))
        assert not [name for name in values if values[name] == defaults[name]]
    assert read(write_config(config)) == config
    text = replace(config, vision=None)
    assert read(write_config(text)) == text


@example(1, 7, 61, True, False)  # int(28 * (61 / 28)) is 60
@given(st.integers(1, 4), st.integers(1, 20), st.integers(1, 20000), st.booleans(), st.booleans())
def test_any_width_reads_back(tmp_path_factory, heads, quarter, mlp_width, qk_norm, tied):
    """Guards against an MLP width rounded away in mlp_ratio: readers truncate the product."""
    vision = replace(TINY.vision, width=4 * heads * quarter, heads=heads, mlp_width=mlp_width)
    decoder = replace(TINY.decoder, qk_norm=qk_norm, tied_embeddings=tied)
    path = tmp_path_factory.mktemp("model")
    for config in (replace(TINY, vision=vision), Config("text", decoder)):
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


def test_old_llama_leaves_keys_out(read):
    """Guards the defaults that old files rely on."""
    old = {k: v for k, v in QWEN3.items() if k not in ("rope_theta", "head_dim")}
    del old["num_key_value_heads"]
    decoder = read(old | {"model_type": "llama"}).decoder
    assert (decoder.head_dim, decoder.kv_heads, decoder.rope_theta) == (8, 4, 1e4)


def test_generation_config_ends_generation(read, tmp_path):
    """Guards chat models whose config.json has fewer eos ids than generation_config.json."""
    assert read(QWEN3).tokens.eos == (7,)
    generation = tmp_path / "model" / "generation_config.json"
    generation.write_text('{"eos_token_id": [7, 9]}')
    assert read(QWEN3).tokens.eos == (7, 9)
    generation.write_text('{"temperature": 1.0}')
    assert read(QWEN3).tokens.eos == (7,)


@pytest.mark.parametrize(
    ("generation", "sampling"),
    [
        ({"temperature": 0.6, "top_p": 0.95, "top_k": 20}, SamplingConfig(0.6, 0.95, 20)),
        ({"temperature": 0, "top_p": None}, SamplingConfig(0, 0.9, 5)),
        ({"top_k": -1}, SamplingConfig(0.5, 0.9, 0)),
        ({"eos_token_id": 7}, SamplingConfig(0.5, 0.9, 5)),
    ],
)
def test_generation_config_says_how_to_sample(generation, sampling, read, tmp_path):
    """A value that is ignored, or an absent one that overwrites what config.json says; in the
    published form and in ours."""
    config = replace(TINY, sampling=SamplingConfig(0.5, 0.9, 5))
    for content in (write_config(config), asdict(config)):
        read(content)
        (tmp_path / "model" / "generation_config.json").write_text(json.dumps(generation))
        assert read(content).sampling == sampling


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"temperature": "hot"}', "temperature is 'hot'; it must be 0, or from 1e-6 to 1e6"),
        ('{"temperature": -1}', "temperature is -1; it must"),
        ('{"temperature": NaN}', "temperature is nan; it must"),
        ('{"temperature": true}', "temperature is True; it must"),
        ('{"top_p": 0}', "top_p is 0; it must be above 0 and at most 1"),
        ('{"top_p": [1]}', r"top_p is \[1\]; it must"),
        ('{"top_k": 2.5}', "top_k is 2.5; it must be an integer, at least 0"),
        ('{"top_k": -2}', "top_k is -2; it must"),
        ("{", "is not valid JSON"),
        ("[]", "must hold a JSON object"),
    ],
)
def test_refuses_a_malformed_generation_config(text, words, read, tmp_path):
    """A traceback when the first token is drawn, or an error that names config.json."""
    read(QWEN3)
    file = tmp_path / "model" / "generation_config.json"
    file.write_text(text)
    with pytest.raises(InputError, match=words) as error:
        read(QWEN3)
    assert str(error.value).startswith(str(file))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("model_type", "qwen2", "model_type is 'qwen2'; only step_robotics"),
        ("model_type", ["qwen3"], "only step_robotics"),
        ("hidden_act", "gelu", 'only "silu" is implemented'),
        ("attention_bias", True, "attention_bias is True; only false"),
        ("mlp_bias", True, "mlp_bias is True"),
        ("use_sliding_window", True, "use_sliding_window is True"),
        ("layer_types", ["full_attention", "sliding_attention"], "layer_types"),
        ("rope_scaling", {"rope_type": "yarn", "factor": 2.0}, "rope_scaling .* not implemented"),
        ("rope_scaling", {"type": "linear", "factor": 2.0}, "rope_scaling"),
        ("rope_scaling", {"type": "default", "mrope_section": [8, 4, 4]}, "rope_scaling"),
        ("rope_parameters", {"rope_type": "llama3", "factor": 8.0}, "rope_parameters"),
        ("rope_parameters", {"rope_theta": 1e4, "partial_rotary_factor": 0.5}, "rope_parameters"),
        ("rope_parameters", [1], "rope_parameters"),
        ("partial_rotary_factor", 0.5, "partial_rotary_factor"),
        ("quantization_config", {"quant_method": "fp8"}, "quantization_config"),
        ("hidden_size", ..., "missing key hidden_size"),
        ("hidden_size", "32", "hidden is '32'; it must be a positive int"),
        ("num_hidden_layers", 0, "layers is 0"),
        ("rms_norm_eps", -1e-6, "norm_eps is -1e-06"),
        ("tie_word_embeddings", 1, "tied_embeddings is 1; it must be true or false"),
        ("num_key_value_heads", 3, "heads .4. must be a multiple of kv_heads .3."),
        ("head_dim", 15, "head_dim .15. must be even"),
        ("eos_token_id", ["</s>"], "token ids must be integers"),
        ("step3vl", {"colour": 1}, "unknown key colour"),
        ("step3vl", {"tokens": {"colour": 1}}, "unknown key colour"),
        ("step3vl", {"vision": {}}, "vision"),
        ("step3vl", {"tokens": [1]}, "tokens is"),
    ],
)
def test_refuses_in_a_text_model(key, value, words, read):
    """Guards against a model that loads although it computes something else."""
    with pytest.raises(InputError, match=f"config.json: .*{words}"):
        read(merged(QWEN3, key, value))


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("projector_bias", True, "projector_bias is True"),
        ("vision_select_layer", -2, "vision_select_layer is -2; only -1"),
        ("understand_projector_stride", 1, "understand_projector_stride"),
        ("image_token_len", 81, "image_token_len is 81; only 169"),
        ("patch_token_len", 169, "patch_token_len is 169; only 81"),
        ("vision_config.hidden_act", "gelu", "vision_config.hidden_act is 'gelu'"),
        ("vision_config.use_cls_token", True, "use_cls_token"),
        ("vision_config.ues_cls_token", True, "ues_cls_token"),
        ("vision_config.use_ln_pre", False, "use_ln_pre"),
        ("vision_config.use_rope2d", False, "use_rope2d"),
        ("vision_config.output_dim", 4096, "output_dim is 4096; only null"),
        ("vision_config.width", "wide", "vision_config.width is 'wide'"),
        ("vision_config.heads", 15, "multiple of 4 x heads .15."),
        ("vision_config", [], "vision_config is"),
        ("text_config.rope_scaling", {"rope_type": "yarn"}, "rope_scaling"),
        ("text_config.model_type", "qwen2", "model_type is 'qwen2'"),
        ("text_config.quantization_config", {"bits": 8}, "quantization_config"),
        ("step3vl.vision.colour", 1, "vision: unknown key colour"),
    ],
)
def test_refuses_in_a_vision_model(path, value, words, read):
    """Guards against a tower or projector that loads although it computes something else."""
    with pytest.raises(InputError, match=words):
        read(merged(STEP_VL, path, value))


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("colour", 1, "unknown key colour"),
        ("decoder.colour", 1, "unknown key colour"),
        ("decoder", ..., "missing key decoder"),
        ("decoder", 5, "decoder is 5; it must be an object"),
        ("decoder.layers", 2.5, "layers is 2.5"),
        ("vision", [1], "vision is"),
        ("tokens.im_patch", -1, "im_patch is -1"),
        ("sampling.top_p", 2, "top_p is 2"),
        ("sampling.heat", 2, "unknown key heat"),
        ("sampling", 5, "sampling is 5; it must be an object"),
        ("name", 5, "name is 5"),
    ],
)
def test_refuses_in_our_own_form(path, value, words, read):
    """Guards against a misspelt key that leaves its field at the default."""
    with pytest.raises(InputError, match=words):
        read(merged(asdict(TINY), path, value))


@pytest.mark.parametrize("text", ["", "{", "[]", "5", '{"model_type": 5}', "{}"])
def test_refuses_what_is_no_config(text, read):
    """Guards against a traceback for a damaged file."""
    with pytest.raises(InputError, match=r"config\.json"):
        read(text)


def test_a_missing_config_is_named(tmp_path):
    """Guards against a traceback for a directory without a model."""
    with pytest.raises(InputError, match=r"cannot read .*config\.json: No such file"):
        read_config(tmp_path)
