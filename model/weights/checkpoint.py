"""Checkpoint directories: safetensors shards with published names, their index, and config.json.

The model provides a dict of published name -> tensor (`Step3VL.checkpoint_tensors`). Loading copies
into those tensors, saving writes them. Both are strict: no weight is renamed, guessed or skipped.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.config import Config
from model.errors import InputError, shown
from model.terminal import track
from model.text.files import check_regular, check_target, read_json
from model.weights.hf_config import write_config

INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_FILE_NAME = re.compile(r"[^/\\\0]{1,200}\.safetensors")
# Old checkpoints hold tables of the rotation, which follow from config.json: transformers passes
# over the first, vLLM over all three.
_IGNORED = re.compile(r"(^|\.)rotary_emb\.(inv_freq|cos_cached|sin_cached)$")
_DTYPES = ("F64", "F32", "F16", "BF16")
_LM_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def find_tensors(path: Path, tensors: dict[str, Tensor]) -> dict[str, str]:
    """The file that holds each of `tensors` (published name -> tensor, which may be meta).

    Names, shapes and dtypes are compared; no values are read, except to see that a copy of tied
    embeddings is one: a model with them (`tensors` without lm_head.weight) accepts a checkpoint
    with or without a copy. Tables of the rotation, which old checkpoints hold, are left out.
    Raises InputError for unreadable shards and for missing, unexpected or misshapen tensors.
    """
    index = _read_index(path)
    shapes: dict[str, tuple[int, ...]] = {}
    located: dict[str, str] = {}  # name -> file
    for file in _shards(path, index):
        for name, (shape, dtype) in _header(file).items():
            if name in located:
                raise InputError(
                    f"{_name(name)} is in both {located[name]} and {file.name} of {path};"
                    " it must be in one shard"
                )
            if dtype not in _DTYPES:
                kinds = ", ".join(_DTYPES)
                raise InputError(
                    f"{file}: {_name(name)} has dtype {dtype}; it must be one of {kinds}"
                )
            shapes[name], located[name] = shape, file.name
    if index is not None:
        _compare_with_index(path, located, index)
    tied = _LM_HEAD in shapes and _LM_HEAD not in tensors and _EMBEDDING in shapes
    if tied:
        _check_tied(path / located[_EMBEDDING], path / located[_LM_HEAD])
        del shapes[_LM_HEAD]
    _compare(shapes, tensors, path)
    return {name: located[name] for name in shapes}


def read_tensors(path: Path, located: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
    """The tensors that `located` names (name -> file), in the order of the files, which are
    memory-mapped."""
    for file in sorted(set(located.values())):
        with _open(path / file) as shard:
            for name in shard.offset_keys():
                if name in located:
                    yield name, shard.get_tensor(name)


@torch.no_grad()
def copy_tensors(
    named: Iterable[tuple[str, Tensor]],
    tensors: dict[str, Tensor],
    source: Path | str = "the checkpoint",
) -> None:
    """Copy `named` tensors into their namesakes in `tensors`; no name of `tensors` may be missing.

    Raises InputError, with the name `source`, for missing, unexpected or misshapen tensors.
    """
    shapes = {}
    for name, value in track(named, "loading weights", total=len(tensors)):
        shapes[name] = tuple(value.shape)
        if name in tensors and tensors[name].shape == value.shape:
            tensors[name].copy_(value)
    _compare(shapes, tensors, source)


def save_checkpoint(
    path: Path, tensors: dict[str, Tensor], config: Config, *, max_shard_bytes: int = 5 * 10**9
) -> None:
    """Write `tensors` as safetensors shards of at most `max_shard_bytes` with index and config.

    `path` is created if necessary, and must not hold a checkpoint. Shards are written under
    temporary names and config.json last, so an interrupted save is not taken for a checkpoint.
    Raises InputError if `path` cannot be written.
    """
    shards = _plan_shards(tensors, max_shard_bytes)
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    weight_map = {key: file for file, keys in zip(names, shards, strict=True) for key in keys}
    index = {"metadata": {"total_size": _num_bytes(tensors.values())}, "weight_map": weight_map}
    try:
        _make_empty(path)
        temporary = [path / f"{file}.tmp" for file in names]
        with _removed_on_exit(temporary):
            for file, keys in track(
                zip(temporary, shards, strict=True), "saving weights", total=len(shards)
            ):
                _write_shard(file, {key: tensors[key] for key in keys})
            for file, name in zip(temporary, names, strict=True):
                file.rename(path / name)
        _write_json(path / INDEX, index)
        _write_json(path / "config.json", write_config(config))
    except InputError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        text = getattr(error, "strerror", None) or error
        raise InputError(f"cannot write checkpoint {path}: {text}") from None


def _shards(path: Path, index: dict[str, str] | None) -> list[Path]:
    """The files that the index lists. Without an index: model.safetensors alone, as in
    transformers, or if there is none, all safetensors files."""
    if not os.path.isdir(path):
        raise InputError(f"there is no checkpoint directory {path}")
    single = path / _SINGLE
    if index is not None:
        names = sorted(set(index.values()))
        # transformers would read this file and not the index, vLLM the index.
        if _SINGLE not in names and os.path.lexists(single):
            raise InputError(
                f"{path} has both {_SINGLE} and {INDEX}, which does not list it: remove one"
            )
        absent = [name for name in names if not os.path.lexists(path / name)]
        if absent:
            raise InputError(f"{path / INDEX} lists {_some(absent)}, which {path} does not contain")
        files = [path / name for name in names]
    else:
        files = [single] if os.path.lexists(single) else sorted(path.glob("*.safetensors"))
    if not files:
        raise InputError(f"there are no safetensors files in {path}")
    for file in files:
        check_regular(file)
    return files


def _read_index(path: Path) -> dict[str, str] | None:
    """The index's map from tensor to file, without the names in _IGNORED; None without an index."""
    file = path / INDEX
    index = read_json(file)
    if index is None:
        return None
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{file} must have an object weight_map: tensor name -> file name")
    for name in weight_map.values():
        # A path could lead out of the directory.
        if not isinstance(name, str) or not _FILE_NAME.fullmatch(name):
            raise InputError(
                f"{file}: weight_map names {shown(name)}; it must be the name of a"
                " .safetensors file in the same directory"
            )
    return {name: file for name, file in weight_map.items() if not _IGNORED.search(name)}


