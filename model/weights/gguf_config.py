"""The metadata of a llama-architecture GGUF file as a `Config`.

What a key means is taken from llama.cpp (src/llama-model.cpp, src/llama-arch.cpp). A `llama.` key
is refused by name unless it is read, or its value is known not to change the model: a wrong model
is worse than none.
"""

import warnings
from collections.abc import Collection, Mapping
from typing import Any

from model.config import PRESETS, Config, DecoderConfig, SamplingConfig, TokenIds
from model.errors import InputError, shown
from model.text.gguf_tokenizer import read_gguf_tokenizer
from model.weights.config_checks import check_config, check_number, with_settings

# The keys that are read, all with the prefix `llama.`.
_REQUIRED = {
    "block_count": int,
    "embedding_length": int,
    "feed_forward_length": int,
    "attention.head_count": int,
    "attention.layer_norm_rms_epsilon": float,
    "context_length": int,
}
_OPTIONAL = {
    "attention.head_count_kv": int,
    "attention.key_length": int,
    "rope.freq_base": float,
}
# Field -> its key, for errors.
_NAMES = {
    "decoder.hidden": "llama.embedding_length",
    "decoder.heads": "llama.attention.head_count",
    "decoder.kv_heads": "llama.attention.head_count_kv",
    "decoder.head_dim": "llama.attention.key_length",
    "decoder.layers": "llama.block_count",
    "decoder.mlp_width": "llama.feed_forward_length",
    "decoder.norm_eps": "llama.attention.layer_norm_rms_epsilon",
    "decoder.rope_theta": "llama.rope.freq_base",
    "decoder.max_positions": "llama.context_length",
    "decoder.vocab_size": "the number of tokenizer.ggml.tokens",
}
# Keys that may have a value for every layer; all layers must have the same one.
_PER_LAYER = ("feed_forward_length", "attention.head_count", "attention.head_count_kv")
# Other keys, with the values that do not change the model.
_NEUTRAL: dict[str, tuple] = {
    "rope.scaling.type": ("none", "linear"),  # linear is the default; its factor decides
    "rope.scaling.factor": (0, 1),
    "rope.scaling.attn_factor": (1,),
    "rope.scale_linear": (0, 1),  # the old name of rope.scaling.factor
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.scale": (0,),
    "attention.sliding_window": (0,),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "embedding_scale": (0, 1),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "leading_dense_block_count": (0,),
    "nextn_predict_layers": (0,),
    "pooling_type": (0,),
    "use_parallel_residual": (False,),
    "tensor_data_layout": ("Meta AI original pth",),  # that of Q's and K's rows, see _split_halves
}
# Only YaRN uses the length; llama.cpp only prints the other.
_UNUSED = {"rope.scaling.original_context_length", "rope.scaling.finetuned"}

# Recommended settings: those that are read, and neutral values of those that are not implemented.
_SAMPLING = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_p": "top_p",
    "general.sampling.top_k": "top_k",
}
_OTHER_SAMPLING = {
    "general.sampling.min_p": 0,
    "general.sampling.xtc_probability": 0,
    "general.sampling.penalty_repeat": 1,
    "general.sampling.mirostat": 0,
}


