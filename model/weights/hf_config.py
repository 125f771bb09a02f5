"""Reader and writer of config.json: published forms (StepVL, Qwen3, Llama) and this project's own.

Keys of a published config.json that do not change what is computed are ignored. Keys whose value
is not implemented (rope scaling, sliding windows, biases, ...) raise an InputError that names them:
a wrong model is worse than none.
"""

import json
import math
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from model.config import Config, DecoderConfig, SamplingConfig, TokenIds, VisionConfig
from model.errors import InputError

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

# The only implemented value of each key; an absent key means that value.
_TEXT_FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
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

    `eos` and `sampling` come from generation_config.json where that has them: eos_token_id as in
    transformers; temperature, top_p and top_k as in vLLM. Raises InputError for a missing or
    invalid file and for anything that is not implemented.
    """
    file, generation_file = path / "config.json", path / "generation_config.json"
    data = _read_json(file)
    generation = _read_json(generation_file) if generation_file.exists() else {}
    try:
        if "model_type" in data:
            config = _from_published(data, path, generation)
        else:
            _require_objects(data, "decoder", "vision", "tokens", "sampling")
            config = Config.from_dict(data)
        check_config(config)
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    try:
        return replace(config, sampling=_sampling(generation, config.sampling))
    except InputError as error:
        raise InputError(f"{generation_file}: {error}") from None


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
    tokens = asdict(config.tokens)
    del tokens["eos"]
    own: dict[str, object] = {
        "name": config.name,
        "tokens": tokens,
        "sampling": asdict(config.sampling),
    }
    if config.vision is None:
        return text | {_OWN_KEY: own}
    published = {*_VISION_KEYS, "mlp_width"}
    own["vision"] = {k: v for k, v in asdict(config.vision).items() if k not in published}
    return {
        "model_type": "step_robotics",
        "architectures": ["StepVLForConditionalGeneration"],
        "image_token_id": config.tokens.im_patch,
        "image_token_len": config.vision.image_tokens,
        "patch_token_len": config.vision.crop_tokens,
        **_STEP_FIXED,
        "vision_config": _write_vision(config.vision),
        "text_config": text,
        _OWN_KEY: own,
    }


def _from_published(data: dict, path: Path, generation: dict) -> Config:
    _require_objects(data, "text_config", "vision_config", _OWN_KEY)
    own = data.get(_OWN_KEY) or {}
    _require_objects(own, "tokens", "vision", "sampling")
    _refuse(own, "vision", "vision" not in own or data["model_type"] == "step_robotics")
    model_type, text, vision = data["model_type"], data, None
    if model_type == "step_robotics":
        _require_fixed(data, _STEP_FIXED, "")
        vision = (own.get("vision") or {}) | _read_vision(data.get("vision_config") or {})
        text = data.get("text_config") or data | {"model_type": "qwen3"}
        model_type = text.get("model_type", "qwen3")
    for part in (data, text):
        _refuse(part, "quantization_config", part.get("quantization_config") is None)
    if model_type not in tuple(_ARCHITECTURES):
        raise InputError(
            f"model_type is {model_type!r}; only step_robotics, qwen3 and llama are implemented"
        )
    tokens = {"eos": _eos(generation, text, data), **(own.get("tokens") or {})}
    if "image_token_id" in data:
        tokens["im_patch"] = data["image_token_id"]
    parts = {"decoder": _read_decoder(text, model_type), "vision": vision}
    named = {"name": path.resolve().name, **own, "tokens": tokens}
    config = Config.from_dict(named | parts)
    _check_token_lengths(data, config.vision)
    return config


def _read_decoder(text: dict, model_type: str) -> dict:
    _require_fixed(text, _TEXT_FIXED, "")
    layer_types = text.get("layer_types") or []
    _refuse(text, "layer_types", layer_types == ["full_attention"] * len(layer_types))
    values: dict[str, Any] = {field: text.get(key) for field, key in _DECODER_KEYS.items()}
    values["rope_theta"] = _rope_theta(text)
    values["kv_heads"] = values["kv_heads"] or values["heads"]
    values["tied_embeddings"] = values["tied_embeddings"] or False
    missing = [k for f, k in _DECODER_KEYS.items() if values[f] is None and f != "head_dim"]
    if missing:
        raise InputError(f"missing key {', '.join(missing)}")
    if values["head_dim"] is None and model_type == "qwen3":
        values["head_dim"] = DecoderConfig.head_dim
    elif values["head_dim"] is None:
        check_number("hidden_size", values["hidden"], int)
        check_number("num_attention_heads", values["heads"], int)
        values["head_dim"] = values["hidden"] // values["heads"]
    return values | {"qk_norm": model_type == "qwen3"}


def _rope_theta(text: dict) -> float:
    """`rope_theta` in either form: a key of the config, or inside `rope_parameters`."""
    theta = text.get("rope_theta", 10000.0)  # transformers' default; old Llamas omit the key
    for key in ("rope_parameters", "rope_scaling"):
        rope = text.get(key) or {}
        _refuse(text, key, isinstance(rope, dict))
        plain = {"rope_theta": rope.get("rope_theta"), "partial_rotary_factor": 1.0}
        plain |= {"rope_type": "default", "type": "default"}
        _refuse(text, key, all(k in plain and v == plain[k] for k, v in rope.items()))
        theta = rope.get("rope_theta", theta)
    _refuse(text, "partial_rotary_factor", text.get("partial_rotary_factor") in (None, 1.0))
    return theta


def _read_vision(vision: dict) -> dict:
    _require_fixed(vision, _VISION_FIXED, "vision_config.")
    # The published configuration class has both spellings.
    _require_fixed(vision, {"ues_cls_token": False}, "vision_config.")
    values = {field: vision[key] for field, key in _VISION_KEYS.items() if key in vision}
    width = values.get("width", VisionConfig.width)
    ratio = vision.get("mlp_ratio", VisionConfig.mlp_width / VisionConfig.width)
    check_number("vision_config.width", width, int)
    check_number("vision_config.mlp_ratio", ratio, float)
    return values | {"mlp_width": int(width * ratio)}


def _write_vision(vision: VisionConfig) -> dict:
    ratio = vision.mlp_width / vision.width
    if int(vision.width * ratio) < vision.mlp_width:  # readers truncate the product
        ratio = math.nextafter(ratio, math.inf)
    known = {key: getattr(vision, field) for field, key in _VISION_KEYS.items()}
    return {"model_type": "perception_encoder", "mlp_ratio": ratio, **known, **_VISION_FIXED}


def _eos(*sources: dict) -> list[int]:
    """The eos ids of the first source that has some."""
    for source in sources:
        eos = source.get("eos_token_id")
        if eos is not None:
            return eos if isinstance(eos, list) else [eos]
    return []


def _sampling(generation: dict, default: SamplingConfig) -> SamplingConfig:
    """The sampling settings in generation_config.json; `default` for absent and null keys.

    Raises InputError for a value out of range.
    """
    names = [field.name for field in fields(SamplingConfig)]
    settings = {name: generation[name] for name in names if generation.get(name) is not None}
    if settings.get("top_k") == -1:  # vLLM's spelling of 0
        settings["top_k"] = 0
    sampling = replace(default, **settings)
    _check_sampling(sampling)
    return sampling


def _check_token_lengths(data: dict, vision: VisionConfig | None) -> None:
    """Refuse token counts of an image or a crop that differ from those of our preprocessing."""
    if vision is not None:
        for key, ours in (("image_token_len", "image_tokens"), ("patch_token_len", "crop_tokens")):
            _require_fixed(data, {key: getattr(vision, ours)}, "")


def check_config(config: Config) -> None:
    """Raise InputError unless numbers have their type and are positive, and head counts divide."""
    for part in (config.decoder, config.vision):
        for field in fields(part) if part is not None else ():
            assert isinstance(field.type, type)  # model/config.py evaluates its annotations
            check_number(field.name, getattr(part, field.name), field.type)
    for field in fields(TokenIds):
        ids = getattr(config.tokens, field.name)
        if not all(type(i) is int and i >= 0 for i in (ids if field.name == "eos" else [ids])):
            raise InputError(f"{field.name} is {ids!r}; token ids must be integers from 0 up")
    if not isinstance(config.name, str):
        raise InputError(f"name is {config.name!r}; it must be a string")
    _check_heads(config.decoder, config.vision)
    _check_sampling(config.sampling)


def check_number(key: str, value: object, kind: type) -> None:
    """Raise InputError unless `value` is a positive, finite number (or bool) of type `kind`."""
    if kind is bool:
        if type(value) is not bool:
            raise InputError(f"{key} is {value!r}; it must be true or false")
        return
    fits = type(value) in (int, kind) and isinstance(value, int | float) and 0 < value < math.inf
    if not fits:
        raise InputError(f"{key} is {value!r}; it must be a positive {kind.__name__}")


def _check_heads(decoder: DecoderConfig, vision: VisionConfig | None) -> None:
    if decoder.heads % decoder.kv_heads or decoder.head_dim % 2:
        raise InputError(
            f"heads ({decoder.heads}) must be a multiple of kv_heads ({decoder.kv_heads}), "
            f"and head_dim ({decoder.head_dim}) must be even"
        )
    if vision is not None and vision.width % (4 * vision.heads):
        raise InputError(
            f"vision width ({vision.width}) must be a multiple of 4 x heads ({vision.heads})"
        )


def _check_sampling(sampling: SamplingConfig) -> None:
    temperature, top_p, top_k = sampling.temperature, sampling.top_p, sampling.top_k
    number = type(temperature) in (int, float)
    if not number or not (temperature == 0 or 1e-6 <= temperature <= 1e6):
        raise InputError(f"temperature is {temperature!r}; it must be 0, or from 1e-6 to 1e6")
    if type(top_p) not in (int, float) or not 0 < top_p <= 1:
        raise InputError(f"top_p is {top_p!r}; it must be above 0 and at most 1")
    if type(top_k) is not int or top_k < 0:
        raise InputError(f"top_k is {top_k!r}; it must be an integer, at least 0")


def _require_fixed(data: dict, fixed: dict[str, Any], where: str) -> None:
    for key, value in fixed.items():
        if data.get(key, value) not in (value, None):
            raise InputError(
                f"{where}{key} is {data[key]!r}; only {json.dumps(value)} is implemented"
            )


def _refuse(data: dict, key: str, implemented: bool) -> None:
    if not implemented:
        raise InputError(f"{key} {json.dumps(data.get(key))} is not implemented")


def _require_objects(data: dict, *keys: str) -> None:
    for key in keys:
        if not isinstance(data.get(key), dict | None):
            raise InputError(f"{key} is {data[key]!r}; it must be an object")


def _read_json(file: Path) -> dict:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise InputError(f"{file} must hold a JSON object")
    return data
