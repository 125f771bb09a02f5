"""Shapes and constants of the model: frozen dataclasses and the named presets."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from model.errors import InputError, shown
from model.rope import (
    RopeScaling,
    Yarn,
    context_of,
    inverse_frequencies,
    parse_rope_scaling,
    scaled_length,
)


@dataclass(frozen=True)
class VisionConfig:
    """PE-lang vision tower and the projector's two stride-2 convolutions."""

    width: int = 1536
    layers: int = 47
    heads: int = 16
    mlp_width: int = 8960
    patch_size: int = 14
    image_size: int = 728  # side of the global view, and of the position embedding's grid
    crop_size: int = 504  # side to which every crop is resized
    max_image_size: int = 3024  # longer sides are shrunk to this before cropping
    uncropped_side: int = 728  # images no longer than this are cropped only if elongated
    crop_window: int = 504  # side of the squares that are cut out, before they are resized
    norm_eps: float = 1e-5
    layer_scale: float = 0.1  # initial value of LayerScale's gamma
    rope_theta: float = 10000.0

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def grid(self) -> int:
        """Patches along a side of the global view, the most that any view may have."""
        return self.image_size // self.patch_size

    @property
    def image_tokens(self) -> int:
        """Decoder tokens of a global view."""
        return tokens_after_projector(self.image_size // self.patch_size)

    @property
    def crop_tokens(self) -> int:
        """Decoder tokens of a crop."""
        return tokens_after_projector(self.crop_size // self.patch_size)


@dataclass(frozen=True)
class DecoderConfig:
    """Qwen3 (qk_norm) or Llama decoder with grouped-query attention."""

    vocab_size: int = 151936
    hidden: int = 4096
    layers: int = 36
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    mlp_width: int = 12288
    norm_eps: float = 1e-6
    rope_theta: float = 1e6
    max_positions: int = 65536
    qk_norm: bool = True
    tied_embeddings: bool = False
    rope_scaling: RopeScaling | None = None

    @property
    def inverse_frequencies(self) -> list[float]:
        """Radians per position of each pair of a head's elements, in fp64."""
        return inverse_frequencies(self.rope_theta, self.head_dim, self.rope_scaling)

    @property
    def attention_scale(self) -> float:
        """Factor of q . k before the softmax.

        It includes YaRN's attention factor squared. transformers multiplies cos and sin by the
        factor, hence q and k: the same product, since all of a head is rotated.
        """
        scaling = self.rope_scaling
        factor = scaling.attention_factor if isinstance(scaling, Yarn) else 1.0
        return self.head_dim**-0.5 * factor**2

    def kv_bytes_per_token(self, bytes_per_value: int = 2) -> int:
        """Bytes of K and V that one token occupies over all layers (2 bytes per value for bf16)."""
        return self.layers * 2 * self.kv_heads * self.head_dim * bytes_per_value


@dataclass(frozen=True)
class TokenIds:
    """Ids of the tokens that the code treats specially. Any id of `eos` ends a generation."""

    eos: tuple[int, ...] = (151643, 151645, 151679)
    im_patch: int = 151679
    im_start: int = 151680
    im_end: int = 151681
    patch_start: int = 151689
    patch_end: int = 151690
    patch_newline: int = 151691


@dataclass(frozen=True)
class SamplingConfig:
    """Sampling settings from the model's card; top_p 1 and top_k 0 keep all tokens."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


@dataclass(frozen=True)
class Config:
    """A whole model; `vision` is None for a text-only one."""

    name: str
    decoder: DecoderConfig
    vision: VisionConfig | None = None
    tokens: TokenIds = TokenIds()
    sampling: SamplingConfig = SamplingConfig()

    @staticmethod
    def from_dict(data: dict) -> "Config":
        """The inverse of `dataclasses.asdict`. Raises InputError for unknown and missing keys."""
        top = _checked(Config, data, "config")
        parts = {
            name: None if top.get(name) is None else cls(**_checked(cls, top[name], name))
            for name, cls in _PARTS.items()
        }
        decoder = parts["decoder"]
        if decoder is None:
            raise InputError("decoder is null; it must be an object")
        if decoder.rope_scaling is not None and type(decoder.max_positions) is int:
            parts["decoder"] = _with_parsed_scaling(decoder, decoder.rope_scaling)
        return Config(top["name"], **{k: v for k, v in parts.items() if v is not None})

    def with_rope_scaling(self, data: Mapping[str, Any]) -> "Config":
        """This config with the scaling that `data` describes, as `rope_parameters` do, and the
        context that it makes possible: factor x original_max_position_embeddings, by default
        factor x the present context; never less than that.

        Raises InputError for a model with a scaling of its own, for another `rope_theta`, and for
        what `parse_rope_scaling` refuses.
        """
        decoder, where = self.decoder, "rope_scaling."
        if (old := decoder.rope_scaling) is not None:
            raise InputError(
                f"{self.name} has rope scaling already ({old.rope_type}, factor {old.factor:g});"
                " change its config.json instead"
            )
        data = {key: value for key, value in data.items() if value is not None}
        theta = data.pop("rope_theta", decoder.rope_theta)
        if theta != decoder.rope_theta:
            raise InputError(
                f"{where}rope_theta is {shown(theta)}, but {self.name} has {decoder.rope_theta:g}"
            )
        kind = data.get("rope_type", data.get("type"))
        scaling = parse_rope_scaling(data, decoder.max_positions, where) if kind else None
        if scaling is None:
            raise InputError(
                f"{where}rope_type is {shown(kind)}; it must be linear, llama3 or yarn"
            )
        trained = getattr(scaling, "original_max_position_embeddings", decoder.max_positions)
        context = max(decoder.max_positions, scaled_length(scaling, trained, where))
        decoder = replace(decoder, rope_scaling=scaling, max_positions=context)
        return replace(self, decoder=decoder)

    def with_ends(self, ids: Iterable[int]) -> "Config":
        """This config with `ids` as further end tokens."""
        eos = tuple(dict.fromkeys((*self.tokens.eos, *ids)))
        return replace(self, tokens=replace(self.tokens, eos=eos))


_PARTS: dict[str, type] = {
    "decoder": DecoderConfig,
    "vision": VisionConfig,
    "tokens": TokenIds,
    "sampling": SamplingConfig,
}


def _with_parsed_scaling(decoder: DecoderConfig, data: object) -> DecoderConfig:
    """`decoder` with the scaling that its JSON, `data`, describes."""
    where = "decoder.rope_scaling"
    if not isinstance(data, Mapping):
        raise InputError(f"{where} is {shown(data)}; it must be an object")
    scaling = parse_rope_scaling(data, decoder.max_positions, f"{where}.")
    context = context_of(scaling, decoder.max_positions, f"{where}.")
    return replace(decoder, rope_scaling=scaling, max_positions=context)


def tokens_after_projector(grid: int) -> int:
    """Tokens of a grid x grid view after two 3x3 convolutions with stride 2, padding 1."""
    side = (grid + 1) // 2
    side = (side + 1) // 2
    return side * side


def check_keys(where: str, data: Iterable[str], known: set[str]) -> None:
    """Raise InputError, which begins with `where`, for a key in `data` that is not `known`."""
    unknown = sorted(set(data) - known)
    if unknown:
        raise InputError(
            f"{where}: unknown key {', '.join(unknown):.80}; the keys are"
            f" {', '.join(sorted(known))}"
        )


def _checked(cls: type, data: object, where: str) -> dict:
    """`data` as arguments of the dataclass `cls`; `eos`, a list in JSON, becomes a tuple."""
    if not isinstance(data, dict):
        raise InputError(f"{where} is {shown(data)}; it must be an object")
    known = {field.name for field in fields(cls)}
    check_keys(where, data, known)
    required = {"name", "decoder"} & known
    missing = sorted(required - set(data))
    if missing:
        raise InputError(f"{where}: missing key {', '.join(missing)}")
    return {k: tuple(v) if k == "eos" and isinstance(v, list) else v for k, v in data.items()}


# The same structure at a size that runs in seconds on a CPU: head_dim 96 in the tower, 4 query
# heads per KV head in the decoder, images cropped as in the 10B but resized to fewer patches. Token
# ids follow the 256 bytes of its byte-level vocabulary.
TINY = Config(
    name="tiny",
    decoder=DecoderConfig(
        vocab_size=512,
        hidden=256,
        layers=2,
        heads=8,
        kv_heads=2,
        head_dim=64,
        mlp_width=512,
        max_positions=8192,
    ),
    vision=VisionConfig(width=192, layers=2, heads=2, mlp_width=448, image_size=168, crop_size=112),
    tokens=TokenIds(
        eos=(256, 258, 259),
        im_patch=259,
        im_start=260,
        im_end=261,
        patch_start=262,
        patch_end=263,
        patch_newline=264,
    ),
)

STEP3_VL_10B = Config(name="step3-vl-10b", decoder=DecoderConfig(), vision=VisionConfig())

SMOLLM2_135M = Config(
    name="smollm2-135m",
    decoder=DecoderConfig(
        vocab_size=49152,
        hidden=576,
        layers=30,
        heads=9,
        kv_heads=3,
        head_dim=64,
        mlp_width=1536,
        norm_eps=1e-5,
        rope_theta=1e5,
        max_positions=8192,
        qk_norm=False,
        tied_embeddings=True,
    ),
    tokens=replace(TokenIds(), eos=(2,)),
    sampling=SamplingConfig(temperature=0.2, top_p=0.9),
)

PRESETS = {config.name: config for config in (STEP3_VL_10B, TINY, SMOLLM2_135M)}


def unknown_model(name: str) -> InputError:
    """The error for what is neither a preset nor a model's files."""
    return InputError(
        f"{shown(name)} is neither a preset ({', '.join(PRESETS)}) nor a checkpoint directory or"
        " GGUF file"
    )


def preset(name: str) -> Config:
    """The preset called `name`. Raises InputError, with all names, if there is none."""
    if name not in PRESETS:
        raise InputError(f"unknown preset {name!r}; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