def read_gguf_config(
    metadata: Mapping[str, Any], tensors: Collection[str], default_name: str
) -> Config:
    """The model with these metadata and names of tensors; `default_name` if it has no name.

    Raises InputError for anything that is missing, wrong or not implemented.
    """
    _check_content(metadata)
    tokenizer = read_gguf_tokenizer(metadata)
    values = {k.removeprefix("llama."): v for k, v in metadata.items() if k.startswith("llama.")}
    numbers = _read_numbers(values, num_tensors=len(tensors))
    hidden, heads = numbers["embedding_length"], numbers["attention.head_count"]
    if heads > hidden:
        raise InputError(f"llama.attention.head_count is {heads}, but embedding_length is {hidden}")
    head_dim = numbers.get("attention.key_length", hidden // heads)
    _check_others(values, num_tokens=len(tokenizer.tokens), head_dim=head_dim)
    decoder = DecoderConfig(
        vocab_size=len(tokenizer.tokens),
        hidden=hidden,
        layers=numbers["block_count"],
        heads=heads,
        kv_heads=numbers.get("attention.head_count_kv", heads),
        head_dim=head_dim,
        mlp_width=numbers["feed_forward_length"],
        norm_eps=_shortest(numbers["attention.layer_norm_rms_epsilon"]),
        rope_theta=_shortest(numbers.get("rope.freq_base", 10000.0)),
        max_positions=numbers["context_length"],
        qk_norm=False,
        tied_embeddings="output.weight" not in tensors,
    )
    name = _read_name(metadata, default_name)
    sampling = _read_sampling(metadata, name)
    config = Config(name, decoder, tokens=TokenIds(eos=tokenizer.eos), sampling=sampling)
    check_config(config, _NAMES)
    return config


def _check_content(metadata: Mapping[str, Any]) -> None:
    """Refuse parts of models, files that are no models, and other architectures."""
    if metadata.get("split.count", 0) not in (0, 1):
        raise InputError(
            f"it is one of {shown(metadata['split.count'])} files of a split model; merge them"
            " first: llama-gguf-split --merge FIRST_FILE MERGED_FILE"
        )
    metadata = {"general.type": "model", **metadata}  # older files lack it
    for key, implemented in (("general.type", "model"), ("general.architecture", "llama")):
        if metadata.get(key) != implemented:
            raise InputError(
                f"{key} is {shown(metadata.get(key))}; only {implemented!r} is implemented"
            )


def _read_numbers(values: Mapping[str, Any], num_tensors: int) -> dict[str, Any]:
    """The values of `_REQUIRED` and `_OPTIONAL`, those per layer reduced to the common one."""
    for key in _REQUIRED:
        if key not in values:
            raise InputError(f"there is no metadata key llama.{key}")
    check_number("llama.block_count", values["block_count"], int)
    if values["block_count"] > num_tensors:
        raise InputError(
            f"llama.block_count is {values['block_count']}, but there are {num_tensors} tensors"
        )
    numbers = {}
    for key, kind in (_REQUIRED | _OPTIONAL).items():
        if key in values:
            number = values[key]
            if key in _PER_LAYER and isinstance(number, list):
                number = _common(key, number, values["block_count"])
            check_number(f"llama.{key}", number, kind)
            numbers[key] = number
    return numbers


def _common(key: str, numbers: list, layers: int) -> object:
    if len(numbers) != layers or len(set(numbers)) != 1:
        raise InputError(
            f"llama.{key} is {shown(numbers)}; it must be one number, or the same for each of"
            f" {layers} layers"
        )
    return numbers[0]


def _check_others(values: Mapping[str, Any], num_tokens: int, head_dim: int) -> None:
    """Refuse keys that are not read, unless they say what is implemented."""
    implied = {
        "vocab_size": (num_tokens, "the number of tokens"),
        "rope.dimension_count": (head_dim, "the size of a head"),
        "attention.value_length": (head_dim, "the size of a head"),
    }
    for key, value in values.items():
        problem = None
        if key in implied and value != implied[key][0]:
            number, meaning = implied[key]
            problem = f"only {number}, {meaning}, is implemented"
        elif key in _NEUTRAL and value not in _NEUTRAL[key]:
            problem = f"only {' or '.join(map(repr, _NEUTRAL[key]))} is implemented"
        elif key not in {*implied, *_NEUTRAL, *_REQUIRED, *_OPTIONAL, *_UNUSED}:
            problem = "this key is not implemented"
        if problem:
            raise InputError(f"llama.{key} is {shown(value)}; {problem}")


def _read_name(metadata: Mapping[str, Any], default: str) -> str:
    parts = []
    for key in ("general.basename", "general.size_label"):
        part = metadata.get(key, "")
        if not isinstance(part, str) or not part.isprintable() or len(part) > 100:
            raise InputError(
                f"{key} is {shown(part)}; it must be a printable string of at most 100 characters"
            )
        parts.append(part)
    return "-".join(parts).lower() if all(parts) else default


def _read_sampling(metadata: Mapping[str, Any], name: str) -> SamplingConfig:
    """The settings that the file recommends; the preset's or the default for those it lacks."""
    default = PRESETS[name].sampling if name in PRESETS else SamplingConfig()
    for key, neutral in _OTHER_SAMPLING.items():
        if metadata.get(key, neutral) != neutral:
            text = f"{key} ({shown(metadata[key])}) is not implemented; it is ignored"
            warnings.warn(text, stacklevel=2)
    settings = {field: metadata[key] for key, field in _SAMPLING.items() if key in metadata}
    for field, value in settings.items():
        if type(value) is float:
            settings[field] = _shortest(value)
    return with_settings(default, settings)


def _shortest(value: float) -> float:
    """The shortest decimal that rounds to this fp32 value: 1e-05, not 9.999999747378752e-06."""
    import numpy as np

    with np.errstate(over="ignore"):  # inf is refused later
        return float(str(np.float32(value)))
