"""Pairs of old and new forms, the linear layers of a step, the cost of a launch."""

import json
import os
import subprocess
import sys

import pytest
import torch

from bench.inputs.presets import BIG, TINY
from bench.inputs.trees import fork
from bench.launch_sites import all_sites, launch_checked, pair_sites, timed_sites
from bench.measure import pairs, timing
from bench.measure.origin import ROOT
from bench.studies import linears
from bench.studies.host import launch_cost
from bench.suite import numerics_cases, prefix_attention
from bench.suite.forms import form
from kernels.runtime.configs import A100, H200, record_configs, use_config
from profiles.runs.task_lists import first_light

CPU, FP32 = torch.device("cpu"), torch.float32
LAUNCHED = """
import json
import torch
from bench.launch_sites import launch_case
from bench.measure.pairs import checks, pairs, refusals
from kernels.compile.worker import launches_of
from kernels.runtime.configs import H200

def launched(case, name):
    site = lambda: launch_case(case, name, torch.bfloat16)
    return [
        {n: v for n, v in launch.kwargs.items() if isinstance(v, (int, str))}
        for launch in launches_of(site, H200)
    ]

found = []
for case, names in [*((c, names[1:]) for c, names in pairs("cuda")), *checks("cuda")]:
    refused = refusals(case, torch.bfloat16, names, H200)
    for old, new in zip(names[::2], names[1::2]):
        differ = launched(case, old) != launched(case, new)
        found.append((case.op, case.name, new, refused.get(new), differ))
print(json.dumps(found))
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "MAX_REPEATS", timing.MIN_REPEATS)


def case_of(op: str, name: str) -> pairs.Case:
    return next(case for case in numerics_cases() if (case.op, case.name) == (op, name))


@pytest.mark.cli
def test_every_switch_changes_a_launch():
    """Guards against a switch whose name no kernel knows, or whose two values launch the same:
    its pair or check would mean nothing, or be skipped on the GPU. Triton compiles in the
    subprocess."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHED], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    switches = json.loads(done.stdout)
    known = {*pairs.PAIRS["cuda"], *pairs.CHECKS["cuda"]}
    assert {(op, name) for op, name, *_ in switches} == known
    assert not [case for *case, refused, differ in switches if refused or not differ]


def test_packs_hold_both_forms():
    """Guards the minutes on a GPU against compiling the form that the rule does not choose."""
    forms = {(site.args[0].op, site.args[0].name, site.args[1]) for site in pair_sites(FP32)}
    attention = "prefix_attention", "B64 P2048 S8192"
    assert {(*attention, "triton ahead=0"), (*attention, "triton ahead=1")} <= forms
    sites = [site for site in timed_sites() if "triton ahead=1" in site.args]
    assert len(sites) == 5


def test_every_timed_switch_is_checked_first():
    """Guards the order of a GPU session: a form's times mean nothing unless its numbers are right,
    on small cases whose schedule is checked, in kernels that the pack holds."""
    timed = {(op, name) for (op, _), switches in pairs.PAIRS["cuda"].items() for name in switches}
    tasks = [task for task in first_light(torch.device("cuda")) if task.section == "numerics"]
    forms = {(task.op, task.case, form) for task in tasks for form in task.forms if " " in form}
    of_switches = {(op, form.split()[1].partition("=")[0]) for op, _, form in forms}
    assert timed <= of_switches
    checked = [site.args[0] for site in all_sites() if site.func is launch_checked]
    packed = {(site.args[0].op, site.args[0].name, site.args[1]) for site in checked}
    assert forms <= packed


def test_config_values_reach_the_op_underneath(interpreter):
    """Guards the checks of rotary attention: most of its config values are prefix attention's."""
    case = case_of("rotary_attention", "smollm2 ragged decode")
    with record_configs() as requested:
        form(case.op, "triton-fused ahead=0")(case.inputs(0, CPU, FP32))()
    ((_, config),) = [item for item in requested.items() if item[0][0] == "prefix_attention"]
    assert config["ahead"] == 0


