"""The choice of kernel configs: the GPU's table, else the rule, and overrides on top."""

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
    """An H200 with a table of one key; other GPUs have no table."""
    monkeypatch.setattr(configs, "TABLES", tmp_path)
    table = {"copy": {"small": {"block": 512, "num_warps": 2}}}
    (tmp_path / "nvidia-h200.json").write_text(json.dumps(table))
    monkeypatch.setattr(configs, "TUNABLES", {})
    configs.table_of.cache_clear()
    yield
    configs.table_of.cache_clear()


def rule(gpu):
    return {"block": gpu.sms, "num_warps": 4}


def config_of(name: str, key: str) -> dict[str, int]:
    return Tunable(name, rule).choose(key, CPU)


def test_table_comes_before_the_rule(tables):
    """Guards the order: table, rule, and overrides on top of either."""
    assert config_of("copy", "small") == {"block": 512, "num_warps": 2}
    assert config_of("copy", "large") == {"block": H200.sms, "num_warps": 4}
    with (
        use_config("copy", block=64),
        use_config("copy", num_warps=1),
        use_config("other", block=1),
    ):
        assert config_of("copy", "small") == {"block": 64, "num_warps": 1}
    assert config_of("copy", "small") == {"block": 512, "num_warps": 2}  # the table is unchanged


def test_assumed_gpu(tables):
    """Guards compilation ahead of time: another GPU's table must not be used."""
    with assume_gpu(A100):
        assert gpu_of(torch.device("cuda", 0)) == gpu_of(CPU) == A100
        assert config_of("copy", "small") == {"block": A100.sms, "num_warps": 4}
    assert gpu_of(CPU) == H200


def test_record_configs(tables):
    """Guards tuning: exactly the keys that ops look up inside the block, with their configs."""
    config_of("copy", "before")
    with record_configs() as recorded:
        config_of("copy", "small")
        with use_config("merge", block=8):
            config_of("merge", "any")
    config_of("copy", "after")
    assert recorded == {
        ("copy", "small"): {"block": 512, "num_warps": 2},
        ("merge", "any"): {"block": 8, "num_warps": 4},
    }
