"""`python -m profiles nsys`: its command line, and its summary of nsys's exports.

tests/profiles/data/nsys_2022_cpu.csv is what nsys 2022.4.2 printed as its reports nvtxsum and
gputrace for a process that generated two tokens with the model `tiny` on a CPU, with spans.
nsys_2022_gpu.csv is what it printed as gputrace, nvtxsum and nvtxgpuproj for the same recording,
after a launch and a kernel had been added to its database for each of the first 13 ops and
products, and one copy: the format is nsys's, the kernels' times are invented.
"""

import argparse
import json
import os
import stat
import sys
from pathlib import Path

import pytest

from model.errors import InputError
from model.terminal import Parser
from profiles.profilers import nsys, tools
from profiles.profilers.exports import number, tables
from profiles.profilers.nsys_summary import display, summarise

DATA = Path(__file__).parent / "data"
CPU, GPU = ((DATA / f"nsys_2022_{kind}.csv").read_text() for kind in ("cpu", "gpu"))
NEW_TRACE = """\
NOTICE: Existing SQLite export found: x.sqlite
        Consider using --force-export=true if needed.

Processing [x.sqlite] with [cuda_gpu_trace.py]...

 ** CUDA GPU Trace (cuda_gpu_trace):

Start (us),Duration (us),CorrId,GrdX,GrdY,GrdZ,Device,Ctx,GreenCtx,Strm,Name
30,"1,000.5",2,1,1,1,"NVIDIA H200, MIG (0)",1,,7,"f<int, 4>(int)"
10,5,1,1,1,1,NVIDIA H200 (0),1,,7,g
12,1,3,1,1,1,NVIDIA H200 (0),1,,20,g
"""


def options(*words: str) -> argparse.Namespace:
    parser = Parser()
    nsys.add_arguments(parser)
    return parser.parse_args(words)


def by_name(rows: list[dict]) -> dict[str, dict]:
    return {row["name"]: row for row in rows}


def test_spans_of_a_cpu():
    """Guards the parsing of nvtx_sum, the sums over layers, and a recording without a GPU."""
    found = summarise(CPU, "report")
    assert (found["kernels"], found["copies"], found["gpu"]) == ([], [], None)
    spans = by_name(found["spans"])
    layers = spans["decoder layer"]
    assert layers["instances"] == 4
    assert layers["host_us"] == pytest.approx((275282218 + 256300830) / 1e3)
    assert spans["rms_norm"]["instances"] == 10 and spans["rms_norm"]["gpu_us"] is None
    assert not any(name.startswith("pacore:") for name in spans)


def test_kernels_gaps_and_projected_spans():
    """Guards sums by kernel, copies listed separately, idle time, and GPU time by span."""
    found = summarise(GPU, "report")
    kernels = by_name(found["kernels"])
    gemm = kernels["void gemm<float, 128, 64>(float const*, int)"]
    assert (gemm["instances"], gemm["total_us"], gemm["mean_us"]) == (5, 60.0, 12.0)
    assert gemm["share"] == pytest.approx(60 / 111)
    assert [row["name"] for row in found["copies"]] == ["[CUDA memcpy DtoH]"]
    gpu = found["gpu"]
    assert gpu["busy_us"] == pytest.approx(111 + 2)
    assert gpu["span_us"] == pytest.approx((7248378852 + 2000 - 6973195265) / 1e3)
    assert gpu["gaps"] == 13 and gpu["gap_us"] == pytest.approx(gpu["span_us"] - 113)
    assert gpu["largest_gap_us"] == pytest.approx((7116640636 - 7016194013 - 12000) / 1e3)
    spans = by_name(found["spans"])
    assert (spans["rms_norm"]["gpu_us"], spans["rms_norm"]["gpu_ops"]) == (9.0, 3)
    assert spans["linear qkv"]["gpu_ops"] == 2 and spans["sample"]["gpu_ops"] is None


def test_later_versions():
    """Guards other units, separated thousands, more columns, messages between tables, unordered
    rows, and two streams: there is no gap while either of them computes."""
    found = summarise(NEW_TRACE, "report")
    assert by_name(found["kernels"])["f<int, 4>(int)"]["total_us"] == 1000.5
    gpu = found["gpu"]
    assert (gpu["gaps"], gpu["gap_us"], gpu["largest_gap_us"]) == (1, 15.0, 15.0)
    assert gpu["busy_us"] == 5 + 1000.5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            NEW_TRACE.replace("Duration (us)", "Length (us)"),
            "report: no column 'Duration'; there are",
        ),
        (NEW_TRACE.replace("Start (us)", "Start (days)"), r"'Start \(days\)' has no unit of time"),
        (NEW_TRACE.replace("12,1,", "12,N/A,"), r"no number in column 'Duration \(us\)'"),
        (CPU.replace("Instances", "Count"), "report: no column 'Instances'; there are"),
        (CPU.replace("275282218,2,", "275282218,N/A,"), "no number in column 'Instances'"),
        ("SKIPPED: x.sqlite does not contain GPU trace data.\n", "neither GPU activity nor NVTX"),
        ("", "neither GPU activity nor NVTX"),
    ],
)
def test_what_is_missing_is_named(text, message):
    """Guards a new version of nsys: a wrong sum would be worse than an error message."""
    with pytest.raises(InputError, match=message):
        summarise(text, "report")


