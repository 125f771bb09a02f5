"""A decoder's rotary frequencies, and their scaling for contexts longer than the trained one.

Keys and their meaning are those of `rope_parameters` in transformers 5, called `rope_scaling`
before. The arithmetic is fp64.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from model.errors import InputError, shown

MAX_POSITIONS = 2**24  # far beyond published models


@dataclass(frozen=True)
class Linear:
    """Position interpolation (arXiv 2306.15595): every frequency is divided by `factor`."""

    factor: float
    rope_type: str = field(default="linear", init=False)

    def scale(self, inv_freq: list[float], theta: float) -> list[float]:
        return [f / self.factor for f in inv_freq]


@dataclass(frozen=True)
class Llama3:
    """Llama 3.1's scaling, by the number of turns that a frequency makes in the trained context.

    Below `low_freq_factor` turns a frequency is divided by `factor`, above `high_freq_factor` it is
    kept, and in between it is interpolated.
    """

    factor: float
    original_max_position_embeddings: int
    low_freq_factor: float
    high_freq_factor: float
    rope_type: str = field(default="llama3", init=False)

    def scale(self, inv_freq: list[float], theta: float) -> list[float]:
        width = self.high_freq_factor - self.low_freq_factor
        turns = [self.original_max_position_embeddings * f / (2 * math.pi) for f in inv_freq]
        kept = (_clamped((t - self.low_freq_factor) / width) for t in turns)
        return _mixed(inv_freq, self.factor, kept)


@dataclass(frozen=True)
class Yarn:
    """YaRN (arXiv 2309.00071): frequencies with over `beta_fast` turns in the trained context are
    kept, those with under `beta_slow` divided by `factor`, with a linear ramp over the index of
    the frequency in between.

    attention_factor: both q and k are multiplied by it (the paper's sqrt(1/t))
    truncate: whether the ramp begins and ends at whole indices
    """

    factor: float
    original_max_position_embeddings: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    rope_type: str = field(default="yarn", init=False)

    def scale(self, inv_freq: list[float], theta: float) -> list[float]:
        dim = 2 * len(inv_freq)

        def index(turns: float) -> float:
            """The index, in general a fraction, of a frequency with that many turns."""
            wavelength = self.original_max_position_embeddings / (turns * 2 * math.pi)
            return dim * math.log(wavelength) / (2 * math.log(theta))

        low, high = index(self.beta_fast), index(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        width = high - low if high != low else 0.001
        kept = (1 - _clamped((i - low) / width) for i in range(len(inv_freq)))
        return _mixed(inv_freq, self.factor, kept)


RopeScaling = Linear | Llama3 | Yarn
_TYPES: dict[str, type[RopeScaling]] = {"linear": Linear, "llama3": Llama3, "yarn": Yarn}
# Keys besides a type's own: those that say how YaRN's attention_factor is computed, and a mark.
_OTHER_KEYS = {"yarn": ("mscale", "mscale_all_dim", "finetuned")}
_RANGES: dict[str, tuple[float, float]] = {
    "factor": (1, 2**16),
    "original_max_position_embeddings": (1, MAX_POSITIONS),
    "attention_factor": (0.001, 1000),
}


def inverse_frequencies(theta: float, dim: int, scaling: RopeScaling | None = None) -> list[float]:
    """Radians per position of each of dim / 2 pairs: theta^(-2i / dim), scaled."""
    inv_freq = [theta ** (-2 * i / dim) for i in range(dim // 2)]
    return inv_freq if scaling is None else scaling.scale(inv_freq, theta)


def parse_rope_scaling(data: Mapping[str, Any], context: int, where: str) -> RopeScaling | None:
    """The scaling that a `rope_parameters` or `rope_scaling` object describes; None for `default`.

    context: the model's max_position_embeddings, which original_max_position_embeddings defaults to
    where: what comes before a key in messages

    `rope_theta` must have been taken out. Raises InputError for a type that is not implemented, an
    unknown key and a value of another type or out of range.
    """
    kind = _rope_type(data, where)
    fixed = {"type", "rope_type", "partial_rotary_factor"}
    given = {k: v for k, v in data.items() if v is not None and k not in fixed}
    cls = _TYPES.get(kind)
    known = {item.name: item.type for item in fields(cls) if item.init} if cls else {}
    for key in given:
        if key not in known and key not in _OTHER_KEYS.get(kind, ()):
            raise InputError(
                f"{where}{key} {shown(given[key])} is not implemented for rope_type {kind}"
            )
    if cls is None:
        return None
    if "original_max_position_embeddings" in known:
        given.setdefault("original_max_position_embeddings", context)
    if cls is Yarn:
        _set_attention_factor(given, where)
    needed = [key for key in ("factor", "low_freq_factor", "high_freq_factor") if key in known]
    if missing := [where + key for key in needed if key not in given]:
        raise InputError(f"missing key {', '.join(missing)}")
    for key, value in given.items():
        _check(f"{where}{key}", value, known[key], *_RANGES.get(key, (0.001, 1_000_000)))
    values: dict[str, Any] = {k: float(v) if known[k] is float else v for k, v in given.items()}
    scaling = cls(**values)
    for low, high in (("beta_slow", "beta_fast"), ("low_freq_factor", "high_freq_factor")):
        if low in known and not getattr(scaling, low) < getattr(scaling, high):
            raise InputError(
                f"{where}{low} is {getattr(scaling, low):g}; it must be below {high},"
                f" {getattr(scaling, high):g}"
            )
    return scaling


def context_of(scaling: RopeScaling | None, context: int, where: str) -> int:
    """Positions of a model whose max_position_embeddings are `context`: with YaRN at least factor
    times the original length, since model cards add `rope_scaling` to a config.json and leave
    max_position_embeddings as it was. Raises InputError beyond MAX_POSITIONS."""
    if not isinstance(scaling, Yarn):
        return context
    return max(context, scaled_length(scaling, scaling.original_max_position_embeddings, where))


def scaled_length(scaling: RopeScaling, length: int, where: str) -> int:
    """factor times `length`. Raises InputError beyond MAX_POSITIONS."""
    scaled = math.floor(scaling.factor * length)
    if scaled > MAX_POSITIONS:
        raise InputError(
            f"{where}factor {scaling.factor:g} makes {scaled:,} positions; at most"
            f" {MAX_POSITIONS:,} are possible"
        )
    return scaled


def _rope_type(data: Mapping[str, Any], where: str) -> str:
    """The type, under its old or its new name; `default` if there is none."""
    old, kind = data.get("type"), data.get("rope_type")
    if old is not None and kind is not None and old != kind:
        raise InputError(f"{where}type is {shown(old)}, but rope_type is {shown(kind)}")
    kind = old if kind is None else kind
    kind = "default" if kind is None else kind
    if not isinstance(kind, str) or kind not in ("default", *_TYPES):
        raise InputError(
            f"{where}rope_type {shown(kind)} is not implemented; default, {', '.join(_TYPES)} are"
        )
    part = data.get("partial_rotary_factor")
    if part not in (None, 1):
        raise InputError(f"{where}partial_rotary_factor {shown(part)} is not implemented")
    return kind


def _set_attention_factor(given: dict[str, Any], where: str) -> None:
    """Put YaRN's attention_factor into `given`: the given one, or the one that mscale and
    mscale_all_dim (DeepSeek's) or the factor alone imply."""
    given.pop("finetuned", None)
    scales = [given.pop(key, 0) for key in ("mscale", "mscale_all_dim")]
    for key, value in zip(("mscale", "mscale_all_dim"), scales, strict=True):
        if value != 0:
            _check(f"{where}{key}", value, float, 0.001, 1000)
    factor = given.get("factor", 1)
    if "attention_factor" not in given and type(factor) in (int, float) and 1 <= factor < math.inf:
        above, below = (1 + 0.1 * scale * math.log(factor) for scale in scales)
        given["attention_factor"] = above / below if all(scales) else 1 + 0.1 * math.log(factor)


def _check(key: str, value: object, kind: object, least: float, most: float) -> None:
    if kind is bool:
        if type(value) is not bool:
            raise InputError(f"{key} is {shown(value)}; it must be true or false")
    elif type(value) not in (int, kind) or not least <= value <= most:  # type: ignore[operator]
        name = "an integer" if kind is int else "a number"
        raise InputError(f"{key} is {shown(value)}; it must be {name} from {least:,} to {most:,}")


def _clamped(x: float) -> float:
    return min(max(x, 0.0), 1.0)


def _mixed(inv_freq: list[float], factor: float, kept: Iterable[float]) -> list[float]:
    """Each frequency between itself / factor (kept 0) and itself (kept 1)."""
    return [f * (1 - k) / factor + f * k for f, k in zip(inv_freq, kept, strict=True)]
