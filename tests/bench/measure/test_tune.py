"""`python -m bench tune` without a GPU: its keys and candidates, and which candidate wins."""

import json
import math

import pytest
import torch
import triton

from bench.__main__ import main
from bench.measure import tune
from bench.measure.poison import PoisonedError
from bench.measure.roofline import Roofline
from bench.measure.timing import Timing
from bench.rows import jsonl
from bench.suite import OPS
from bench.suite.op import Case
from kernels.compile.unfilled import unfilled
from kernels.runtime import configs, dispatch
from kernels.runtime.configs import H200, Tunable
from kernels.runtime.dispatch import pick
from model.errors import InputError
from tests.bench.toy_op import toy_op

CPU, FP32 = torch.device("cpu"), torch.float32
RULE = {"block": 64, "num_warps": 4}
used = []  # the config of every call of the op


def double(x, *, impl=None):
    return pick("double", impl, x.device, {"eager": lambda x: x + x, "triton": _double})(x)


def _double(x):
    config = TUNABLE.choose("short" if len(x) < 100 else "long", x.device)
    used.append(config)
    if config["block"] == 13:
        raise ValueError("13 is no power of 2")
    return 2 * x + (config["block"] == 512 and len(x) > 10)  # wrong, but not on the shortest


def plain(x, *, impl=None):
    return pick("plain", impl, x.device, {"eager": lambda x: x})(x)


TUNABLE = Tunable(
    "double",
    rule=lambda gpu: RULE,
    candidates=lambda key, gpu: [
        {"block": block, "num_warps": 4} for block in (13, 64, 128, 256, 512)
    ],
)


def case(length: int, op: str = "double") -> Case:
    def inputs(seed, device, dtype):
        return {"x": torch.full((length,), float(seed), device=device, dtype=dtype)}

    return Case(op, f"T{length}", inputs, values=2 * length, flops=length)


CASES = [case(8), case(40), case(400), case(8, "plain")]


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Only the ops above, empty folders for tables and results, and fixed times."""
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(dispatch, "_interpreting", lambda: True)  # there are no kernels to compile
    monkeypatch.setattr(configs, "TABLES", tmp_path / "tuned")
    monkeypatch.setattr(tune, "ROOT", tmp_path)
    ops = dict(OPS)
    OPS.clear()
    OPS.update(double=toy_op("double", double), plain=toy_op("plain", plain))
    monkeypatch.setattr("bench.cli.commands.cases", lambda device_type: CASES)
    monkeypatch.setattr(tune, "sets_for", lambda set_bytes, device: 2)
    monkeypatch.setattr(tune, "measure", fixed_times)
    best = Roofline("cpu", "float32", copy_gb_s=1, gemm_tflop_s=1)
    monkeypatch.setattr("bench.measure.rows.roofline", lambda device, dtype: best)
    configs.table_of.cache_clear()
    used.clear()
    yield tmp_path
    OPS.clear()
    OPS.update(ops)
    configs.table_of.cache_clear()


MICROSECONDS = {  # by length and block
    (8, 64): 10.0,
    (8, 128): 5.0,
    (8, 256): 6.0,
    (40, 64): 100.0,
    (40, 128): 200.0,
    (40, 256): 120.0,
}


def fixed_times(candidates, *, device, sets, budget_s):
    """Replaces `measure`: calls each candidate for every set and looks up its time."""
    timings = {}
    for name, call in candidates.items():
        used.clear()
        results = [call(index) for index in range(sets)]
        assert len({float(result[0]) for result in results}) == sets  # each set has its own inputs
        lengths = {len(result) for result in results}
        blocks = {config["block"] for config in used}
        assert len(lengths) == len(blocks) == 1 and len(used) == sets
        us = MICROSECONDS.get((lengths.pop(), blocks.pop()), 1.0)
        timings[name] = Timing(us, us, us, 5, "graph")
    return timings


def test_keys_and_their_candidates(toy):
    """Guards the search for keys: cases of one key together, the current config first and only
    once, no key for an op without a Triton form."""
    tuning_sets = tune.tuning_sets(CASES, FP32, H200)
    assert [(tuning_set.key, [c.name for c in tuning_set.cases]) for tuning_set in tuning_sets] == [
        (("double", "short"), ["T8", "T40"]),
        (("double", "long"), ["T400"]),
    ]
    assert [config["block"] for config in tuning_sets[0].candidates] == [64, 13, 128, 256, 512]


def test_best_over_all_cases(toy):
    """Guards the choice: 128 wins one case and 64 the other, 256 is close in both; 512 is wrong on
    one of them and 13 raises, as their rows say."""
    tuning_set = tune.tuning_sets(CASES, FP32, H200)[0]
    tuned = tune.tune(tuning_set, CPU, FP32)
    assert len(tuned) == 10
    assert {row["tiles"]["block"] for row in tuned if row["chosen"]} == {256}
    failures = {(row["case"], row["tiles"]["block"]): row["failure"] for row in tuned}
    assert failures["T8", 13] == failures["T40", 13] == "ValueError: 13 is no power of 2"
    assert failures["T40", 512].startswith("max error")
    assert [key for key, failure in failures.items() if failure] == [
        ("T8", 13),
        ("T40", 13),
        ("T40", 512),
    ]
    times = {(row["case"], row["tiles"]["block"]): row["median_us"] for row in tuned}
    assert times["T40", 128] == 200.0 and times["T40", 512] is None


def test_nothing_is_chosen_when_all_fail(toy):
    """Guards the table: a config that was never timed must not get there."""
    tuning_set = tune.TuningSet(("double", "short"), CASES[:1], [{"block": 13, "num_warps": 4}])
    tuned = tune.tune(tuning_set, CPU, FP32)
    assert tune.choose(tuned) is None and not tuned[0]["chosen"]


def test_a_poisoning_candidate_ends_the_run(toy, monkeypatch):
    """Guards the table: after an illegal access all later candidates would fail, and the best of
    the earlier ones would be written as the best of all."""

    def judge(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(tune, "judge", judge)
    with pytest.raises(PoisonedError, match="illegal memory access"):
        tune.tune(tune.tuning_sets(CASES, FP32, H200)[1], CPU, FP32)


def test_a_failing_timer_is_reported(toy, monkeypatch):
    """Guards against a candidate that cannot be captured ending the whole run."""

    def broken(candidates, **options):
        raise RuntimeError("capture failed")

    monkeypatch.setattr(tune, "measure", broken)
    tuned = tune.tune(tune.tuning_sets(CASES, FP32, H200)[1], CPU, FP32)
    assert {row["failure"] for row in tuned if row["tiles"]["block"] == 64} == {
        "RuntimeError: capture failed"
    }


def test_table_keeps_its_other_entries(toy):
    """Guards the other ops' entries, and that an op sees its new config at once."""
    path = tune.write(H200, ("double", "long"), {"block": 32})
    tune.write(H200, ("attention", "any"), {"block": 1})
    assert TUNABLE.choose("short", CPU) == RULE
    tune.write(H200, ("double", "short"), {"block": 16})
    assert TUNABLE.choose("short", CPU) == {"block": 16}
    assert path == toy / "tuned" / "nvidia-h200.json" and list(path.parent.iterdir()) == [path]
    assert json.loads(path.read_text()) == {
        "attention": {"any": {"block": 1}},
        "double": {"long": {"block": 32}, "short": {"block": 16}},
    }


