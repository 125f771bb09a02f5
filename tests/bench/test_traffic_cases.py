"""`bench ops --shapes`: the op table at the shapes of a user's traffic."""

import json

import pytest

from bench import __main__ as command
from bench.formats.traffic import Point
from bench.inputs.presets import BIG, SMOLLM2
from bench.measure import timing
from bench.suite import OPS, traffic_cases
from model.errors import InputError

POINTS = [Point((10,), 2, 96, 8), Point((50, 90), 2, 200, 33)]


@pytest.fixture
def trace(tmp_path, monkeypatch):
    """Three requests: two rollouts of one prompt, and another prompt."""
    monkeypatch.setattr(timing, "MAX_REPEATS", timing.MIN_REPEATS)
    requests = [(96, 15, [1]), (96, 17, [1]), (200, 66, [2])]
    lines = [
        {"timestamp": 0, "input_length": a, "output_length": b, "hash_ids": c}
        for a, b, c in requests
    ]
    file = tmp_path / "trace.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.mark.parametrize(("device_type", "model"), [("cpu", SMOLLM2), ("cuda", BIG)])
def test_cases_have_the_points_sizes(device_type, model):
    """Guards what is measured: decode step and prefill of each point, in the device's model; ops
    over rows at the numbers of rollouts and of prompt tokens, each once."""
    listed = traffic_cases(device_type, POINTS)
    shapes = {(case.op, case.name): case.shape for case in listed}
    assert len(shapes) == len(listed)
    step = shapes["prefix_attention", "p50/p90 B2 P200 S33"]
    heads = {"heads": model.decoder.heads, "kv_heads": model.decoder.kv_heads}
    assert {"batch": 2, "prefix": 200, "suffix": 33, **heads}.items() <= step.items()
    assert shapes["prefix_attention", "prefill 96"]["rows"] == 96
    assert "batch" not in shapes["prefix_attention", "prefill 96"]
    rows = [shape["rows"] for (op, _), shape in shapes.items() if op == "rms_norm"]
    assert sorted(rows) == [2, 96, 200]
    assert (
        {op for op, _ in shapes}
        == {
            *(
                "prefix_attention",
                "rotary_attention",
                "qk_norm_rope",
                "rms_norm",
                "silu_mul",
                "sample",
            )
        }
        <= set(OPS)
    )


def test_they_are_measured(trace, capsys):
    """Guards the command from the trace to rows, and their options for another run."""
    words = ["ops", "--shapes", str(trace), "--percentiles", "50", "--width", "2"]
    only = ["--op", "prefix_attention", "--device", "cpu", "--budget", "0.001", "--json"]
    assert command.main([*words, *only]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {row["case"] for row in rows} == {"p50 B2 P96 S9", "prefill 96"}
    assert all(row["median_us"] for row in rows)
    assert rows[0]["options"] == words[1:3] + ["--percentiles", "50.0", "--width", "2"]


@pytest.mark.parametrize("words", [("--shapes", "missing.jsonl"), ("--shapes", "x", "--grid")])
def test_mistakes(words):
    """Guards against a traceback, and a grid that --shapes would silently drop."""
    with pytest.raises(InputError, match="no such file|not allowed with"):
        command.main(["ops", "--device", "cpu", *words])


@pytest.mark.parametrize("words", [("--percentiles", "50"), ("--width", "4")])
def test_options_without_a_trace(words):
    """Guards against options that are silently ignored."""
    with pytest.raises(InputError, match="are of --shapes TRACE"):
        command.main(["ops", "--list", "--device", "cpu", *words])


def test_a_case_of_the_grid_is_found_by_its_name(capsys):
    """Guards the printed command of a row of the grid, which does not say --grid."""
    words = ["ops", "--op", "prefix_attention", "--list", "--json", "--device", "cpu"]
    assert command.main([*words, "--shape", "smollm2 B16 P2048 S256"]) == 0
    (case,) = json.loads(capsys.readouterr().out)["cases"]
    assert case["case"] == "smollm2 B16 P2048 S256"
