"""Programmatic dependent launch: where compiled kernels wait, the launch option, refusals.

Kernels are compiled in a separate process, because pytest's process interprets them.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

from bench.inputs.trees import fork
from bench.suite.prefix_attention import inputs as prefix_attention_inputs
from kernels.compile.cache import compilations
from kernels.compile.launches import Launch, compiler, launches_recorded
from kernels.errors import ImplError
from kernels.norm import layer_norm, rms_norm
from kernels.prefix_attention import prefix_attention
from kernels.runtime.configs import A100, H200, TUNABLES, assume_gpu, use_config
from kernels.runtime.pdl import pdl_options
from profiles.static.analysis import config_of
from profiles.static.sass import sass
from profiles.static.sass_loop import INSTRUCTION
from tests.support import ROOT

CPU = torch.device("cpu")
LOADS = 2  # of 16 bytes, per thread and operand: 4096 columns in bf16 by 8 warps
VECTORS = {"rms_norm_kernel": 1, "layer_norm_kernel": 3}  # weight; weight, bias and gamma
# Loads that each launch may do before it waits: no kernel of a step writes weights, and the
# schedule, from which the merge loads a number, is older than the kernel before the previous one.
EARLY = [
    *((name, LOADS * vectors) for name, vectors in VECTORS.items()),
    *(("prefix_attention_kernel", 0),) * 2,  # `split`: one launch per row-tile size
    ("merge_kernel", 1),
]
PRINT = """
import json
from tests.kernels.runtime.test_pdl import described
print(json.dumps(described()))
"""


def described() -> list[dict]:
    """Launches compiled for sm_90, without and with PDL: both norms with all their arguments, and
    attention in two launches with its merge."""
    forest = (fork(64, [16] * 8),)  # 32 query vectors in the prefix, 4 in a leaf: both tile sizes
    shape = {"heads": 4, "kv_heads": 1, "head_dim": 64}
    attention = prefix_attention_inputs(0, CPU, torch.bfloat16, forest=forest, **shape)
    x = torch.empty(16, 4096, dtype=torch.bfloat16)
    w, rows = x[0], []
    for pdl in (0, 1):
        config = {"pdl": pdl, "num_warps": 8}
        with (
            launches_recorded(H200) as launches,
            use_config("rms_norm", **config),
            use_config("layer_norm", **config),
            use_config("prefix_attention", pdl=pdl, split=1),
        ):
            rms_norm(x, w, eps=1e-6, residual=x, impl="triton")
            layer_norm(x, w, w, eps=1e-6, residual=x, gamma=w, impl="triton")
            prefix_attention(**attention, impl="triton")
        known = [launch for launch in launches if launch.kernel.fn.__name__ in dict(EARLY)]
        rows += [{"pdl": pdl} | _described(launch) for launch in known]
    return rows


def _described(launch: Launch) -> dict:
    with compiler(H200):
        kernel = launch.compile()
    other = {name: value for name, value in launch.kwargs.items() if name != "launch_pdl"}
    plain = Launch(launch.kernel, launch.args, other)
    return {
        "kernel": launch.kernel.fn.__name__,
        "config": config_of(launch).split(),
        "launched": kernel.metadata.launch_pdl,
        "instructions": [match[1] for match in INSTRUCTION.finditer(sass(kernel.asm["cubin"]))],
        "own key": compilations([launch], H200).keys() != compilations([plain], H200).keys(),
    }


@pytest.fixture(scope="module")
def compiled() -> list[dict]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", PRINT]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.cli
def test_kernels_wait_before_they_touch_what_others_write(compiled: list[dict]):
    """Guards the order in machine code: loads of constant data, one wait, the release, then all
    other memory accesses. No store and no loop comes before the wait."""
    for row, (kernel, early) in zip(compiled, EARLY * 2, strict=True):
        assert row["kernel"] == kernel
        names = row["instructions"]
        assert names.count("ACQBULK") == names.count("PREEXIT") == row["pdl"]
        if row["pdl"]:
            wait = names.index("ACQBULK")
            assert wait < names.index("PREEXIT")
            loads = [at for at, name in enumerate(names) if name.startswith(("LDG", "UTMA"))]
            assert sum(at < wait for at in loads) == early
            late = sum(at > wait for at in loads)
            assert late == LOADS * 2 if kernel in VECTORS else late  # x and the residual
            assert not any(name.startswith(("STG", "BRA")) for name in names[:wait])


@pytest.mark.cli
def test_launches_carry_the_option(compiled: list[dict]):
    """Guards the launch: a kernel that waits gains nothing without the launch option. Kernel packs
    and the static baseline must distinguish such kernels, too."""
    for row in compiled:
        assert row["launched"] == row["own key"] == bool(row["pdl"])
        assert f"PDL={row['pdl']}" in row["config"]
        assert ("launch_pdl=True" in row["config"]) == bool(row["pdl"])


def test_older_gpus_refuse():
    """Guards the error on sm_80, which has no such launch: ptxas would fail without naming the
    config value. Kernels that a machine cannot run are not compiled ahead."""
    with assume_gpu(A100):
        assert pdl_options({"pdl": 0}, CPU) == pdl_options({}, CPU) == {"PDL": False}
        with pytest.raises(ImplError, match="pdl=1 needs sm_90 or newer, not sm_80"):
            pdl_options({"pdl": 1}, CPU)
    with assume_gpu(H200):
        assert pdl_options({"pdl": 1}, CPU) == {"PDL": True, "launch_pdl": True}


@pytest.mark.parametrize(
    ("op", "key"),
    [
        ("rms_norm", "T<=16 C4096"),
        ("layer_norm", "T<=16 C4096"),
        ("prefix_attention", "D64 M64+16"),
    ],
)
def test_candidates(op: str, key: str):
    """Guards tuning: both values of `pdl` are measured where both exist, and no config lacks it."""
    candidates = TUNABLES[op].candidates
    assert {config["pdl"] for config in candidates(key, H200)} == {0, 1}
    assert {config["pdl"] for config in candidates(key, A100)} == {0}
