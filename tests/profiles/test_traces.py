"""`python -m profiles torch` and `proton`: traces recorded here, and hand-written GPU traces.

The GPU events follow published excerpts of PyTorch's traces: a launch in its host thread, a kernel
on the GPU's, with one correlation id.
"""

import argparse
import json
import os

import pytest
import torch

from model.errors import InputError
from model.terminal import Parser
from profiles.profilers import ncu, nsys, proton, torch_trace
from profiles.profilers.trace_summary import OUTSIDE, display, summarise


def options(*words: str) -> argparse.Namespace:
    parser = Parser()
    torch_trace.add_arguments(parser)
    return parser.parse_args(words)


def event(cat: str, name: str, ts: float, dur: float, correlation: int | None = None, tid=1):
    args = {} if correlation is None else {"correlation": correlation}
    gpu = cat in ("kernel", "gpu_memcpy", "gpu_user_annotation")
    where = {"pid": 0, "tid": 7} if gpu else {"pid": 100, "tid": tid}
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "args": args} | where


GPU = [
    {"ph": "M", "name": "process_name", "pid": 100, "args": {"name": "python"}},
    event("user_annotation", "round 0 of problem 1", -5.0, 40.0),
    event("user_annotation", "engine step 4", 0.0, 100.0),
    event("user_annotation", "execute", 5.0, 80.0),
    event("user_annotation", "decoder layer 0", 10.0, 40.0),
    event("user_annotation", "linear qkv", 12.0, 10.0),
    event("user_annotation", "decoder layer 1", 50.0, 30.0),
    event("cuda_runtime", "cudaLaunchKernel", 15.0, 2.0, 1),
    event("cuda_driver", "cuLaunchKernelEx", 16.0, 1.0, 1),  # nested in the one above
    event("cuda_driver", "cuLaunchKernelEx", 30.0, 1.0, 2),
    event("cuda_runtime", "cudaGraphLaunch", 82.0, 1.0, 3),
    event("cuda_runtime", "cudaMemcpyAsync", 120.0, 1.0, 4),
    event("cuda_runtime", "cudaLaunchKernel", 15.0, 1.0, 5, tid=2),  # another thread, no span
    event("kernel", "gemm", 200.0, 50.0, 1),
    event("kernel", "norm", 250.0, 10.0, 2),
    event("kernel", "graph a", 260.0, 20.0, 3),
    event("kernel", "gemm", 280.0, 15.0, 3),
    event("gpu_memcpy", "Memcpy DtoH", 300.0, 4.0, 4),
    event("kernel", "gemm", 310.0, 1.0, 5),
    event("gpu_user_annotation", "linear qkv", 200.0, 50.0),  # the same once more, on the GPU
]


def test_kernels_belong_to_the_innermost_span_that_launched_them():
    """Guards the breakdown on a GPU, whose kernels run long after their spans have ended: a layer
    keeps the kernels that none of its ops launched, graphs belong to their replay, others are
    outside."""
    found = summarise({"traceEvents": GPU}, "trace")
    spans = {row["name"]: row for row in found["spans"]}
    times = {name: row["gpu_us"] for name, row in spans.items() if row["gpu_us"]}
    assert times == {"linear qkv": 50, "decoder layer": 10, "execute": 35, OUTSIDE: 5}
    assert spans["linear qkv"]["share"] == pytest.approx(50 / 100)
    assert sum(row["share"] for row in spans.values()) == pytest.approx(1)
    assert spans["decoder layer"]["instances"] == 2 and "round" not in spans
    assert found["gpu"]
    gemm = found["kernels"][0]
    assert (gemm["name"], gemm["instances"], gemm["total_us"]) == ("gemm", 3, 66)


def test_own_time_excludes_nested_spans():
    """Guards sums on the host: the parts of a step add up to the step, each counted once."""
    spans = {row["name"]: row for row in summarise({"traceEvents": GPU}, "trace")["spans"]}
    own = {name: row["own_us"] for name, row in spans.items() if row["instances"]}
    assert own == {"engine step": 20, "execute": 10, "decoder layer": 60, "linear qkv": 10}
    assert spans["decoder layer"]["total_us"] == 70


@pytest.mark.parametrize("trace", [{}, {"traceEvents": []}, [], {"kernels": 1}])
def test_other_files_are_refused(trace):
    """Guards a wrong file on the command line."""
    with pytest.raises(InputError, match="x.json: no events"):
        summarise(trace, "x.json")


def test_impossible_times_are_left_out():
    """Guards sums against NaN, which json reads, and negative durations: one event is not worth
    the others, and is counted."""
    odd = [event("kernel", "gemm", 200.0, time, 1) for time in (float("nan"), float("inf"), -1.0)]
    odd.append(event("kernel", "gemm", float("nan"), 1.0, 1))
    with pytest.warns(UserWarning, match="trace: 4 events without possible times are left out"):
        assert summarise({"traceEvents": GPU + odd}, "trace") == summarise({"traceEvents": GPU}, "")


