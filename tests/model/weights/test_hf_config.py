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


def test_the_ends_of_all_files_count(read, tmp_path):
    """Guards against rollouts that run past an end which only one of the files names: chat models
    have more in generation_config.json, others fewer; vLLM and transformers differ in whom they
    ask, so all count. In the published forms and in ours."""
    read(QWEN3)
    generation = tmp_path / "model" / "generation_config.json"
    for text, eos in (
        ('{"eos_token_id": [7, 9]}', (7, 9)),
        ('{"eos_token_id": 9}', (7, 9)),
        ('{"temperature": 1.0}', (7,)),
        ('{"eos_token_id": null}', (7,)),
    ):
        generation.write_text(text)
        assert read(QWEN3).tokens.eos == eos
    generation.write_text('{"eos_token_id": 9}')
    assert read(asdict(TINY)).tokens.eos == (*TINY.tokens.eos, 9)
    generation.unlink()
    assert read(STEP_VL | {"eos_token_id": [1, 151645]}).tokens.eos == (151643, 151645, 151679, 1)
    assert read(merged(QWEN3, "eos_token_id", ...)).tokens.eos == ()


@pytest.mark.parametrize(
    ("generation", "words"),
    [
        ({"do_sample": False, "temperature": 0.5}, "not followed: do_sample False; temperature 0"),
        ({"repetition_penalty": 1.05, "min_p": 0.1}, "repetition_penalty 1.05, min_p 0.1"),
        ({"suppress_tokens": [1]}, r"suppress_tokens \[1\]"),
    ],
)
def test_names_what_is_not_followed(generation, words, read, tmp_path):
    """Guards against answers drawn otherwise than the model's authors say, silently."""
    read(QWEN3)
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(generation))
    with pytest.warns(UserWarning, match=words):
        read(QWEN3)


@pytest.mark.filterwarnings("error")
def test_is_silent_about_settings_without_effect(read, tmp_path):
    """Guards against a warning for every published model."""
    read(QWEN3)
    settings = {"do_sample": True, "repetition_penalty": 1.0, "min_p": 0.0, "num_beams": 1}
    settings |= {"max_new_tokens": 2048, "pad_token_id": 0, "stop_strings": None}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(settings))
    assert read(QWEN3).sampling == SamplingConfig()


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
        ('{"top_k": 1e400}', "top_k is inf"),
        ('{"eos_token_id": 96}', "eos_token_id is 96; token ids must be integers from 0 to 95"),
        ('{"eos_token_id": "x"}', "eos_token_id is 'x'"),
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
        ("sliding_window", 64, "sliding_window 64 is not implemented"),
        ("layer_types", ["full_attention", "sliding_attention"], "layer_types"),
        ("layer_types", ["full_attention"], "layer_types"),
        ("layer_types", 5, "layer_types 5 is not implemented"),
        ("no_rope_layers", [1, 0], "no_rope_layers"),
        (
            "rope_scaling",
            {"factor": 2.0, "rope_type": "yarn"},
            "rope_scaling.rope_type 'yarn' is not implemented",
        ),
        ("attention_multiplier", 10**400, "attention_multiplier 1000"),
        ("rope_scaling", {"type": "linear", "factor": 2.0}, "rope_scaling"),
        ("rope_scaling", {"type": "default", "mrope_section": [8, 4, 4]}, "rope_scaling"),
        ("rope_parameters", {"rope_type": "llama3", "factor": 8.0}, "rope_parameters"),
        ("rope_parameters", {"rope_theta": 1e4, "partial_rotary_factor": 0.5}, "rope_parameters"),
        ("rope_parameters", [1], "rope_parameters"),
        ("partial_rotary_factor", 0.5, "partial_rotary_factor"),
        ("rope_parameters", {"rope_theta": 1e4}, "rope_theta is 500000.0 in one place and 10000.0"),
        ("rope_parameters", {"full_attention": {"rope_theta": 5e5}}, "rope_parameters"),
        ("rope_theta", None, "missing key rope_theta"),
        ("quantization_config", {"quant_method": "fp8"}, "quantization_config"),
        ("quantization_config", {}, "quantization_config {} is not implemented"),
        ("compression_config", {}, "compression_config"),
        ("embedding_multiplier", 12, "embedding_multiplier 12 is not implemented"),
        ("logits_scaling", 8.0, "logits_scaling"),
        ("attention_multiplier", 0.5, "attention_multiplier 0.5 is not implemented"),
        ("query_pre_attn_scalar", 256, "query_pre_attn_scalar"),
        ("final_logit_softcapping", 30.0, "final_logit_softcapping"),
        ("num_local_experts", 8, "num_local_experts"),
        ("hidden_size", ..., "missing key hidden_size"),
        ("hidden_size", "32", "hidden_size is '32'; it must be a positive int"),
        ("num_hidden_layers", 0, "num_hidden_layers is 0"),
        ("rms_norm_eps", -1e-6, "rms_norm_eps is -1e-06"),
        ("tie_word_embeddings", 1, "tie_word_embeddings is 1; it must be true or false"),
        ("num_key_value_heads", 3, "heads .4. must be a multiple of kv_heads .3."),
        ("head_dim", 15, "head_dim .15. must be even"),
        ("eos_token_id", ["</s>"], "eos_token_id is .*; token ids must be integers"),
        ("eos_token_id", 96, "eos_token_id is 96; token ids must be integers from 0 to 95"),
        ("eos_token_id", [-1], "eos_token_id is .-1."),
        ("eos_token_id", True, "eos_token_id is True"),
        ("num_hidden_layers", 10**30, "num_hidden_layers is 10*; it must be from 1 to 1000"),
        ("hidden_size", 10**400, r"hidden_size is 10*\.\.\.0*; it must be from 1 to"),
        ("rope_theta", 1e308, "rope_theta is 1e.308; it must be from"),
        ("vision_config", 5, "vision_config is 5; it must be an object"),
        ("step3vl", {"colour": 1}, "unknown key colour"),
        ("step3vl", {"tokens": {"colour": 1}}, "unknown key colour"),
        ("step3vl", {"vision": {}}, "vision"),
        ("step3vl", {"decoder": {}}, "step3vl: unknown key decoder"),
        ("step3vl", {"tokens": [1]}, "step3vl.tokens is"),
        ("step3vl", {"tokens": {"eos": 5}}, "step3vl.tokens: unknown key eos"),
        ("step3vl", {"sampling": 5}, "step3vl.sampling is 5; it must be an object"),
        ("step3vl", {"name": "a\x1b[31m"}, "name is 'a.x1b.31m'; it must be a string"),
    ],
)
def test_refuses_in_a_text_model(key, value, words, read):
    """Guards against a model that loads although it computes something else."""
    with pytest.raises(InputError, match=f"config.json: .*{words}"):
        read(
            merged(
                QWEN3 | {"model_type": "llama"} if key == "sliding_window" else QWEN3, key, value
            )
        )


