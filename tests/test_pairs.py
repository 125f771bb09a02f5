"""Old and new forms of an op side by side, the linear layers of a step, the cost of a launch."""

import json
import os
import subprocess
import sys

import pytest
import torch

from bench import launch_cost, linears, pairs, timing
from bench.cases import BIG, TINY, numerics_cases
from bench.launch_sites import pair_sites, timed_sites
from bench.numerics import form
from bench.rows import ROOT
from kernels._tiles import A100, H200, record_tiles

CPU, FP32 = torch.device("cpu"), torch.float32
PLANNED = {("prefix_attention", "pdl"), ("prefix_attention", "fp16")}  # no kernel has them yet
LAUNCHED = """
import json
import torch
from bench.launch_sites import launch_case
from bench.pairs import pairs
from bench.tune import asked_tiles
from kernels._compile_worker import launches_of
from kernels._tiles import H200

def launched(case, name):
    site = lambda: launch_case(case, name, torch.bfloat16)
    return [
        {n: v for n, v in launch.kwargs.items() if isinstance(v, (int, str))}
        for launch in launches_of(site, H200)
    ]

found = []
for case, names in pairs("cuda"):
    ((_, tiles),) = asked_tiles(case, torch.bfloat16, H200).items()
    for old, new in zip(names[1::2], names[2::2]):
        switch = old.split()[1].partition("=")[0]
        differ = launched(case, old) != launched(case, new)
        found.append((case.op, case.name, switch, switch in tiles, differ))
print(json.dumps(found))
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "MAX_REPEATS", timing.MIN_REPEATS)


def case_of(op: str, name: str) -> pairs.Case:
    return next(case for case in numerics_cases() if (case.op, case.name) == (op, name))


def test_every_switch_is_one():
    """Guards against a switch whose name no kernel knows, or whose two values launch the same: its
    pair would tell nothing, or be skipped on the GPU. Triton does not interpret there."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHED], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert {(op, name) for op, name, *_ in found} == {*pairs.PAIRS["cuda"]}
    assert {(op, switch) for op, _, switch, known, _ in found if not known} <= PLANNED
    assert not [one for *one, known, differ in found if known and not differ]


def test_packs_hold_both_forms():
    """Guards the minutes on a GPU against compiling the form that the rule does not choose."""
    forms = {(site.args[0].op, site.args[0].name, site.args[1]) for site in pair_sites(FP32)}
    attention = "prefix_attention", "B64 P2048 S8192"
    assert {(*attention, "triton ahead=0"), (*attention, "triton ahead=1")} <= forms
    sites = [site for site in timed_sites() if "triton ahead=1" in site.args]
    assert len(sites) == 5


def test_a_form_with_a_tile_choice(interpreter):
    """Guards the pairs' very difference: the choice must reach the op, and be gone afterwards."""
    case = case_of("rms_norm", "T7 C4096")
    asked = {}
    for name in ("triton", "triton rows=2", "triton"):
        with record_tiles() as asked[name]:
            form(case.op, name)(case.inputs(0, CPU, FP32))()
    (plain,), (chosen,) = (asked[name].values() for name in ("triton", "triton rows=2"))
    assert plain["rows"] == 1 and chosen == plain | {"rows": 2}


def test_rows_of_pairs(interpreter, monkeypatch):
    """Guards what readers find pairs by, and the errors: every form has its own."""
    case = case_of("rms_norm", "T7 C4096")
    monkeypatch.setattr(pairs, "chosen_tiles", lambda *_: {"rows": 1, "num_warps": 8})
    names = ("triton", "triton rows=1", "triton rows=2")
    made = pairs.time_pairs(case, CPU, FP32, names, 0.01)
    assert [row["pair"] for row in made] == ["rule", "rows 1", "rows 2"]
    assert [row["tiles"]["rows"] for row in made] == [1, 1, 2]
    assert all(row["median_us"] > 0 and row["max_err"] < 1e-5 for row in made)


def test_what_is_not_there_is_skipped(monkeypatch):
    """Guards other trees and GPUs: no form may be timed under a switch that changes nothing, and
    none may fail because sm_80 has no early start."""
    case = case_of("rms_norm", "T7 C4096")
    names = ("portable", "portable pdl=1", "portable nosuch=1")
    monkeypatch.setattr(pairs, "chosen_tiles", lambda *_: {"rows": 1, "pdl": 0})
    for gpu, reason in ((H200, None), (A100, "pdl needs sm_90")):
        monkeypatch.setattr(pairs, "gpu_of", lambda device, gpu=gpu: gpu)
        found = {row["pair"]: row for row in pairs.time_pairs(case, CPU, FP32, names, 0.01)}
        assert found["nosuch 1"]["skipped"] == "the case has no tile choice nosuch"
        assert found["pdl 1"]["skipped"] == reason
        assert (found["pdl 1"]["median_us"] is None) == bool(reason)
        assert found["rule"]["median_us"] > 0 and not any(row["failure"] for row in found.values())


def test_linears_are_those_of_the_model():
    """Guards the shapes, of which a step's 15 GB are made, and what is counted of each."""
    config = BIG.decoder
    shapes = {name: linears.shape_of(config, name, torch.bfloat16) for name in linears.NAMES}
    assert shapes == {
        "qkv": (6144, 4096),
        "o": (4096, 4096),
        "gate_up": (24576, 4096),
        "down": (4096, 12288),
        "lm_head": (151936, 4096),
    }
    found = {
        name: linears.time_linear(TINY.decoder, name, 16, CPU, FP32, 0.01)
        for name in ("qkv", "lm_head")
    }
    row = found["qkv"]
    assert (row["case"], row["rows"], row["per_step"]) == ("qkv T16", 16, TINY.decoder.layers)
    assert row["bytes"] == 4 * (16 * 256 + 768 * 256 + 16 * 768)
    rate = row["bytes"] / row["median_us"] / 1e3
    assert row["copy_pct"] == pytest.approx(100 * rate / row["copy_gb_s"])
    assert found["lm_head"]["per_step"] == 1


def test_the_cost_of_a_launch(monkeypatch):
    """Guards the division: a hundred launches in a row, one launch's microseconds in the row."""
    calls = []
    monkeypatch.setattr(launch_cost, "rms_norm", lambda x, *_, **__: calls.append(1) or x)
    fixed = timing.Timing(100.0, 200.0, 300.0, 5, "clock")

    def measure(candidates, **_: object):
        for call in candidates.values():
            call(0)
        return dict.fromkeys(candidates, fixed)

    monkeypatch.setattr(launch_cost, "measure", measure)
    row = launch_cost.time_launches(CPU, FP32, "portable", 0.01)
    assert (row["p20_us"], row["median_us"], row["p80_us"]) == (1.0, 2.0, 3.0)
    assert len(calls) == 100