def test_command_writes_table_and_rows(toy, monkeypatch, capsys):
    """Guards the command as a GPU would run it: it writes the best of every key, and the rows."""
    monkeypatch.setattr("bench.cli.measurement.parse_device", lambda name: FakeCuda())
    monkeypatch.setattr("bench.cli.commands.gpu_of", lambda device: H200)
    monkeypatch.setattr("bench.cli.commands.tune.tune", on_cpu(tune.tune))
    assert main(["tune", "--op", "double"]) == 1  # some candidates failed, and their rows say so
    table = json.loads((toy / "tuned" / "nvidia-h200.json").read_text())
    assert {key: config["block"] for key, config in table["double"].items()} == {
        "short": 256,
        "long": 64,
    }
    written = jsonl.read(toy / "profiles" / "results" / "nvidia-h200" / "tune.jsonl")
    assert len(written) == 15
    assert "chosen" in capsys.readouterr().out


class FakeCuda:
    type = "cuda"


def on_cpu(run):
    return lambda tuning_set, device, dtype: run(tuning_set, CPU, FP32)


def test_dry_run_measures_nothing(toy, monkeypatch, capsys):
    """Guards the listing on any machine: keys, cases and candidates, and no file written."""
    monkeypatch.setattr(tune, "measure", None)
    assert main(["tune", "--dry-run", "--op", "double", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["part"], row["key"], row["cases"]) for row in listed] == [
        ("double", "short", ["T8", "T40"]),
        ("double", "long", ["T400"]),
    ]
    assert main(["tune", "--dry-run", "--op", "double"]) == 0
    assert "block=128 num_warps=4  T8; T40" in capsys.readouterr().out
    assert list(toy.iterdir()) == []


def test_without_a_gpu_it_says_so(toy):
    """Guards the message: times of another machine's interpreter must not become a table."""
    with pytest.raises(InputError, match="tune needs a GPU, this device is a CPU; --dry-run lists"):
        main(["tune", "--op", "double", "--device", "cpu"])


def test_where_triton_interprets_it_says_so(toy, monkeypatch):
    """Guards the search for keys: recorded launches would run for hours."""
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    with pytest.raises(InputError, match="TRITON_INTERPRET is set"):
        main(["tune", "--dry-run"])


def test_unfilled_leaves_large_tensors_alone():
    """Guards the dry run's memory: a large cache is allocated but not written; small tensors are
    written, because their values decide what an op does."""
    with unfilled():
        small = torch.full((8,), 3.0).mul_(2)
        large = torch.randn((1 << 20, 1 << 8), dtype=torch.bfloat16).mul_(2)
        cache = torch.full((1 << 20, 1 << 8), math.nan).masked_fill_(torch.tensor(True), 1.0)
    assert small.tolist() == [6.0] * 8
    assert (large.shape, large.dtype) == ((1 << 20, 1 << 8), torch.bfloat16)
    assert cache[0, 0] != 1.0
