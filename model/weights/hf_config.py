"""Reader and writer of config.json: published forms (StepVL, Qwen3, Llama) and this project's own.

Keys of a published config.json that do not change what is computed are ignored. Keys whose value
is not implemented (sliding windows, biases, LongRoPE, ...) raise an InputError that names them: a
wrong model is worse than none. What a key means is what transformers' configuration classes and
modeling code make of it; where vLLM differs from them, the key is refused, except YaRN's
attention_factor and mscale, which vLLM passes over.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from model.config import Config, DecoderConfig, TokenIds, VisionConfig, check_keys
from model.errors import InputError, shown
from model.rope import context_of
from model.text.files import check_regular, read_json
from model.weights.config_checks import check_config, check_number, token_ids
from model.weights.generation_config import with_generation_config
from model.weights.hf_rope import read_scaling, read_theta

_DECODER_KEYS = {
    "vocab_size": "vocab_size",
    "hidden": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "mlp_width": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
    "max_positions": "max_position_embeddings",
    "tied_embeddings": "tie_word_embeddings",
}
_VISION_KEYS = {
    "width": "width",
    "layers": "layers",
    "heads": "heads",
    "patch_size": "patch_size",
    "image_size": "image_size",
    "norm_eps": "layer_norm_eps",
    "layer_scale": "ls_init_value",
}
# This key holds what published keys cannot express: crop sizes, ids of structural tokens.
_OWN_KEY = "step3vl"
_OWN_VISION = set(asdict(VisionConfig())) - {*_VISION_KEYS, "mlp_width"}
_OWN_TOKENS = set(asdict(TokenIds())) - {"eos"}
_OWN_PARTS = {"name", "tokens", "sampling", "vision"}

# The implemented values of keys that change what is computed; an absent or null key means them too.
_TEXT_FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
}
# The same for keys of related architectures (Granite, MiniCPM, Falcon-H1, Cohere, Gemma, OLMo,
# Llama 4, SmolLM3, mixtures of experts), whose weights have the names and shapes of Llama's.
_TEXT_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "partial_rotary_factor": (1,),
    "rotary_pct": (1,),
    "embedding_multiplier": (1,),
    "residual_multiplier": (1,),
    "lm_head_multiplier": (1,),
    "logits_scaling": (1,),
    "logit_scale": (1,),
    "scale_emb": (1,),
    "scale_depth": (),
    "dim_model_base": (),
    "final_logit_softcapping": (),
    "attn_logit_softcapping": (),
    "clip_qkv": (),
    "attention_chunk_size": (),
    "attn_temperature_tuning": (False,),
    "no_rope_layer_interval": (),
    "swiglu_limits": (),
    "num_experts": (0,),
    "num_local_experts": (0,),
    "n_routed_experts": (0,),
    "quantization_config": (),
    "compression_config": (),
}
_TEXT_KEYS = {
    *_DECODER_KEYS.values(),
    *_TEXT_FIXED,
    *_TEXT_NEUTRAL,
    "rope_parameters",
    "rope_scaling",
    "original_max_position_embeddings",
    "sliding_window",
    "layer_types",
    "no_rope_layers",
    "attention_multiplier",
    "query_pre_attn_scalar",
}
_VISION_FIXED = {
    "hidden_act": "quick_gelu",
    "num_channels": 3,
    "use_cls_token": False,
    "use_ln_pre": True,
    "use_ln_post": False,
    "use_abs_posemb": True,
    "use_rope2d": True,
    "pool_type": "none",
    "output_dim": None,
}
_STEP_FIXED = {
    "projector_bias": False,
    "understand_projector_stride": 2,
    "vision_select_layer": -1,
}
_ARCHITECTURES = {"qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}


def read_config(path: Path) -> Config:
    """The model that `path`/config.json describes; a model without a name gets the directory's.

    generation_config.json adds to it, if there is one: end tokens (`eos`) are those of all files,
    temperature, top_p and top_k those of generation_config.json. Warns of settings in that file
    that are not followed. Raises InputError, which begins with the file's name, for a missing or
    invalid file and for anything that is not implemented.
    """
    file = path / "config.json"
    check_regular(file)
    data = read_json(file) or {}
    try:
        if "model_type" in data:
            config = _from_published(data, path)
        else:
            config = Config.from_dict(data)
            check_config(config)
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    return with_generation_config(config, path)


def write_config(config: Config) -> dict:
    """The content of a config.json that `read_config` reads back as `config`.

    Text-only models are written as Qwen3 or Llama in the form that transformers loads, models with
    vision in the published StepVL form.
    """
    model_type = "qwen3" if config.decoder.qk_norm else "llama"
    text = {
        "model_type": model_type,
        "architectures": [_ARCHITECTURES[model_type]],
        **{key: getattr(config.decoder, field) for field, key in _DECODER_KEYS.items()},
        **_TEXT_FIXED,
        "eos_token_id": list(config.tokens.eos),
    }
    if config.decoder.rope_scaling is not None:
        text["rope_scaling"] = asdict(config.decoder.rope_scaling)
    tokens, vision = asdict(config.tokens), config.vision
    own: dict[str, object] = {
        "name": config.name,
        "tokens": {key: tokens[key] for key in tokens if key in _OWN_TOKENS},
        "sampling": asdict(config.sampling),
    }
    if vision is None:
        return text | {_OWN_KEY: own}
    own["vision"] = {k: v for k, v in asdict(vision).items() if k in _OWN_VISION}
    return {
        "model_type": "step_robotics",
        "architectures": ["StepVLForConditionalGeneration"],
        "image_token_id": config.tokens.im_patch,
        "image_token_len": vision.image_tokens,
        "patch_token_len": vision.crop_tokens,
        **_STEP_FIXED,
        "vision_config": _write_vision(vision),
        "text_config": text,
        _OWN_KEY: own,
    }


def _from_published(data: dict, path: Path) -> Config:
    own = _own_part(data)
    vision_config = _object(data, "vision_config")
    vision = None
    if data["model_type"] == "step_robotics":
        _require_fixed(data, _STEP_FIXED, "")
        vision = (own.get("vision") or {}) | _read_vision(vision_config)
    elif "vision" in own:
        raise InputError(
            f"{_OWN_KEY}.vision is given, but {shown(data['model_type'])} has no vision tower"
        )
    text, where, model_type = _text_model(data)
    decoder = _read_decoder(text, model_type, where)
    if text is not data:
        _require_agreement(data, text, decoder, model_type)
    tokens = (own.get("tokens") or {}) | {"eos": ()}
    if "image_token_id" in data:
        tokens["im_patch"] = data["image_token_id"]
    parts = {"decoder": decoder, "vision": vision, "tokens": tokens}
    config = Config.from_dict({"name": _name_of(path), **own} | parts)
    check_config(config, _names(data, where))
    _check_token_lengths(data, config.vision)
    for source, prefix in ((text, where), (data, "")):
        key, ids = f"{prefix}eos_token_id", source.get("eos_token_id")
        config = config.with_ends(token_ids(key, ids, config.decoder.vocab_size))
    return config


def _own_part(data: dict) -> dict:
    own = _object(data, _OWN_KEY)
    check_keys(_OWN_KEY, own, _OWN_PARTS)
    check_keys(f"{_OWN_KEY}.tokens", _object(own, "tokens", f"{_OWN_KEY}."), _OWN_TOKENS)
    check_keys(f"{_OWN_KEY}.vision", _object(own, "vision", f"{_OWN_KEY}."), _OWN_VISION)
    _object(own, "sampling", f"{_OWN_KEY}.")
    return own


def _text_model(data: dict) -> tuple[dict, str, str]:
    """The keys of the text model, what comes before their names in this file, and their type."""
    text, where, model_type = data, "", data["model_type"]
    nested = _object(data, "text_config")
    if model_type == "step_robotics":
        model_type = nested.get("model_type", "qwen3")
        if nested:
            text, where = nested, "text_config."
    if model_type not in tuple(_ARCHITECTURES):
        raise InputError(
            f"{where}model_type is {shown(model_type)}; only step_robotics, qwen3 and llama are"
            " implemented"
        )
    return text, where, model_type


def _names(data: dict, where: str) -> dict[str, str]:
    """Field -> its key in this file, where they differ; `where` is the text model's prefix."""
    names = {f"decoder.{field}": where + key for field, key in _DECODER_KEYS.items()}
    names |= {f"vision.{field}": f"vision_config.{key}" for field, key in _VISION_KEYS.items()}
    names["vision.mlp_width"] = "vision_config.width x mlp_ratio"
    names |= {f"vision.{field}": f"{_OWN_KEY}.vision.{field}" for field in _OWN_VISION}
    names |= {f"tokens.{field}": f"{_OWN_KEY}.tokens.{field}" for field in _OWN_TOKENS}
    if "image_token_id" in data:
        names["tokens.im_patch"] = "image_token_id"
    return names