def test_trace_of_an_op(tmp_path, capsys):
    """Guards the command on a real op: the file is a trace, and its call is the op."""
    path = tmp_path / "new" / "norm.json"
    words = ["--op", "rms_norm", "--device", "cpu", "--steps", "2", "--out", str(path)]
    assert torch_trace.run(options(*words)) == 0
    assert "2" in (shown := capsys.readouterr().out) and "aten::" in shown
    found = summarise(json.loads(path.read_text()), "norm.json")
    spans = {row["name"]: row for row in found["spans"]}
    assert set(spans) == {"call", "rms_norm"} and not found["gpu"]
    assert [spans[name]["instances"] for name in ("call", "rms_norm")] == [2, 2]
    total = spans["call"]["total_us"]
    assert spans["call"]["own_us"] + spans["rms_norm"]["own_us"] == pytest.approx(total)
    assert torch_trace.run(options("--summarise", str(path), "--json")) == 0
    assert json.loads(capsys.readouterr().out) == {"trace": str(path)} | found


def test_trace_of_decode_steps(tmp_path, capsys):
    """Guards the traced engine steps: the requested number, all rollouts decoding, every layer in
    each step, and spans that add up to the calls."""
    path = tmp_path / "decode.json"
    assert torch_trace.run(options("--device", "cpu", "--steps", "2", "--out", str(path))) == 0
    assert "2 steps of tiny, B4 P256 S16" in capsys.readouterr().out
    spans = {row["name"]: row for row in summarise(json.loads(path.read_text()), "x")["spans"]}
    assert spans["engine step"]["instances"] == spans["sample"]["instances"] == 2
    assert spans["decoder layer"]["instances"] == 4
    assert sum(row["own_us"] for row in spans.values()) == pytest.approx(spans["call"]["total_us"])


def test_mistakes(tmp_path):
    """Guards the one-line messages for missing or wrong arguments, and waiting for ever."""
    with pytest.raises(InputError, match="no file for the trace"):
        torch_trace.run(options())
    with pytest.raises(InputError, match="cannot be read: No such file"):
        torch_trace.run(options("--summarise", str(tmp_path / "none")))
    os.mkfifo(tmp_path / "pipe")
    for read in (torch_trace._read, nsys.export, ncu.export):
        with pytest.raises(InputError, match="pipe is a pipe, socket or device"):
            read(tmp_path / "pipe")
    (tmp_path / "text").write_text("no json")
    with pytest.raises(InputError, match="is not JSON"):
        torch_trace.run(options("--summarise", str(tmp_path / "text")))
    kernel = {"ph": "X", "cat": "kernel", "name": "k", "dur": 1, "ts": 0, "pid": 1, "tid": 1}
    span = kernel | {"cat": "user_annotation"}
    for text in (
        "[" * 100_000,
        '{"traceEvents": [1]}',
        *(json.dumps({"traceEvents": [kernel, span | {"dur": wrong}]}) for wrong in ("x", None)),
        json.dumps({"traceEvents": [{n: v for n, v in span.items() if n != "pid"}]}),
    ):
        (tmp_path / "text").write_text(text)
        with pytest.raises(InputError, match="is not JSON|is not a trace") as raised:
            torch_trace.run(options("--summarise", str(tmp_path / "text")))
        assert "Error(" not in str(raised.value), "Python's words"
    words = ["--op", "rms_norm", "--device", "cpu", "--out", str(tmp_path / "text" / "x.json")]
    with pytest.raises(InputError, match="cannot write"):
        torch_trace.run(options(*words))


def test_spans_are_shown(capsys):
    """Guards the text view."""
    display(summarise({"traceEvents": GPU}, "trace"), "trace")
    shown = capsys.readouterr().out
    assert OUTSIDE in shown and "top kernels" in shown and "50.0%" in shown


TREE = [
    {
        "frame": {"name": "ROOT", "type": "function"},
        "metrics": {},
        "children": [
            {
                "frame": {"name": "scope", "type": "function"},
                "metrics": {},
                "children": [
                    {
                        "frame": {"name": "merge_kernel", "type": "function"},
                        "metrics": {"count": 20, "time (ns)": 40_000, "device_id": "0"},
                        "children": [],
                    }
                ],
            },
            {
                "frame": {"name": "attention_kernel", "type": "function"},
                "metrics": {"count": 20, "time (ns)": 900_000, "device_id": "0"},
                "children": [],
            },
        ],
    },
    {"CUDA": {"0": {"arch": "90"}}},
]


def test_protons_tree(tmp_path, capsys):
    """Guards the parsing of Proton's file, and the refusal of other files."""
    path = tmp_path / "x.hatchet"
    path.write_text(json.dumps(TREE))
    rows = proton.kernels(path)
    assert [(row["kernel"], row["total_us"], row["mean_us"]) for row in rows] == [
        ("attention_kernel", 900, 45),
        ("merge_kernel", 40, 2),
    ]
    proton.display(rows, "20 x op")
    assert "attention_kernel" in capsys.readouterr().out
    wrong = [json.dumps(TREE).replace("40000", time) for time in ("NaN", "-1", "Infinity")]
    for text in ("", "[]", '[{"metrics": {"time (ns)": 1}}]', *wrong):
        path.write_text(text)
        with pytest.raises(InputError, match="is not a tree of kernels") as raised:
            proton.kernels(path)
        assert "Error(" not in str(raised.value), "Python's words"


def test_proton_needs_a_gpu(monkeypatch):
    """Guards the message on machines without a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    parser = Parser()
    proton.add_arguments(parser)
    with pytest.raises(InputError, match="Proton needs a GPU, .* profiles torch"):
        proton.run(parser.parse_args(["--op", "rms_norm"]))
