"""Tests of the container format GGUF against the package gguf, and with malformed files."""

import os
import struct
from pathlib import Path

import numpy as np
import pytest

from model.errors import InputError
from model.weights import gguf_file
from model.weights.gguf_file import read_gguf_file

gguf = pytest.importorskip("gguf")

U8, U32, STRING, ARRAY, F32 = 0, 4, 8, 9, 0  # F32 is a type of tensors


def string(text: str | bytes) -> bytes:
    text = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(text)) + text


def key(name: str | bytes, kind: int, value: bytes) -> bytes:
    return string(name) + struct.pack("<I", kind) + value


def tensor(name: str, shape: list[int], offset: int, kind: int = F32) -> bytes:
    dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return string(name) + dimensions + struct.pack("<IQ", kind, offset)


def write(
    path: Path,
    keys: list[bytes],
    tensors: tuple[bytes, ...] = (),
    *,
    version: bytes = struct.pack("<I", 3),
    counts: tuple[int, int] | None = None,
    size: int = 64,
) -> Path:
    """A file of these keys and tensors, with `size` bytes of data after the header."""
    counts = counts or (len(tensors), len(keys))
    header = b"GGUF" + version + struct.pack("<QQ", *counts) + b"".join((*keys, *tensors))
    path.write_bytes(header + bytes(-len(header) % 32) + bytes(size))
    return path