def _name_of(path: Path) -> str:
    return "".join(c if c.isprintable() else "?" for c in path.resolve().name)


def _read_decoder(text: dict, model_type: str, where: str) -> dict:
    _require_fixed(text, _TEXT_FIXED, where)
    for key, neutral in _TEXT_NEUTRAL.items():
        _refuse(text, key, where, text.get(key) is None or text[key] in neutral)
    values: dict[str, Any] = {field: text.get(key) for field, key in _DECODER_KEYS.items()}
    values["rope_theta"] = read_theta(text, where)
    values["kv_heads"] = values["heads"] if values["kv_heads"] is None else values["kv_heads"]
    values["tied_embeddings"] = text.get("tie_word_embeddings") or False
    missing = [k for f, k in _DECODER_KEYS.items() if values[f] is None and f != "head_dim"]
    if missing:
        raise InputError(f"missing key {', '.join(where + key for key in missing)}")
    if values["head_dim"] is None:
        values["head_dim"] = _default_head_dim(values, model_type, where)
    _check_attention(text, values, model_type, where)
    check_number(f"{where}max_position_embeddings", values["max_positions"], int, "max_positions")
    scaling = read_scaling(text, where, values["max_positions"])
    values["max_positions"] = context_of(scaling, values["max_positions"], f"{where}rope_scaling.")
    values["rope_scaling"] = scaling and asdict(scaling)
    return values | {"qk_norm": model_type == "qwen3"}


