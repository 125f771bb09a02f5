"""What a model is loaded from, a checkpoint directory or a GGUF file, in one form.

Reading it costs little and finds most mistakes; the weights are read when they are asked for.
"""

import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from model.config import Config, unknown_model
from model.errors import InputError

if TYPE_CHECKING:
    from model.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Source:
    """A model on disk.

    config: with the end tokens of all files, the tokenizer's included
    load_tokenizer: returns the tokenizer, which is read once; None if there is none
    weights: takes the model's tensors by published name, which may be meta, compares them with
        those on disk as far as the format allows, and returns an iterator over the latter
    """

    config: Config
    load_tokenizer: "Callable[[], Tokenizer] | None"
    weights: Callable[[dict[str, Tensor]], Iterator[tuple[str, Tensor]]]


def read_source(path: Path) -> Source:
    """The model in the directory or GGUF file `path`.

    The tokenizer is read too, unless the package tokenizers is missing: using it is then an error,
    and the ends that only it names are unknown. Warns of a model without ends. Raises InputError
    for anything missing, damaged or not implemented.
    """
    if not os.path.exists(path):
        raise unknown_model(str(path))
    source = _read_gguf(path) if os.path.isfile(path) else _read_directory(path)
    config = source.config
    if source.load_tokenizer is not None:
        try:
            config = _with_ends(config, source.load_tokenizer(), path)
        except ModuleNotFoundError as error:
            if error.name != "tokenizers":
                raise
    if not config.tokens.eos:
        warnings.warn(
            f"{path} names no token that ends an answer: every rollout runs to its token limit."
            " eos_token_id in config.json or generation_config.json or eos_token in"
            " tokenizer_config.json would name one",
            stacklevel=2,
        )
    return replace(source, config=config)


def source_files(path: Path) -> list[Path]:
    """All files that reading the model in `path` may open, and others of their kinds; sorted."""
    if not os.path.isdir(path):
        return [path]
    patterns = "*.json", "*.jinja", "additional_chat_templates/*.jinja", "*.safetensors"
    files = (file for pattern in patterns for file in path.glob(pattern))
    return sorted(file for file in files if file.is_file())


def _read_directory(path: Path) -> Source:
    from model.weights.checkpoint import find_tensors, read_tensors
    from model.weights.hf_config import read_config

    @cache
    def load_tokenizer() -> "Tokenizer":
        from model.text.tokenizer import Tokenizer

        return Tokenizer.from_directory(path)

    def weights(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        return read_tensors(path, find_tensors(path, tensors))

    has_tokenizer = os.path.lexists(path / "tokenizer.json")
    return Source(read_config(path), load_tokenizer if has_tokenizer else None, weights)


def _read_gguf(path: Path) -> Source:
    from model.weights.gguf import read_gguf

    config, fields, tensors = read_gguf(path)

    @cache
    def load_tokenizer() -> "Tokenizer":
        from model.text.tokenizer import Tokenizer

        return Tokenizer.from_gguf_metadata(fields)

    return Source(config, load_tokenizer, lambda _: tensors)


def _with_ends(config: Config, tokenizer: "Tokenizer", path: Path) -> Config:
    vocab = config.decoder.vocab_size
    if any(id >= vocab for id in tokenizer.eos):
        raise InputError(
            f"{path}: the tokenizer's eos_token has the id {max(tokenizer.eos)}, but the model's"
            f" vocabulary ends at {vocab - 1}"
        )
    return config.with_ends(tokenizer.eos)