def _compare_with_index(path: Path, located: dict[str, str], index: dict[str, str]) -> None:
    wrong = [name for name, file in index.items() if located.get(name) != file]
    wrong += sorted(located.keys() - index.keys())
    if wrong:
        raise InputError(
            f"{path / INDEX} and the shards disagree about which file holds {_some(wrong)}"
        )


@contextmanager
def _open(file: Path) -> Iterator[Any]:
    # Imported here: a machine that never reads a checkpoint may lack safetensors.
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as shard:
            yield shard
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} is damaged or not a safetensors file: {error}") from None


def _header(file: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    with _open(file) as shard:
        slices = {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118
        return {
            name: (tuple(s.get_shape()), s.get_dtype())
            for name, s in slices.items()
            if not _IGNORED.search(name)
        }


def _check_tied(embedding_file: Path, lm_head_file: Path) -> None:
    with _open(embedding_file) as a, _open(lm_head_file) as b:
        if not torch.equal(a.get_tensor(_EMBEDDING), b.get_tensor(_LM_HEAD)):
            raise InputError(
                f"{lm_head_file}: {_LM_HEAD} differs from {_EMBEDDING}, but config.json ties them:"
                " to keep both, tie_word_embeddings must be false"
            )


def _compare(
    shapes: dict[str, tuple[int, ...]], tensors: dict[str, Tensor], source: Path | str
) -> None:
    """Raise an InputError that lists tensors missing, unexpected or misshapen in `shapes`."""
    misshapen = [
        f"{_name(name)} {list(shape)} instead of {list(tensors[name].shape)}"
        for name, shape in shapes.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    problems = {
        "missing": [name for name in tensors if name not in shapes],
        "unexpected": [name for name in shapes if name not in tensors],
        "misshapen": misshapen,
    }
    errors = [f"{len(v)} {kind}: {_some(v)}" for kind, v in problems.items() if v]
    if errors:
        raise InputError(f"{source} does not fit the model: {'; '.join(errors)}")


def _some(names: list[str], limit: int = 4) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(_name, names[:limit])) + more


def _name(name: str) -> str:
    """A tensor's or file's name for an error message: those of files are of any length."""
    return name if len(name) <= 120 else f"{name[:117]}..."


def _plan_shards(tensors: dict[str, Tensor], max_shard_bytes: int) -> list[list[str]]:
    """Names per shard, in order; a tensor above the limit gets a shard to itself."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        size += _num_bytes([tensor])
        if shards[-1] and size > max_shard_bytes:
            shards.append([])
            size = _num_bytes([tensor])
        shards[-1].append(name)
    return shards


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _make_empty(path: Path) -> None:
    path.mkdir(parents=True, exist_ok=True)
    files = [f.name for f in path.iterdir() if f.name == "config.json" or "safetensors" in f.name]
    if files:
        raise InputError(f"{path} already holds {_some(sorted(files))}; save to another directory")


@contextmanager
def _removed_on_exit(files: list[Path]) -> Iterator[None]:
    try:
        yield
    finally:
        for file in files:
            file.unlink(missing_ok=True)


def _write_shard(file: Path, tensors: dict[str, Tensor]) -> None:
    from safetensors import SafetensorError  # imported here, as in _open
    from safetensors.torch import save_file

    # Channels-last kernels are written in the standard layout, views without their whole storage.
    plain = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    try:
        save_file(plain, file, metadata={"format": "pt"})
    except SafetensorError as error:  # such as a full disk
        raise OSError(str(error)) from None


def _write_json(file: Path, data: dict) -> None:
    temporary = file.with_suffix(".tmp")
    check_target(temporary)
    temporary.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    temporary.rename(file)
