"""Arbitrary values at every key of config.json, generation_config.json and the shards' index: each
gives a Config, or an InputError that begins with the file's name."""

import copy
import json
from dataclasses import asdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.config import TINY, Config, DecoderConfig, TokenIds
from model.errors import InputError
from model.weights.checkpoint import INDEX, find_tensors, save_checkpoint
from model.weights.hf_config import read_config, write_config

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
YARN = {"rope_type": "yarn", "factor": 2.0, "mscale": 0.7, "mscale_all_dim": 1.0}
CONFIGS += [write_config(SMALL) | {"rope_scaling": YARN}, asdict(TINY.with_rope_scaling(YARN))]


@pytest.mark.filterwarnings("ignore:.*not followed")
@settings(max_examples=120)
@given(st.sampled_from(CONFIGS).flatmap(mutations), mutations(GENERATION))
def test_any_value_at_any_key(tmp_path_factory, config, generation):
    """Guards against a traceback, a hang or a message that names no file, for any content of
    the files."""
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


@settings(max_examples=100)
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