NEUTRAL = {
    "layer_types": ["full_attention"] * 2,
    "no_rope_layers": [1, 1],
    "sliding_window": 64,
    "use_sliding_window": False,
    "max_window_layers": 1,
    "partial_rotary_factor": 1.0,
    "rope_scaling": None,
    "rope_parameters": {"type": "default", "rope_theta": 5e5},
    "attention_multiplier": 0.25,
    "query_pre_attn_scalar": 16,
    "logits_scaling": 1.0,
    "final_logit_softcapping": None,
    "quantization_config": None,
    "num_experts": 0,
    "attention_dropout": 0.1,
    "pretraining_tp": 2,
    "torch_dtype": "int8",
}


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_accepts_what_changes_nothing(kind, read):
    """Guards against refusing a model for a key of another architecture that has no effect."""
    base = QWEN3 | {"model_type": kind}
    assert read(base | NEUTRAL) == read(base)


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
        ("text_config.hidden_size", "x", "text_config.hidden_size is 'x'; it must be a positive"),
        ("text_config.eos_token_id", 151936, "text_config.eos_token_id is 151936; .* to 151935"),
        ("tie_word_embeddings", True, "tie_word_embeddings is True, but with text_config alone"),
        ("rope_theta", 5, "rope_theta is 5, but with text_config alone it is 1000000; they must"),
        ("rope_scaling", {"rope_type": "yarn"}, "rope_scaling"),
        ("quantization_config", {"bits": 8}, "quantization_config"),
        ("image_token_id", 151936, "image_token_id is 151936; token ids must be"),
        ("image_token_id", "x", "image_token_id is 'x'; it must be a token id, an integer"),
        ("step3vl.tokens.im_end", -1, "step3vl.tokens.im_end is -1; token ids must be"),
        ("vision_config.hidden_size", 1024, "vision_config.hidden_size is 1024; only 1536"),
        ("vision_config.layers", 1001, "vision_config.layers is 1001; it must be from 1 to 1000"),
        ("vision_config.mlp_ratio", 1e-5, "vision_config.width x mlp_ratio is 0"),
        ("vision_config.image_size", 729, "image_size .729. must be a multiple of patch_size"),
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
        ("decoder", None, "decoder is null; it must be an object"),
        ("tokens.eos", 5, "tokens.eos is 5; it must be a list of token ids"),
        ("tokens.eos", [512], "tokens.eos is .512,.; token ids must be integers from 0 to 511"),
        ("tokens.im_patch", "x", "tokens.im_patch is 'x'"),
        ("vision.crop_size", 182, "crop_size .182. must be at most image_size"),
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
    with pytest.raises(InputError, match=r"config\.json cannot be read: No such file"):
        read_config(tmp_path)
