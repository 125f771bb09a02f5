"""Tests of `python -m model describe`: the 10B's published tensors, and the command's output."""

import json
import sys
from pathlib import Path

import pytest
import torch

from model.__main__ import main
from model.config import SMOLLM2_135M, STEP3_VL_10B, TINY
from model.describe import describe
from model.process.run import run_command
from model.weights.hf_config import write_config

BLOCK = {
    "attn.in_proj_weight": (4608, 1536),
    "attn.in_proj_bias": (4608,),
    "attn.out_proj.weight": (1536, 1536),
    "attn.out_proj.bias": (1536,),
    "ln_1.weight": (1536,),
    "ln_1.bias": (1536,),
    "ln_2.weight": (1536,),
    "ln_2.bias": (1536,),
    "mlp.c_fc.weight": (8960, 1536),
    "mlp.c_fc.bias": (8960,),
    "mlp.c_proj.weight": (1536, 8960),
    "mlp.c_proj.bias": (1536,),
    "ls_1.gamma": (1536,),
    "ls_2.gamma": (1536,),
}
LAYER = {
    "input_layernorm.weight": (4096,),
    "post_attention_layernorm.weight": (4096,),
    "self_attn.q_proj.weight": (4096, 4096),
    "self_attn.k_proj.weight": (1024, 4096),
    "self_attn.v_proj.weight": (1024, 4096),
    "self_attn.o_proj.weight": (4096, 4096),
    "self_attn.q_norm.weight": (128,),
    "self_attn.k_norm.weight": (128,),
    "mlp.gate_proj.weight": (12288, 4096),
    "mlp.up_proj.weight": (12288, 4096),
    "mlp.down_proj.weight": (4096, 12288),
}
PUBLISHED = {
    "vision_model.conv1.weight": (1536, 3, 14, 14),
    "vision_model.positional_embedding": (2704, 1536),
    "vision_model.ln_pre.weight": (1536,),
    "vision_model.ln_pre.bias": (1536,),
    **{
        f"vision_model.transformer.resblocks.{i}.{name}": shape
        for i in range(47)
        for name, shape in BLOCK.items()
    },
    "vision_model.vit_downsampler1.weight": (3072, 1536, 3, 3),
    "vision_model.vit_downsampler1.bias": (3072,),
    "vision_model.vit_downsampler2.weight": (6144, 3072, 3, 3),
    "vision_model.vit_downsampler2.bias": (6144,),
    "vit_large_projector.weight": (4096, 6144),
    "model.embed_tokens.weight": (151936, 4096),
    **{f"model.layers.{i}.{name}": shape for i in range(36) for name, shape in LAYER.items()},
    "model.norm.weight": (4096,),
    "lm_head.weight": (151936, 4096),
}


def output_of(capsys, *arguments):
    main(["describe", *arguments])
    return capsys.readouterr().out


def test_the_10b_is_the_published_model(capsys):
    """Guards against a missing, extra, misnamed or misshapen tensor in the 10B's checkpoint."""
    size = json.loads(output_of(capsys, "step3-vl-10b", "--json", "--tensors"))
    assert {row["name"]: tuple(row["shape"]) for row in size["table"]} == PUBLISHED
    assert size["tensors"] == len(size["table"]) == 1066
    assert size["parameters"] == 10_171_750_144
    assert size["parts"] == {
        "vision tower": 1_743_503_104,
        "downsamplers": 42_470_400 + 169_875_456,
        "projector": 25_165_824,
        "decoder": 8_190_735_360,
    }
    assert size["weight_bytes"] == sum(row["bytes"] for row in size["table"]) == 20_343_500_288
    assert size["kv_bytes_per_token"] == 147_456


def test_dtype_and_tied_embeddings():
    """Guards against tied embeddings counted twice, and bytes of another dtype."""
    half, full = (describe(SMOLLM2_135M, dtype) for dtype in (torch.bfloat16, torch.float32))
    assert half["parameters"] == full["parameters"] == 134_515_008
    assert half["tensors"] == 272
    assert full["weight_bytes"] == 2 * half["weight_bytes"] == 4 * 134_515_008
    assert full["kv_bytes_per_token"] == 2 * half["kv_bytes_per_token"] == 30 * 2 * 3 * 64 * 4


def test_nothing_is_allocated(monkeypatch):
    """Guards against allocating 40 GB of weights to report their size."""
    allocated, empty = [], torch.empty
    monkeypatch.setattr(
        torch, "empty", lambda *a, **k: allocated.append(empty(*a, **k)) or allocated[-1]
    )
    describe(STEP3_VL_10B, torch.bfloat16)
    assert len(allocated) > 500
    assert {tensor.device.type for tensor in allocated} == {"meta"}


@pytest.mark.parametrize("rich", [True, False])
def test_human_output(rich, capsys, monkeypatch):
    """Guards against a number that differs from the JSON, a truncated name, and a need for rich."""
    if not rich:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    lines = output_of(capsys, "step3-vl-10b", "--tensors").splitlines()
    words = [line.split() for line in lines]
    assert lines[0] == "step3-vl-10b"
    assert ["parameters", "10,171,750,144"] in words
    assert ["weights", "in", "bfloat16", "20.34", "GB"] in words
    assert ["KV", "cache", "per", "token", "in", "bfloat16", "147,456", "B"] in words
    for name, shape in PUBLISHED.items():
        assert [name, "x".join(map(str, shape))] in words


def test_a_directory(capsys, tmp_path):
    """Guards against a need for weights: a directory with config.json alone can be described."""
    (tmp_path / "config.json").write_text(json.dumps(write_config(TINY)))
    assert output_of(capsys, str(tmp_path), "--json") == output_of(capsys, "tiny", "--json")


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (
            "step3",
            "'step3' is neither a preset (step3-vl-10b, tiny, smollm2-135m) nor a checkpoint",
        ),
        (str(Path(__file__).parent), "config.json cannot be read: No such file"),
        ("x" * 5000, "xxx' is neither a preset"),
        ("a\0b", r"'a\x00b' is neither a preset"),
        (__file__, "is not a GGUF file"),
    ],
)
def test_mistakes_get_one_line(model, words, capsys):
    """Guards against a traceback, or exit code 0, for a mistyped model."""
    with pytest.raises(SystemExit) as exit_:
        run_command(lambda: main(["describe", model]))
    error = capsys.readouterr().err
    assert exit_.value.code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert words in error