def _default_head_dim(values: dict, model_type: str, where: str) -> int:
    if model_type == "qwen3":
        return DecoderConfig.head_dim
    hidden, heads = values["hidden"], values["heads"]
    check_number(f"{where}hidden_size", hidden, int)
    check_number(f"{where}num_attention_heads", heads, int)
    if hidden % heads:
        raise InputError(
            f"{where}hidden_size ({hidden}) must be a multiple of num_attention_heads ({heads}),"
            " as there is no head_dim"
        )
    return hidden // heads


def _check_attention(text: dict, values: dict, model_type: str, where: str) -> None:
    """Refuse windows, layers without rotation, and scores of another scale."""
    layers, head_dim = values["layers"], values["head_dim"]
    check_number(f"{where}num_hidden_layers", layers, int, "layers")
    check_number(f"{where}head_dim", head_dim, int, "head_dim")
    types = text.get("layer_types")
    _refuse(text, "layer_types", where, types in (None, ["full_attention"] * layers))
    rope_layers = text.get("no_rope_layers")  # 1: the layer rotates
    _refuse(text, "no_rope_layers", where, rope_layers in (None, [], [1] * layers))
    # transformers' Llama has no window, vLLM's has one.
    window, off = text.get("sliding_window"), text.get("use_sliding_window") is False
    _refuse(text, "sliding_window", where, window is None or off or model_type == "qwen3")
    for key, neutral in (
        ("attention_multiplier", head_dim**-0.5),
        ("query_pre_attn_scalar", head_dim),
    ):
        value = text.get(key)
        same = value == neutral or (
            isinstance(value, float) and math.isclose(value, neutral, rel_tol=1e-6)
        )
        _refuse(text, key, where, value is None or same)


