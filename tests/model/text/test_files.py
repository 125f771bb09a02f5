"""Tests of a checkpoint's JSON files: only regular files are opened, and any content gets one line.

Arbitrary values at every key of the three files are tested here too, since the promise is the same:
a Config, or an InputError that begins with the file's name.
"""

import copy
import json
import os
from dataclasses import asdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.config import TINY, Config, DecoderConfig, TokenIds
from model.errors import InputError
from model.text.files import check_regular, read_json
from model.weights.checkpoint import INDEX, find_tensors, save_checkpoint
from model.weights.hf_config import read_config, write_config


def refusal(file):
    """The message for `file`, having checked that it is one line and names the file."""
    with pytest.raises(InputError) as error:
        read_json(file)
    assert str(error.value).startswith(str(file))
    assert str(error.value).isprintable()
    return str(error.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is not valid JSON: Expecting value"),
        (b"[1]", "must hold a JSON object"),
        (b'{"a": "\xff"}', "is not UTF-8 text"),
        ('{"a": 1}'.encode("utf-16"), "is not UTF-8 text"),
        (b'{"a": ' * 100_000, "is nested too deeply"),
        (b'{"a": ' + b"1" * 5000 + b"}", "is not valid JSON: Exceeds the limit"),
        (b'{"a\n\x1b[31m": ', "is not valid JSON"),
    ],
)
def test_damaged_content(content, words, tmp_path):
    """Guards against a traceback (RecursionError, UnicodeDecodeError) and a second line."""
    file = tmp_path / "a.json"
    file.write_bytes(content)
    assert words in refusal(file)


def test_a_byte_order_mark_is_harmless(tmp_path):
    """Guards against refusing a file that an editor on Windows saved."""
    (tmp_path / "a.json").write_text('{"a": 1}', encoding="utf-8-sig")
    assert read_json(tmp_path / "a.json") == {"a": 1}


def test_only_regular_files_are_opened(tmp_path):
    """Guards against waiting for ever on a FIFO, and tracebacks for the others; links are fine,
    since Hugging Face's cache consists of them."""
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "link").symlink_to("a.json")
    assert "is a directory; it must be a file" in refusal(tmp_path / "folder")
    assert "is a pipe, socket or device; it must be a file" in refusal(tmp_path / "fifo")
    assert "Too many levels of symbolic links" in refusal(tmp_path / "loop")
    assert "No such file" in refusal(tmp_path / "gone")
    with pytest.raises(InputError, match=r"a\\x00b cannot be read: embedded null byte"):
        check_regular(tmp_path / "a\0b")
    assert read_json(tmp_path / "link") == {}


def test_size_is_limited(tmp_path):
    """Guards against reading gigabytes of weights as JSON."""
    with (tmp_path / "a.json").open("wb") as file:
        file.truncate(2**26 + 1)
    assert "is larger than 64 MiB" in refusal(tmp_path / "a.json")


SMALL = Config("small", DecoderConfig(96, 32, 2, 4, 2, 16, 48), tokens=TokenIds((7,)))
GENERATION = {"eos_token_id": [7], "temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.1}
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 200)
    | st.sampled_from([2**31, 2**62, 10**30, 10**400, -(10**400)])
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["full_attention", "llama", "../x", "/etc/passwd", "a\0b", "b" * 5000]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=4,
)


def key_paths(data, path=()):
    """The path of every key in nested objects, and of the whole."""
    yield path
    for key, value in data.items() if isinstance(data, dict) else ():
        yield from key_paths(value, (*path, key))


def changed(data, path, value):
    """A copy of `data` with `value` at `path`."""
    data = copy.deepcopy({"": data})
    parent = data
    for key in ("", *path)[:-1]:
        parent = parent[key]
    parent[("", *path)[-1]] = value
    return data[""]


def mutations(valid):
    return st.builds(changed, st.just(valid), st.sampled_from(list(key_paths(valid))), VALUES)


CONFIGS = [write_config(TINY), write_config(SMALL), asdict(TINY)]
CONFIGS += [
    CONFIGS[1] | {"rope_parameters": {"rope_theta": 1e6}, "layer_types": ["full_attention"] * 2}
]


@pytest.mark.filterwarnings("ignore:.*not followed")
@settings(max_examples=400)
@given(st.sampled_from(CONFIGS).flatmap(mutations), mutations(GENERATION))
def test_any_value_at_any_key(tmp_path_factory, config, generation):
    """Guards against a traceback, a hang or a message that names no file, whatever the files
    hold."""
    path = tmp_path_factory.mktemp("model")
    config_file, generation_file = path / "config.json", path / "generation_config.json"
    for content, other in ((config, {}), (CONFIGS[1], generation)):
        config_file.write_text(json.dumps(content))
        generation_file.write_text(json.dumps(other))
        try:
            assert isinstance(read_config(path), Config)
        except InputError as error:
            file = config_file if content is config else generation_file
            assert str(error).startswith(str(file)), error
            assert str(error).isprintable()
            assert len(str(error)) < len(str(file)) + 700


TENSORS = {"a.weight": torch.zeros(2), "b.weight": torch.zeros(3)}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(path, TENSORS, TINY, max_shard_bytes=8)
    return path


@settings(max_examples=200)
@given(data=st.data())
def test_any_value_in_an_index(checkpoint, data):
    """Guards the same for the index, whose values are names of files to open."""
    file = checkpoint / INDEX
    valid = file.read_text()
    file.write_text(json.dumps(data.draw(mutations(json.loads(valid)))))
    try:
        assert find_tensors(checkpoint, TENSORS).keys() == TENSORS.keys()
    except InputError as error:
        assert str(error).startswith(str(checkpoint)), error
        assert str(error).isprintable()
        assert len(str(error)) < len(str(file)) + 700
    finally:
        file.write_text(valid)
