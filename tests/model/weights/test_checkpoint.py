"""Tests of loading and saving checkpoint directories, against transformers and safetensors."""

import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from model.config import TINY, Config, DecoderConfig
from model.errors import InputError
from model.step3vl import Step3VL
from model.weights import checkpoint
from model.weights.checkpoint import (
    INDEX,
    copy_tensors,
    find_tensors,
    read_tensors,
    save_checkpoint,
)
from model.weights.hf_config import read_config
from model.weights.random_init import random_init

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


def load_checkpoint(path, tensors):
    """Copy the checkpoint in directory `path` into `tensors`, as `Step3VL.from_pretrained` does."""
    copy_tensors(read_tensors(path, find_tensors(path, tensors)), tensors, path)


def two_tensors(dtype=torch.float32):
    """A checkpoint's tensors as views of one storage, as the model's fused weights are."""
    fused = torch.arange(30, dtype=torch.float32).to(dtype).view(5, 6)
    return {"a.weight": fused[:3], "b.weight": fused[3:]}


def empty_like(tensors, dtype=torch.float32):
    return {name: torch.full(t.shape, -1.0, dtype=dtype) for name, t in tensors.items()}


def refusal(path, tensors):
    """The message of the InputError from loading `path`, having checked that `tensors` kept their
    values."""
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    with pytest.raises(InputError) as error:
        load_checkpoint(path, tensors)
    assert all(torch.equal(tensors[name], before[name]) for name in tensors)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_round_trip_of_the_model(tmp_path):
    """Guards against a fused slice saved twice or at the wrong offset, a channels-last kernel saved
    in memory order, a shard above the limit, and a wrong total size."""
    model = Step3VL(TINY)
    tensors = model.checkpoint_tensors()
    random_init(tensors, 3)
    save_checkpoint(tmp_path, tensors, TINY, max_shard_bytes=2 * 10**6)

    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 3
    assert shards[0].name == f"model-00001-of-{len(shards):05}.safetensors"
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    for shard in shards:
        loaded = load_file(shard)
        assert sum(t.nbytes for t in loaded.values()) <= 2 * 10**6 or len(loaded) == 1
        for name, value in loaded.items():
            assert index["weight_map"][name] == shard.name
            assert torch.equal(value, tensors[name])

    again = Step3VL.from_pretrained(tmp_path)
    assert again.config == TINY
    tensors = (m.checkpoint_tensors().values() for m in (model, again))
    for ours, theirs in zip(*tensors, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.judge
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_loads_what_transformers_saves(kind, tied, tmp_path):
    """Guards against a name, shape or config key that differs from transformers'."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, **SMALL, tie_word_embeddings=tied, eos_token_id=2)
    theirs = AutoModelForCausalLM.from_config(config)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    ours = Step3VL.from_pretrained(tmp_path).checkpoint_tensors()
    expected = theirs.state_dict()
    if tied:
        del expected["lm_head.weight"]
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in ours)


@pytest.mark.judge
@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_transformers_loads_what_we_save(qk_norm, tied, tmp_path):
    """Guards against a file, index or config that only this project can read."""
    from transformers import AutoModelForCausalLM

    decoder = DecoderConfig(64, 32, 2, 4, 2, 8, 48, 1e-5, 5e4, 128, qk_norm, tied)
    model = Step3VL(Config("small", decoder))
    tensors = model.checkpoint_tensors()
    random_init(tensors, 0)
    save_checkpoint(tmp_path, tensors, model.config, max_shard_bytes=10_000)
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert theirs.config.rope_parameters["rope_theta"] == 5e4
    state = theirs.state_dict()
    assert state.keys() - tensors.keys() == ({"lm_head.weight"} if tied else set())
    assert all(torch.equal(state[name], tensors[name]) for name in tensors)


def test_a_copy_of_tied_embeddings_must_be_one(tmp_path):
    """Guards against a tied model that silently drops a different LM head."""
    embedding = torch.randn(8, 4)
    target = {"model.embed_tokens.weight": torch.zeros(8, 4)}
    save_file({**target, "lm_head.weight": embedding}, tmp_path / "model.safetensors")
    assert "lm_head.weight differs" in refusal(tmp_path, target)
    same = {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding.clone()}
    save_file(same, tmp_path / "model.safetensors")
    load_checkpoint(tmp_path, target)
    assert torch.equal(target["model.embed_tokens.weight"], embedding)


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_converts_between_floating_types(stored, wanted, tmp_path):
    """Guards against bytes read as another dtype."""
    values = {name: t.clone() for name, t in two_tensors(stored).items()}
    save_file(values, tmp_path / "model.safetensors")
    target = empty_like(values, wanted)
    load_checkpoint(tmp_path, target)
    assert all(torch.equal(target[n], values[n].to(wanted)) for n in values)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"a.weight": None}, "1 missing: a.weight"),
        ({"a.weight": torch.zeros(6, 3)}, "1 misshapen: a.weight [6, 3] instead of [3, 6]"),
        ({"x.bias": torch.zeros(2)}, "1 unexpected: x.bias"),
        ({f"x{i}": torch.zeros(1) for i in range(9)}, "9 unexpected: x0, x1, x2, x3 and 5 more"),
        ({"a.weight": torch.zeros(3, 6, dtype=torch.int8)}, "a.weight has dtype I8"),
        ({"b.weight": torch.zeros(2, 6).to(torch.float8_e4m3fn)}, "b.weight has dtype F8_E4M3"),
    ],
)
def test_is_strict(change, words, tmp_path):
    """Guards against weights left uninitialised, dropped, reshaped or misread, and against data
    copied before the check."""
    expected = two_tensors()
    stored = {name: t.clone() for name, t in expected.items()} | change
    save_file({n: t for n, t in stored.items() if t is not None}, tmp_path / "model.safetensors")
    message = refusal(tmp_path, empty_like(expected))
    assert words in message
    assert str(tmp_path) in message


@pytest.mark.parametrize("end", [0, 4, 20, -49, -1])
def test_names_a_truncated_shard(end, tmp_path):
    """Guards against a partial download that loads, or that gives a traceback."""
    save_checkpoint(tmp_path, two_tensors(), TINY, max_shard_bytes=80)
    shard = tmp_path / "model-00002-of-00002.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:end])
    assert str(shard) in refusal(tmp_path, empty_like(two_tensors()))


def test_names_a_corrupt_shard(tmp_path):
    """Guards against a traceback for a header of noise."""
    shard = tmp_path / "model.safetensors"
    shard.write_bytes(bytes(range(256)) * 8)
    assert str(shard) in refusal(tmp_path, empty_like(two_tensors()))


def test_the_index_must_be_right(tmp_path):
    """Guards against a missing shard, a wrong index, and an index file that is none."""
    save_checkpoint(tmp_path, two_tensors(), TINY, max_shard_bytes=80)
    target = empty_like(two_tensors())
    index = json.loads((tmp_path / INDEX).read_text())
    first, second = index["weight_map"].values()
    for weight_map, words in [
        ({"a.weight": first, "b.weight": "gone.safetensors"}, "lists gone.safetensors"),
        (
            {"a.weight": second, "b.weight": first},
            "disagree about which file holds a.weight, b.weight",
        ),
        ({"a.weight": first}, "1 missing: b.weight"),
        ({"a.weight": 1}, "weight_map names 1; it must be the name of a .safetensors file"),
        ({}, "must have an object weight_map"),
        ([], "must have an object weight_map"),
    ]:
        (tmp_path / INDEX).write_text(json.dumps(index | {"weight_map": weight_map}))
        assert words in refusal(tmp_path, target)
    for text in ("{", "[]", "{}"):
        (tmp_path / INDEX).write_text(text)
        assert INDEX in refusal(tmp_path, target)
    (tmp_path / INDEX).unlink()
    load_checkpoint(tmp_path, target)  # without an index, all safetensors files
    assert all(torch.equal(target[n], t) for n, t in two_tensors().items())


def test_a_shard_may_not_hold_more_than_its_index(tmp_path):
    """Guards against loading or skipping a tensor that the index leaves out."""
    save_checkpoint(tmp_path, two_tensors(), TINY)
    file = "model-00001-of-00001.safetensors"
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a.weight": file}}))
    assert "disagree about which file holds b.weight" in refusal(
        tmp_path, empty_like(two_tensors())
    )


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../c/{}", "./{}", "{}\0", ".", "a\x1b[31m.bin", "a" * 5000]
)
def test_an_index_names_files_of_its_directory(name, tmp_path):
    """Guards against opening any file of the machine that a downloaded index names."""
    save_checkpoint(tmp_path / "c", two_tensors(), TINY)
    file = "model-00001-of-00001.safetensors"
    weight_map = dict.fromkeys(two_tensors(), name.format(file))
    (tmp_path / "c" / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    message = refusal(tmp_path / "c", empty_like(two_tensors()))
    assert "it must be the name of a .safetensors file in the same directory" in message
    assert message.isprintable()


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    """Guards against two different copies of a tensor: the last one read would win."""
    tensors = {name: t.clone() for name, t in two_tensors().items()}
    save_file(tensors, tmp_path / "one.safetensors")
    save_file({"a.weight": tensors["a.weight"]}, tmp_path / "other.safetensors")
    message = refusal(tmp_path, empty_like(tensors))
    assert "a.weight is in both one.safetensors and other.safetensors" in message


def test_which_of_several_files(tmp_path):
    """Guards against an adapter's or another format's weights mixed into the model's: as in
    transformers, model.safetensors is the whole model. Where it and an index disagree, transformers
    reads one and vLLM the other."""
    tensors = {name: t.clone() for name, t in two_tensors().items()}
    save_file(tensors, tmp_path / "model.safetensors")
    for other in ("adapter_model.safetensors", "consolidated.safetensors"):
        save_file({"a.weight": tensors["a.weight"] + 1}, tmp_path / other)
    target = empty_like(tensors)
    load_checkpoint(tmp_path, target)
    assert all(torch.equal(target[n], t) for n, t in tensors.items())
    index = {"weight_map": dict.fromkeys(tensors, "consolidated.safetensors")}
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert "which does not list it: remove one" in refusal(tmp_path, empty_like(tensors))


@pytest.mark.parametrize("indexed", [True, False])
def test_tables_of_the_rotation_are_passed_over(indexed, tmp_path):
    """Guards against refusing old checkpoints, which hold them as transformers once did; a weight
    whose name only resembles theirs is still refused."""
    tensors = {name: t.clone() for name, t in two_tensors().items()}
    old = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "model.rotary_emb.inv_freq": torch.ones(4),
    }
    file = "model-1.safetensors"

    def write(held):
        save_file(held, tmp_path / file)
        if indexed:
            (tmp_path / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(held, file)}))

    write(tensors | old)
    target = empty_like(tensors)
    load_checkpoint(tmp_path, target)
    assert all(torch.equal(target[n], t) for n, t in tensors.items())
    write(tensors | {"model.rotary_emb.inv_freq.weight": torch.ones(4)})
    assert "1 unexpected: model.rotary_emb.inv_freq.weight" in refusal(tmp_path, target)


@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to(path.name)])
def test_only_regular_files_are_shards(make, indexed, tmp_path):
    """Guards against waiting for ever on a FIFO, and against a traceback."""
    file = tmp_path / "model-1.safetensors"
    make(file)
    if indexed:
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a.weight": file.name}}))
    assert refusal(tmp_path, empty_like(two_tensors())).startswith(str(file))


def test_names_in_messages_are_printable(tmp_path):
    """Guards against a tensor's name that moves the terminal's cursor or begins a second line."""
    save_file({"\x1b[2J\n" + "x" * 500: torch.ones(1)}, tmp_path / "model.safetensors")
    message = refusal(tmp_path, empty_like(two_tensors()))
    assert r"1 unexpected: \x1b[2J\n" in message
    assert message.isprintable()
    assert len(message) < 400


def test_paths_without_a_checkpoint(tmp_path):
    """Guards against a traceback for a mistyped or empty directory."""
    assert "no checkpoint directory" in refusal(tmp_path / "gone", {})
    assert "no safetensors files" in refusal(tmp_path, {})


def test_an_interrupted_save_is_not_a_checkpoint(tmp_path, monkeypatch):
    """Guards against a full disk that leaves a seemingly complete directory or temporary files."""
    write, calls = checkpoint._write_shard, []

    def fail_on_second(file, tensors):
        write(file, tensors)
        calls.append(file)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_write_shard", fail_on_second)
    with pytest.raises(InputError, match="No space left on device"):
        save_checkpoint(tmp_path / "c", two_tensors(), TINY, max_shard_bytes=80)
    assert len(calls) == 2
    assert list((tmp_path / "c").iterdir()) == []
    with pytest.raises(InputError):
        read_config(tmp_path / "c")


def test_save_does_not_overwrite(tmp_path):
    """Guards against a mixture of two checkpoints, and a traceback if the path is a file or no
    path."""
    save_checkpoint(tmp_path / "c", two_tensors(), TINY)
    with pytest.raises(InputError, match="already holds"):
        save_checkpoint(tmp_path / "c", two_tensors(), TINY)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write checkpoint"):
        save_checkpoint(tmp_path / "file", two_tensors(), TINY)
    with pytest.raises(InputError, match=r"cannot write checkpoint .*a\\x00b: embedded null byte"):
        save_checkpoint(tmp_path / "a\0b", two_tensors(), TINY)


def test_saved_shards_name_their_framework(tmp_path):
    """Guards against shards that transformers refuses because they lack metadata."""
    save_checkpoint(tmp_path, two_tensors(), TINY)
    with safe_open(tmp_path / "model-00001-of-00001.safetensors", framework="pt") as shard:
        assert shard.metadata() == {"format": "pt"}


def test_copy_tensors_is_strict():
    """Guards against an iterator of tensors, such as a GGUF file's, that lacks a tensor or has an
    unexpected one."""
    tensors = two_tensors()
    target = empty_like(tensors)
    copy_tensors(tensors.items(), target)
    assert all(torch.equal(target[n], tensors[n]) for n in tensors)
    for named, words in [
        ([("a.weight", tensors["a.weight"])], "x.gguf does not fit .* 1 missing: b.weight"),
        ([*tensors.items(), ("c", tensors["a.weight"])], "1 unexpected: c"),
        ([("a.weight", tensors["b.weight"]), ("b.weight", tensors["b.weight"])], "1 misshapen"),
    ]:
        with pytest.raises(InputError, match=words):
            copy_tensors(named, empty_like(tensors), "x.gguf")
