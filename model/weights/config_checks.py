"""Checks of a Config's values, for every file format: types, limits, sizes that divide."""

import math
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from model.config import Config, DecoderConfig, SamplingConfig, TokenIds, VisionConfig
from model.errors import InputError, shown
from model.rope import MAX_POSITIONS

# The least and greatest value of each number. All are far beyond published models. Within them
# tensors have less than 2^63 bytes, every position is exact in fp32, frequencies are finite, a
# grid's side fits into 15 bits (vision_attention), and `describe` ends at once.
_SIDE = (1, 2**14)
_RANGES: dict[str, tuple[float, float]] = {
    "vocab_size": (1, 2**24),
    "hidden": (1, 2**18),
    "width": (1, 2**16),
    "layers": (1, 1000),
    "heads": (1, 2**12),
    "kv_heads": (1, 2**12),
    "head_dim": (1, 2**14),
    "mlp_width": (1, 2**22),
    "max_positions": (1, MAX_POSITIONS),
    "norm_eps": (1e-30, 1.0),
    "rope_theta": (2.0, 1e15),
    "layer_scale": (1e-30, 1e6),
    "mlp_ratio": (1e-6, 1e6),
    "patch_size": _SIDE,
    "image_size": _SIDE,
    "crop_size": _SIDE,
    "crop_window": _SIDE,
    "uncropped_side": (1, 2**16),
    "max_image_size": (1, 2**16),
}


def check_config(config: Config, names: Mapping[str, str] | None = None) -> None:
    """Raise InputError unless every value has its type, is within its limits, and sizes divide.

    names: the file's key of a field, such as "decoder.hidden", where that is not its own name
    """
    names = names or {}
    for part in ("decoder", "vision"):
        values = getattr(config, part)
        for field in fields(values) if values is not None else ():
            if field.name == "rope_scaling":  # checked where it is parsed
                continue
            assert isinstance(field.type, type)  # model/config.py evaluates its annotations
            name = f"{part}.{field.name}"
            check_number(names.get(name, name), getattr(values, field.name), field.type, field.name)
    check_name(config.name)
    _check_sizes(config.decoder, config.vision)
    _check_tokens(config, names)
    check_sampling(config.sampling)


def check_number(key: str, value: object, kind: type, field: str | None = None) -> None:
    """Raise InputError unless `value` is a positive, finite number (or bool) of type `kind`, within
    the limits of a Config's `field`."""
    if kind is bool:
        if type(value) is not bool:
            raise InputError(f"{key} is {shown(value)}; it must be true or false")
        return
    number = type(value) in (int, kind) and isinstance(value, int | float)
    if not (number and 0 < value < math.inf):  # type: ignore[operator]
        raise InputError(f"{key} is {shown(value)}; it must be a positive {kind.__name__}")
    least, most = _RANGES.get(field or "", (0, math.inf))
    if not least <= value <= most:  # type: ignore[operator]
        raise InputError(f"{key} is {shown(value)}; it must be from {least} to {most}")


def check_name(name: object) -> None:
    """Raise InputError unless `name` is a short string that a terminal can show."""
    if not (isinstance(name, str) and name.isprintable() and len(name) <= 255):
        raise InputError(
            f"name is {shown(name)}; it must be a string of at most 255 printable characters"
        )


def token_ids(key: str, value: object, vocab_size: int) -> tuple[int, ...]:
    """The ids in `value`: one, a list of them, or None for none.

    Raises InputError, which names `key`, for another type and for ids outside the vocabulary.
    """
    ids = [] if value is None else value if isinstance(value, list | tuple) else [value]
    if not all(type(id) is int and 0 <= id < vocab_size for id in ids):
        raise InputError(
            f"{key} is {shown(value)}; token ids must be integers from 0 to {vocab_size - 1},"
            " below the vocabulary's size"
        )
    return tuple(ids)


def check_sampling(sampling: SamplingConfig) -> None:
    """Raise InputError for a setting of another type or out of range."""
    temperature, top_p, top_k = sampling.temperature, sampling.top_p, sampling.top_k
    number = type(temperature) in (int, float)
    if not number or not (temperature == 0 or 1e-6 <= temperature <= 1e6):
        raise InputError(f"temperature is {shown(temperature)}; it must be 0, or from 1e-6 to 1e6")
    if type(top_p) not in (int, float) or not 0 < top_p <= 1:
        raise InputError(f"top_p is {shown(top_p)}; it must be above 0 and at most 1")
    if type(top_k) is not int or not 0 <= top_k < 2**31:
        raise InputError(f"top_k is {shown(top_k)}; it must be an integer, at least 0")


def with_settings(sampling: SamplingConfig, settings: Mapping[str, Any]) -> SamplingConfig:
    """`sampling` with a file's settings. Raises as `check_sampling` does."""
    if settings.get("top_k") == -1:  # vLLM's spelling of 0
        settings = {**settings, "top_k": 0}
    sampling = replace(sampling, **settings)
    check_sampling(sampling)
    return sampling


def _check_sizes(decoder: DecoderConfig, vision: VisionConfig | None) -> None:
    if decoder.heads % decoder.kv_heads or decoder.head_dim % 2:
        raise InputError(
            f"heads ({decoder.heads}) must be a multiple of kv_heads ({decoder.kv_heads}), "
            f"and head_dim ({decoder.head_dim}) must be even"
        )
    if vision is None:
        return
    if vision.width % (4 * vision.heads):
        raise InputError(
            f"vision width ({vision.width}) must be a multiple of 4 x heads ({vision.heads})"
        )
    sizes = {"crop_size": vision.crop_size, "image_size": vision.image_size}
    for name, size in sizes.items():
        if size % vision.patch_size:
            raise InputError(
                f"{name} ({size}) must be a multiple of patch_size ({vision.patch_size})"
            )
    if vision.crop_size > vision.image_size:
        raise InputError(
            f"crop_size ({vision.crop_size}) must be at most image_size ({vision.image_size})"
        )


def _check_tokens(config: Config, names: Mapping[str, str]) -> None:
    """Ids must be in the vocabulary, but for the image tokens of a text-only model."""
    for field in fields(TokenIds):
        value = getattr(config.tokens, field.name)
        key = names.get(f"tokens.{field.name}", f"tokens.{field.name}")
        kind = tuple if field.name == "eos" else int
        if type(value) is not kind:
            needed = "a list of token ids" if field.name == "eos" else "a token id, an integer"
            raise InputError(f"{key} is {shown(value)}; it must be {needed}")
        if field.name == "eos" or config.vision is not None:
            token_ids(key, value, config.decoder.vocab_size)