def _require_agreement(data: dict, text: dict, decoder: dict, model_type: str) -> None:
    """Refuse keys of the text model outside `text_config` that contradict it.

    Readers differ in which of the two they follow; tie_word_embeddings is an example.
    """
    outside = {key: data[key] for key in sorted(_TEXT_KEYS) if data.get(key) is not None}
    other = _read_decoder(text | outside, model_type, "")
    for field, key in [("rope_scaling", "rope_scaling"), *_DECODER_KEYS.items()]:
        if other[field] != decoder[field]:
            raise InputError(
                f"{key} is {shown(other[field])}, but with text_config alone it is"
                f" {shown(decoder[field])}; they must agree"
            )


def _read_vision(vision: dict) -> dict:
    _require_fixed(vision, _VISION_FIXED, "vision_config.")
    # The published configuration class has both spellings.
    _require_fixed(vision, {"ues_cls_token": False}, "vision_config.")
    values = {field: vision[key] for field, key in _VISION_KEYS.items() if key in vision}
    width = values.get("width", VisionConfig.width)
    ratio = vision.get("mlp_ratio", VisionConfig.mlp_width / VisionConfig.width)
    check_number("vision_config.width", width, int, "width")
    check_number("vision_config.mlp_ratio", ratio, float, "mlp_ratio")
    values["mlp_width"] = int(width * ratio)
    default = VisionConfig()
    synonyms = {  # transformers' and vLLM's names
        "hidden_size": "width",
        "intermediate_size": "mlp_width",
        "num_hidden_layers": "layers",
        "num_attention_heads": "heads",
        "layer_scale_init_value": "layer_scale",
    }
    for key, field in synonyms.items():
        _require_fixed(vision, {key: values.get(field, getattr(default, field))}, "vision_config.")
    return values


def _write_vision(vision: VisionConfig) -> dict:
    ratio = vision.mlp_width / vision.width
    if int(vision.width * ratio) < vision.mlp_width:  # readers truncate the product
        ratio = math.nextafter(ratio, math.inf)
    known = {key: getattr(vision, field) for field, key in _VISION_KEYS.items()}
    return {"model_type": "perception_encoder", "mlp_ratio": ratio, **known, **_VISION_FIXED}


def _check_token_lengths(data: dict, vision: VisionConfig | None) -> None:
    """Refuse token counts of an image or a crop that differ from those of our preprocessing."""
    if vision is not None:
        for key, ours in (("image_token_len", "image_tokens"), ("patch_token_len", "crop_tokens")):
            _require_fixed(data, {key: getattr(vision, ours)}, "")


def _require_fixed(data: dict, fixed: Mapping[str, Any], where: str) -> None:
    for key, value in fixed.items():
        if data.get(key, value) not in (value, None):
            raise InputError(
                f"{where}{key} is {shown(data[key])}; only {json.dumps(value)} is implemented"
            )


def _refuse(data: dict, key: str, where: str, implemented: bool) -> None:
    if not implemented:
        raise InputError(f"{where}{key} {shown(data.get(key))} is not implemented")


def _object(data: dict, key: str, where: str = "") -> dict:
    """The object at `key`; empty if the key is absent or null."""
    value = data.get(key)
    if value is not None and not isinstance(value, dict):
        raise InputError(f"{where}{key} is {shown(value)}; it must be an object")
    return value or {}