def test_a_form_with_a_config_value(interpreter):
    """Guards the difference within a pair: the config value must reach the op, and be gone
    afterwards."""
    case = case_of("rms_norm", "T7 C4096")
    requested = {}
    for name in ("triton", "triton rows=2", "triton"):
        with record_configs() as requested[name]:
            form(case.op, name)(case.inputs(0, CPU, FP32))()
    (plain,), (changed,) = (requested[name].values() for name in ("triton", "triton rows=2"))
    assert plain["rows"] == 1 and changed == plain | {"rows": 2}


def test_rows_of_pairs(interpreter, monkeypatch):
    """Guards the fields by which readers find pairs, and the errors: every form has its own."""
    case = case_of("rms_norm", "T7 C4096")
    monkeypatch.setattr(pairs, "chosen_config", lambda *_: {"rows": 1, "num_warps": 8})
    names = ("triton", "triton rows=1", "triton rows=2")
    rows = pairs.time_pairs(case, CPU, FP32, names, 0.01)
    assert [row["pair"] for row in rows] == ["rule", "rows 1", "rows 2"]
    assert [row["tiles"]["rows"] for row in rows] == [1, 1, 2]
    assert all(row["median_us"] > 0 and row["max_err"] < 1e-5 for row in rows)


def test_unavailable_forms_are_skipped(monkeypatch):
    """Guards other commits and GPUs: no form may be timed under a switch that changes nothing, and
    none may fail because sm_80 has no PDL."""
    case = case_of("rms_norm", "T7 C4096")
    names = ("portable", "portable pdl=1", "portable nosuch=1")
    monkeypatch.setattr(pairs, "_refused", lambda *_: {"portable pdl=1": "not here"})
    rows = {row["pair"]: row for row in pairs.time_pairs(case, CPU, FP32, names, 0.01)}
    assert rows["pdl 1"]["skipped"] == "not here" and rows["pdl 1"]["median_us"] is None
    assert rows["rule"]["median_us"] > 0 and rows["nosuch 1"]["median_us"] > 0
    assert not any(row["failure"] for row in rows.values())
    checked = {row["impl"]: row for row in pairs.check_forms(case, CPU, FP32, names)}
    assert checked["portable pdl=1"]["skipped"] == "not here"
    assert checked["portable"]["max_err"] < 1e-5 and not checked["portable"]["skipped"]


def test_why_a_form_is_unavailable(interpreter):
    """Guards the reasons in skipped rows: the op's own message for what it refuses on this GPU or
    together with its other config values; none for a form that exists."""
    norm = case_of("rms_norm", "T7 C4096")
    forest = prefix_attention.case("tiles of both sizes", [fork(9, [3] * 5)], heads=(4, 1, 16))
    names = ("triton pdl=0", "triton pdl=1", "triton nosuch=1")
    unknown = {"triton nosuch=1": "the case's kernel config has no nosuch"}
    assert pairs.refusals(norm, FP32, names, H200) == unknown
    early = {"triton pdl=1": "pdl=1 needs sm_90 or newer, not sm_80"}
    assert pairs.refusals(norm, FP32, names, A100) == unknown | early
    alone = {"triton split=1": "kernel config: split needs pieces"}
    with use_config("prefix_attention", pieces=0):
        assert pairs.refusals(forest, FP32, [*alone], H200) == alone


def test_linears_are_those_of_the_model():
    """Guards the shapes, which make up a step's 15 GB, and what is counted of each."""
    config = BIG.decoder
    shapes = {name: linears.shape_of(config, name, torch.bfloat16) for name in linears.NAMES}
    assert shapes == {
        "qkv": (6144, 4096),
        "o": (4096, 4096),
        "gate_up": (24576, 4096),
        "down": (4096, 12288),
        "lm_head": (151936, 4096),
    }
    rows = {
        name: linears.time_linear(TINY.decoder, name, 16, CPU, FP32, 0.01)
        for name in ("qkv", "lm_head")
    }
    row = rows["qkv"]
    assert (row["case"], row["rows"], row["per_step"]) == ("qkv T16", 16, TINY.decoder.layers)
    assert row["bytes"] == 4 * (16 * 256 + 768 * 256 + 16 * 768)
    rate = row["bytes"] / row["median_us"] / 1e3
    assert row["copy_pct"] == pytest.approx(100 * rate / row["copy_gb_s"])
    assert rows["lm_head"]["per_step"] == 1


def test_the_cost_of_a_launch(monkeypatch):
    """Guards the division: a hundred launches in a row, the row has the microseconds of one."""
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