def test_equals_the_package_gguf(tmp_path):
    """Guards against a type of number read with another width or sign, reversed shapes, and data
    at another offset."""
    path = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(128)
    values = {"UINT8": 200, "INT8": -100, "UINT16": 60000, "INT16": -30000, "UINT32": 2**32 - 1}
    values |= {"INT32": -(2**31), "UINT64": 2**64 - 1, "INT64": -(2**63)}
    values |= {"FLOAT32": 0.1, "FLOAT64": 0.1, "BOOL": True, "STRING": "é\n"}
    for name, value in values.items():
        kind = gguf.GGUFValueType[name]
        writer.add_key_value(name, value, kind)
        writer.add_key_value(f"{name}s", [value, value], gguf.GGUFValueType.ARRAY, kind)
    noise = np.random.default_rng(0)
    for name, kind in (("x", "F32"), ("y", "F16"), ("z", "Q8_0")):
        kind = gguf.GGMLQuantizationType[kind]
        data = gguf.quantize(noise.standard_normal((3, 2, 32)).astype(np.float32), kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    reader, file = gguf.GGUFReader(path), read_gguf_file(path)
    fields = {k: v.contents() for k, v in reader.fields.items() if not k.startswith("GGUF.")}
    assert file.metadata == fields
    assert len(fields) == 26
    assert list(file.tensors) == [theirs.name for theirs in reader.tensors]
    for theirs in reader.tensors:
        ours = file.tensors[theirs.name]
        assert ours.shape == tuple(theirs.shape.tolist()[::-1]) == (3, 2, 32)
        assert ours.type == theirs.tensor_type
        assert np.array_equal(
            gguf.dequantize(ours.data, ours.type), gguf.dequantize(theirs.data, ours.type)
        )


@pytest.mark.parametrize(
    ("keys", "options"),
    [
        ([key("x", ARRAY, struct.pack("<IQ", U8, 2**40))], {}),
        ([key("x", ARRAY, struct.pack("<IQ", U32, 2**64 - 1))], {}),
        ([key("x", ARRAY, struct.pack("<IQ", STRING, 2**40))], {}),
        ([key("x", STRING, struct.pack("<Q", 2**62))], {}),
        ([struct.pack("<Q", 2**62) + b"x"], {}),
        ([key("x", U8, b"1")], {"counts": (0, 2**64 - 1)}),
        ([], {"counts": (2**64 - 1, 0), "tensors": (tensor("x", [1], 0),)}),
        ([], {"size": 0, "counts": (1, 0)}),
    ],
)
def test_counts_beyond_the_file_are_refused_at_once(keys, options, tmp_path):
    """Guards against a file of 200 bytes that makes the reader loop for ever and fill memory."""
    path = write(tmp_path / "a.gguf", keys, **options)
    with pytest.raises(InputError, match="cannot read .*a.gguf as GGUF"):
        read_gguf_file(path)


def test_headers_have_a_limit(tmp_path, monkeypatch):
    """Guards against a sparse file, whose size bounds nothing."""
    path = write(tmp_path / "a.gguf", [key("x", ARRAY, struct.pack("<IQ", U8, 4000))], size=9000)
    assert len(read_gguf_file(path).metadata["x"]) == 4000
    monkeypatch.setattr(gguf_file, "_MAX_HEADER", 2000)
    with pytest.raises(InputError, match="does not end within the first 2000 bytes"):
        read_gguf_file(path)


@pytest.mark.parametrize(
    ("version", "words"),
    [
        (struct.pack("<I", 1), "version is 1; only 2 and 3"),
        (struct.pack("<I", 4), "version is 4; only 2 and 3"),
        (struct.pack(">I", 3), "big-endian"),
    ],
)
def test_versions(version, words, tmp_path):
    """Guards against misreading version 1, whose counts have 32 bits, or swapped bytes."""
    with pytest.raises(InputError, match=words):
        read_gguf_file(write(tmp_path / "a.gguf", [], version=version))
    older = write(tmp_path / "b.gguf", [key("x", U8, b"\7")], version=struct.pack("<I", 2))
    assert read_gguf_file(older).metadata == {"x": 7}


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ([key("x", U8, b"1"), key("x", U8, b"2")], "the key x occurs twice"),
        ([key("x", STRING, string(b"\xff"))], "x: a string is not UTF-8"),
        ([key(b"\xff", U8, b"1")], "a string is not UTF-8"),
        ([key("\x1b[31mx", U8, b"1")], r"the name '\\x1b\[31mx' is too long or not printable"),
        ([key("x" * 5000, U8, b"1")], "is too long"),
        ([key("x", 13, b"1")], "x: unknown type 13"),
        ([key("x", ARRAY, struct.pack("<IQ", ARRAY, 1))], "x: arrays of type 9 are not"),
        ([key("general.alignment", U32, struct.pack("<I", 0))], "alignment is 0; it must be"),
        ([key("general.alignment", U32, struct.pack("<I", 48))], "alignment is 48; it must"),
        ([key("general.alignment", STRING, string("x"))], "alignment is 'x'; it must be"),
    ],
)
def test_bad_metadata(keys, words, tmp_path):
    """Guards against an error that does not name its key, or that commands the terminal."""
    with pytest.raises(InputError, match=words) as error:
        read_gguf_file(write(tmp_path / "a.gguf", keys))
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ([("x", [4], 0), ("x", [4], 32)], "the tensor x occurs twice"),
        ([("x", [4], 0), ("y", [4], 0)], "tensor y has the offset 0 instead of 32"),
        ([("x", [4], 7)], "tensor x has the offset 7 instead of 0"),
        ([("x", [17], 0)], "tensor x continues beyond the end"),
        ([("x", [2**32, 2**32], 0)], "tensor x continues beyond the end"),
        ([("x", [2**63, 2**63, 2**63, 2**63], 0)], "tensor x: its shape .* from 1 to 2\\^40"),
        ([("x", [0, 2**63], 0)], "tensor x: its shape is .*9223372036854775808, 0"),
        ([("x", [1] * 5, 0)], "tensor x: it has 5 dimensions"),
        ([("x", [], 0)], "tensor x: it has 0 dimensions"),
        ([("x", [4], 0, 99)], "tensor x: its type 99 is unknown"),
        ([("x", [4], 0, 8)], r"tensor x: its rows of 4 values are not blocks of 32 \(Q8_0\)"),
        ([("\x1b", [4], 0)], r"the name '\\x1b' is too long or not printable"),
    ],
)
def test_bad_tensors(tensors, words, tmp_path):
    """Guards against shapes whose product overflows, and data outside the file or shared."""
    path = write(tmp_path / "a.gguf", [], tuple(tensor(*each) for each in tensors))
    with pytest.raises(InputError, match=words):
        read_gguf_file(path)


def test_only_regular_files_are_opened(tmp_path):
    """Guards against waiting for ever for the writer of a FIFO, and tracebacks for others."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("not a model")
    (tmp_path / "short").write_text("GG")
    for name in ("empty", "text", "short"):
        with pytest.raises(InputError, match="is not a GGUF file"):
            read_gguf_file(tmp_path / name)
    (tmp_path / "loop").symlink_to("loop")
    for name in ("fifo", ".", "loop", "nowhere", "a\0b"):
        with pytest.raises(InputError, match="it must be a file|cannot be read"):
            read_gguf_file(tmp_path / name)
