"""The container format GGUF: metadata and tensors of a file, without their meaning.

The package gguf has a reader, but that one loops for as many items as a file claims to have, and
takes 3 s for SmolLM2's metadata; this takes 0.1 s (docs/log.md), and never reads beyond the end.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from model.errors import InputError, shown
from model.text.files import check_regular

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGMLQuantizationType

# The struct format of each type of number, by GGUF's code of the type.
_NUMBERS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)
_MAX_DIMENSIONS = 4
# The largest known tokenizers need 40 MiB. A sparse file could claim more than memory can hold.
_MAX_HEADER = 64 << 20


class RawTensor(NamedTuple):
    """A tensor as it is stored: its bytes [..., bytes per row] and the shape they encode."""

    shape: tuple[int, ...]
    type: "GGMLQuantizationType"
    data: "np.ndarray"


class GGUFFile(NamedTuple):
    """Metadata as Python numbers, strings and lists; tensors by name, in the file's order."""

    metadata: dict[str, Any]
    tensors: dict[str, RawTensor]


def read_gguf_file(path: Path) -> GGUFFile:
    """Read the metadata of a file and map its tensors, which are checked to lie within it.

    Raises InputError for a file that cannot be read, is damaged, or is not a little-endian GGUF
    file of version 2 or 3.
    """
    data = _map(path)
    if bytes(data[:4]) != b"GGUF":
        raise InputError(f"{path} is not a GGUF file: it does not begin with the bytes GGUF")
    try:
        header = _Header(data[:_MAX_HEADER].data)
        _check_version(header)
        tensor_count, key_count = header.number("Q"), header.number("Q")
        metadata = _read_metadata(header, key_count)
        return GGUFFile(metadata, _read_tensors(header, tensor_count, metadata, data))
    except InputError as error:
        raise InputError(f"cannot read {path} as GGUF: {error}") from None


def _map(path: Path) -> "np.ndarray":
    """The bytes of a file, which are read when they are used."""
    import numpy as np

    check_regular(path)
    try:  # an empty file cannot be mapped
        return np.memmap(path, np.uint8, "r") if path.stat().st_size else np.empty(0, np.uint8)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None


class _Header:
    """Reads one value after another, up to the end of `data` at most."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self.position = 0

    def take(self, size: int) -> memoryview:
        start, self.position = self.position, self.position + size
        if self.position > len(self._data):
            raise InputError(f"its header does not end within the first {len(self._data)} bytes")
        return self._data[start : self.position]

    def numbers(self, format: str, count: int) -> tuple:
        data = self.take(count * struct.calcsize("<" + format))
        return struct.unpack(f"<{count}{format}", data)

    def number(self, format: str) -> Any:  # noqa: ANN401
        return self.numbers(format, 1)[0]

    def string(self) -> str:
        try:
            return str(self.take(self.number("Q")), "utf-8")
        except UnicodeDecodeError:
            raise InputError("a string is not UTF-8") from None

    def name(self) -> str:
        """A string that can be shown on a terminal."""
        name = self.string()
        if not name.isprintable() or len(name) > 200:
            raise InputError(f"the name {shown(name)} is too long or not printable")
        return name

    def value(self, kind: int) -> Any:  # noqa: ANN401
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise InputError(f"unknown type {kind}")
        kind, count = self.number("I"), self.number("Q")
        if kind in _NUMBERS:
            return list(self.numbers(_NUMBERS[kind], count))
        if kind == _STRING:
            return [self.string() for _ in range(count)]  # each takes 8 bytes or more
        raise InputError(f"arrays of type {kind} are not implemented")


def _check_version(header: _Header) -> None:
    header.take(4)
    version = header.number("I")
    if version not in _VERSIONS and not version & 0xFFFF:
        raise InputError("it is big-endian; only little-endian files are implemented")
    if version not in _VERSIONS:
        raise InputError(f"its version is {version}; only 2 and 3 are implemented")


def _read_metadata(header: _Header, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for _ in range(count):  # each takes 13 bytes or more
        key = header.name()
        if key in metadata:
            raise InputError(f"the key {key} occurs twice")
        try:
            metadata[key] = header.value(header.number("I"))
        except InputError as error:
            raise InputError(f"{key}: {error}") from None
    return metadata


def _read_tensors(
    header: _Header, count: int, metadata: dict[str, Any], data: "np.ndarray"
) -> dict[str, RawTensor]:
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise InputError(f"general.alignment is {shown(alignment)}; it must be a power of two")
    described = {}
    for _ in range(count):  # each takes 32 bytes or more
        name = header.name()
        if name in described:
            raise InputError(f"the tensor {name} occurs twice")
        try:
            described[name] = _read_description(header)
        except InputError as error:
            raise InputError(f"tensor {name}: {error}") from None
    start, expected, tensors = _align(header.position, alignment), 0, {}
    for name, (shape, kind, stored, offset) in described.items():
        if offset != expected:  # as in llama.cpp: tensors follow each other without gaps
            raise InputError(f"tensor {name} has the offset {offset} instead of {expected}")
        first, size = start + offset, math.prod(stored)
        if first + size > len(data):
            raise InputError(f"tensor {name} continues beyond the end of the file")
        tensors[name] = RawTensor(shape, kind, data[first : first + size].reshape(stored))
        expected = _align(offset + size, alignment)
    return tensors


def _read_description(
    header: _Header,
) -> tuple[tuple[int, ...], "GGMLQuantizationType", tuple[int, ...], int]:
    """A tensor's shape, type, stored shape in bytes [..., bytes per row], and offset."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    dimensions = header.number("I")
    if not 1 <= dimensions <= _MAX_DIMENSIONS:
        raise InputError(f"it has {dimensions} dimensions; 1 to {_MAX_DIMENSIONS} are possible")
    shape = header.numbers("Q", dimensions)[::-1]  # the file's first is last
    if not all(0 < size < 2**40 for size in shape):
        raise InputError(f"its shape is {list(shape)}; sizes must be from 1 to 2^40")
    code, offset = header.number("I"), header.number("Q")
    try:
        kind = GGMLQuantizationType(code)
    except ValueError:
        raise InputError(f"its type {code} is unknown") from None
    values, size = GGML_QUANT_SIZES[kind]  # of one block
    if shape[-1] % values:
        raise InputError(f"its rows of {shape[-1]} values are not blocks of {values} ({kind.name})")
    return shape, kind, (*shape[:-1], shape[-1] // values * size), offset


def _align(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment
