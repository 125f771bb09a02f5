"""`python -m bench cost` of vision ops: work read from the launches, and its way to the SMs."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from bench import __main__ as command
from bench.cost import vision as vision_cost
from kernels.gemm.stream_k import stream_k
from kernels.runtime.configs import H200
from model.errors import InputError
from tests.support import ROOT


def bench_cost(*arguments):
    """Rows of the command, in a process where Triton compiles: in pytest's it interprets."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = [sys.executable, "-m", "bench", "cost", "--json", *arguments]
    done = subprocess.run(run, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])["rows"]


@pytest.mark.cli
def test_rows():
    """Guards what is read from the launches: their programs, their useful and their padded work."""
    photo = "8x 36x36 + 1x 52x52"
    rows = bench_cost("--op", *vision_cost.OPS, "--shape", photo)
    programs = {(row["op"], row["impl"]): row["programs"] for row in rows}
    queries = 8 * 11 + 22  # tiles of 128
    assert programs["vision_attention", "triton"] == [16 * queries]
    assert programs["projector", "triton"] == [132, 132], "two convolutions"
    assert ("linear_quick_gelu", "triton-fused") not in programs, "another name"
    for row in rows:
        assert 1 <= row["balance"] < 1.1
        assert 1 <= row["padding"] < 1.1
        work = row["flops"] * row["balance"] * row["padding"]
        assert row["scheduled_us"] == pytest.approx(work / row["gemm_tflop_s"] / 1e6)


def test_programs_go_where_an_sm_is_free():
    """Guards the balance: greedy in order, not round robin."""
    work = np.array([5, 1, 1, 1, 1, 1, 4])
    assert sorted(vision_cost.assigned(work, 2)) == [5, 9]
    assert vision_cost.assigned(work[:1], 3).tolist() == [5, 0, 0]


def test_work_of_attention():
    """Guards the count against every query and key of a tile written out."""
    tiles = torch.tensor([[0, 0, 35], [16, 0, 35], [32, 0, 35], [35, 35, 43]], dtype=torch.int32)
    args = {"tiles": tiles, "HEADS": 3, "FIRST": 64, "REST": 32}
    args |= {"ROWS": 16, "SHORT": 4, "BLOCK": 8, "TAIL": 4}
    rows, keys = [16, 16, 4, 16], [36, 36, 36, 8]
    expected = [2 * r * k * 96 for r, k in zip(rows, keys, strict=True) for _ in range(3)]
    assert vision_cost._attention(args, {}, H200).tolist() == expected


def test_work_of_a_product():
    """Guards the count: all programs together do every step of every tile once."""
    division = stream_k(9, 12, 54, 132, 16)
    args = {name: getattr(division, name) for name in ("band", "whole", "rest", "lanes", "share")}
    args |= {"C": 200, "TAPS": 9, "BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 32}
    work = vision_cost._gemm(args | {"TAPS": 1, "C": 54 * 32}, {"programs": 1}, H200)
    assert len(work) == 132
    assert work.sum() == 9 * 12 * 54 * 128 * 256 * 32


def test_mistakes(interpreter, monkeypatch):
    """Guards the one-line messages for ops without a model, and for a process in which Triton
    interprets."""
    with pytest.raises(InputError, match="prefix_attention, or any of vision_attention, projector"):
        command.main(["cost", "--op", "sample"])
    with pytest.raises(InputError, match="TRITON_INTERPRET"):
        command.main(["cost", "--op", "vision_attention"])