def test_tables_and_numbers():
    """Guards the splitting of a text into tables, and cells without a number."""
    first, second = tables("a,b,c\n1,2,3\nwords\nd,e,f,g\n1,2,3,4\n5,6,7,8\n", "x")
    assert (first.header, first.rows) == (["a", "b", "c"], [["1", "2", "3"]])
    assert second.texts("g") == ["4", "8"]
    assert [number(text) for text in ("1,234.5", "None", "", "N/A", "7.0e-2", "x")] == [
        1234.5, None, None, None, 0.07, None,
    ]  # fmt: skip


def test_command_line():
    """Guards nsys's command line, and that CMD keeps its options: nsys has no --."""
    parsed = options("--out", "d", "--name", "n", "--", "python", "-m", "bench", "ops", "--json")
    assert parsed.command == ["python", "-m", "bench", "ops", "--json"] and not parsed.json
    assert nsys.command_line("nsys", parsed) == [
        "nsys", "profile", "--trace=cuda,nvtx,cublas", "--sample=none", "--cpuctxsw=none",
        "--cuda-graph-trace=node", "--force-overwrite=true", "--output=d/n",
        "python", "-m", "bench", "ops", "--json",
    ]  # fmt: skip
    parsed = options("--range", "profiler", "--graphs", "whole", "--", "x")
    line = nsys.command_line("nsys", parsed)
    assert {"--capture-range=cudaProfilerApi", "--capture-range-end=stop"} < set(line)
    assert "--cuda-graph-trace=graph" in line


def test_dry_run_needs_no_tool(monkeypatch, capsys):
    """Guards the line for pasting on another machine, including the variable of spans."""
    monkeypatch.setenv("PATH", "")
    assert nsys.run(options("--dry-run", "--", "python", "a file.py")) == 0
    line = capsys.readouterr().out
    assert line.startswith("PACORE_SPANS=nvtx nsys profile ") and line.endswith("'a file.py'\n")


def test_mistakes(monkeypatch, tmp_path):
    """Guards the one-line messages for a missing CMD, tool or report."""
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match="nsys is not on the PATH: install .* profiles torch"):
        nsys.run(options("--", "x"))
    with pytest.raises(InputError, match="say what to profile after --"):
        nsys.run(options())
    with pytest.raises(InputError, match="there is no report"):
        nsys.run(options("--summarise", str(tmp_path / "none.nsys-rep")))
    with pytest.raises(InputError, match="leave CMD out"):
        nsys.run(options("--summarise", "x", "--", "y"))


FAKE = f"""#!{sys.executable}
import os, sys, pathlib
if sys.argv[1] == "profile":
    at = next(i for i, word in enumerate(sys.argv) if i > 1 and not word.startswith("--"))
    out = next(word for word in sys.argv if word.startswith("--output="))
    print("spans:", os.environ.get("PACORE_SPANS"))
    pathlib.Path(out.removeprefix("--output=") + ".nsys-rep").write_text("report")
    sys.exit(os.spawnv(os.P_WAIT, sys.argv[at], sys.argv[at:]))
if "--help-reports" in sys.argv:
    print("  nvtxsum -- NVTX Range Summary\\n  gputrace -- CUDA GPU Trace")
    sys.exit(1)
print(pathlib.Path({str(DATA / "nsys_2022_cpu.csv")!r}).read_text())
print("arguments:", sys.argv, file=sys.stderr)
"""


@pytest.fixture
def fake_nsys(tmp_path, monkeypatch) -> Path:
    """A program called nsys that writes a report and exports the one in tests/profiles/data."""
    path = tmp_path / "bin" / "nsys"
    path.parent.mkdir()
    path.write_text(FAKE)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{path.parent}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


@pytest.mark.parametrize("code", [0, 3])
def test_from_end_to_end(fake_nsys, capfd, code):
    """Guards the whole command: spans on in the child, its output on stderr, the report kept, one
    JSON document on stdout, and the exit code of a failed CMD."""
    child = [sys.executable, "-c", f"print('child speaks'); raise SystemExit({code})"]
    parsed = options("--out", str(fake_nsys / "out"), "--json", "--", *child)
    assert nsys.run(parsed) == int(code != 0)
    out, err = capfd.readouterr()
    made = json.loads(out)
    assert by_name(made["spans"])["decoder layer"]["instances"] == 4
    assert "child speaks" in err and "spans: nvtx" in err
    assert Path(made["report"]).read_text() == "report"


def test_names_of_reports():
    """Guards nsys before and after 2023, whose reports have different names."""
    old = "The following built-in reports are available:\n\n  gputrace -- CUDA GPU Trace\n"
    new = "  cuda_gpu_trace[:nvtx-name][:base|:mangled] -- CUDA GPU Trace\n  nvtx_sum -- x\n"
    assert nsys.report_names(old)[0] == "gputrace"
    assert nsys.report_names(new) == ["cuda_gpu_trace", "nvtx_sum", "nvtxgpuproj"]


def test_tables_are_shown(capsys):
    """Guards the text view."""
    display(summarise(GPU, "report"), "report")
    shown = capsys.readouterr().out
    assert "13 gaps" in shown and "prefix_attention_kernel" in shown and "decoder layer" in shown


@pytest.mark.cli
def test_an_old_report_is_not_mistaken_for_a_new_one(tmp_path, capfd):
    """Guards the summary of a run that wrote nothing against showing the previous figures."""
    report = tmp_path / "new" / "a.nsys-rep"
    write = f"open({str(report)!r}, 'w').write('x')"
    assert tools.run_profiler([sys.executable, "-c", write], report) == 0
    assert f"report: {report}" in capfd.readouterr().err
    with pytest.raises(InputError, match="did not write .*a.nsys-rep; its messages are above"):
        tools.run_profiler([sys.executable, "-c", "print('no')"], report)
