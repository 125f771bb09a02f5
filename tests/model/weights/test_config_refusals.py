"""Tests of what config.json may not say: models that are not implemented, and wrong values."""

from dataclasses import asdict

import pytest

from model.config import TINY
from model.errors import InputError
from model.weights.hf_config import read_config
from tests.model.weights.config_files import QWEN3, STEP_VL, merged


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
            {"factor": 2.0, "rope_type": "longrope"},
            "rope_scaling.rope_type 'longrope' is not implemented; default, linear, llama3, yarn",
        ),
        ("attention_multiplier", 10**400, "attention_multiplier 1000"),
        ("rope_scaling", {"type": "dynamic", "factor": 2.0}, "rope_type 'dynamic' is not impl"),
        ("rope_scaling", {"type": "yarn", "rope_type": "linear", "factor": 2.0}, "type is 'yarn'"),
        ("rope_scaling", {"rope_type": "yarn"}, "missing key rope_scaling.factor"),
        ("rope_scaling", {"rope_type": "yarn", "factor": 0.5}, "rope_scaling.factor is 0.5; it"),
        ("rope_scaling", {"rope_type": "yarn", "factor": "4"}, "rope_scaling.factor is '4'; it"),
        ("rope_scaling", {"rope_type": "yarn", "factor": 4, "beta_slow": 32}, "beta_slow is 32"),
        ("rope_scaling", {"rope_type": "yarn", "factor": 4, "attn_factor": 2}, "attn_factor 2 is"),
        ("rope_scaling", {"rope_type": "yarn", "factor": 4, "truncate": 0}, "truncate is 0; it"),
        ("rope_scaling", {"rope_type": "yarn", "factor": 4, "mscale": "1"}, "mscale is '1'"),
        ("rope_scaling", {"rope_type": "yarn", "factor": 4e4}, "rope_scaling.factor 40000 makes"),
        ("original_max_position_embeddings", "8", "original_max_position_embeddings is '8'; it"),
        ("rope_scaling", {"rope_type": ["yarn"], "factor": 4}, "rope_type .'yarn'. is not"),
        ("rope_scaling", {"rope_type": "linear", "factor": 2, "beta_fast": 32}, "beta_fast 32 is"),
        ("rope_scaling", {"type": "default", "mrope_section": [8, 4, 4]}, "rope_scaling"),
        ("rope_parameters", {"rope_type": "llama3", "factor": 8.0}, "missing key rope_parameters"),
        ("rope_parameters", {"rope_theta": 5e5, "partial_rotary_factor": 0.5}, "rope_parameters"),
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
