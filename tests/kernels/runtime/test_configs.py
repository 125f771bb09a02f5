"""Which tiles an op gets: from the GPU's table, else by the rule, under what a test forces."""

import json

import pytest
import torch

from kernels.runtime import configs
from kernels.runtime.configs import (
    A100,
    H200,
    Tunable,
    assume_gpu,
    gpu_of,
    record_configs,
    use_config,
)

CPU = torch.device("cpu")


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """An H200 with a table of one key; no other GPU has one."""
    monkeypatch.setattr(configs, "TABLES", tmp_path)
    table = {"copy": {"small": {"block": 512, "num_warps": 2}}}
    (tmp_path / "nvidia-h200.json").write_text(json.dumps(table))
    monkeypatch.setattr(configs, "TUNABLES", {})
    configs.table_of.cache_clear()
    yield
    configs.table_of.cache_clear()


def rule(gpu):
    return {"block": gpu.sms, "num_warps": 4}


def tiles(name: str, key: str) -> dict[str, int]:
    return Tunable(name, rule).choose(key, CPU)


def test_table_comes_before_the_rule(tables):
    """Guards the order of choices: table, rule, and overrides on top of either."""
    assert tiles("copy", "small") == {"block": 512, "num_warps": 2}
    assert tiles("copy", "large") == {"block": H200.sms, "num_warps": 4}
    with (
        use_config("copy", block=64),
        use_config("copy", num_warps=1),
        use_config("other", block=1),
    ):
        assert tiles("copy", "small") == {"block": 64, "num_warps": 1}
    assert tiles("copy", "small") == {"block": 512, "num_warps": 2}  # the table is whole


def test_assumed_gpu(tables):
    """Guards compilation ahead of time: another GPU's table must not be taken."""
    with assume_gpu(A100):
        assert gpu_of(torch.device("cuda", 0)) == gpu_of(CPU) == A100
        assert tiles("copy", "small") == {"block": A100.sms, "num_warps": 4}
    assert gpu_of(CPU) == H200


def test_record_tiles(tables):
    """Guards tuning: the keys that an op asked for, with what it got; nothing outside."""
    tiles("copy", "before")
    with record_configs() as asked:
        tiles("copy", "small")
        with use_config("merge", block=8):
            tiles("merge", "any")
    tiles("copy", "after")
    assert asked == {
        ("copy", "small"): {"block": 512, "num_warps": 2},
        ("merge", "any"): {"block": 8, "num_warps": 4},
    }
