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
        (
            NEW_TRACE.replace("Start (us)", "Start (days)"),
            "'Start': the unit is 'days'; it must be ns",
        ),
        (NEW_TRACE.replace("12,1,", "12,-1,"), "line 11, column 'Duration': '-1' is impossible"),
        (CPU.replace("Instances", "Count"), "report: no column 'Instances'; there are"),
        (CPU.replace("275282218,2,", "275282218,2.5,"), "line 4, column 'Instances': '2.5' is imp"),
        (
            CPU.replace("Style,Range", "Style,Style,Range"),
            "cells, where the header has 11: is it cut",
        ),
        (NEW_TRACE + NEW_TRACE.replace("10,5", "10,6"), "2 different tables of cuda_gpu_trace"),
        ("SKIPPED: x.sqlite does not contain GPU trace data.\n", "neither GPU activity nor NVTX"),
        ("", "neither GPU activity nor NVTX"),
    ],
)
def test_what_is_missing_is_named(text, message):
    """Guards a new version of nsys: a wrong sum would be worse than an error message."""
    with pytest.raises(InputError, match=message):
        summarise(text, "report")


PROJECTION = """\
Name,Projected Start (ns),Projected Duration (ns),Orig Start (ns),Orig Duration (ns),Style,PID,\
TID,NumGPUOps,Lvl,NumChild,RangeId,ParentId,RangeStack
,10758298,33981358,,,,295239,295820,164,,0,,,
None,10758298,33981358,None,None,None,295239,295820,164,None,0,None,None,None
pacore:decoder layer 3,14739612,1031280,14108904,3554743,PushPop,295239,295239,2,0,0,2,,:2
pacore:schedule,,,8450530,5597874,PushPop,295239,295239,0,0,0,1,,:1
,14739612,1000,14108904,2000,PushPop,295239,295239,1,0,0,3,,:3
"""


def test_activities_outside_of_ranges_are_no_span(recwarn):
    """Guards the top of the table against the nameless row of nsys 2023 (one export's, and None as
    2023.2 prints it), and the summary against ranges that launch nothing: they have host time. A
    range that its program gave no name is a span."""
    spans = by_name(summarise(PROJECTION, "report")["spans"])
    assert spans == {
        "decoder layer": {"name": "decoder layer", "instances": 1, "host_us": 3554.743}
        | {"gpu_us": 1031.28, "gpu_ops": 2},
        "schedule": {"name": "schedule", "instances": 1, "host_us": 5597.874}
        | {"gpu_us": None, "gpu_ops": None},
        "(no name)": {"name": "(no name)", "instances": 1, "host_us": 2.0}
        | {"gpu_us": 1.0, "gpu_ops": 1},
    }
    assert not recwarn.list
    both = by_name(summarise(CPU + PROJECTION, "report")["spans"])
    assert (both["decoder layer"]["instances"], both["decoder layer"]["gpu_ops"]) == (4, 2)
    assert "schedule" not in both, "nvtx_sum lists every range, with the host's times"


def test_odd_rows_are_left_out_and_counted():
    """Guards the rest of a report against one row without a number, a cut one, and a message."""
    odd = NEW_TRACE.replace("12,1,3", "12,N/A,3").replace(
        "10,5,1,", "WARNING, it, is late\n10,5,1,"
    )
    with pytest.warns(UserWarning, match="report: rows left out, .*: 3; line 10: 3 cells, where"):
        found = summarise(odd + '13,1,4,1,1,1,"NVIDIA', "report")
    assert sum(row["instances"] for row in found["kernels"]) == 2
    with pytest.raises(InputError, match="no row can be read; line 4: column 'Instances' has no n"):
        summarise("\n".join(CPU.replace("282218,2,", "282218,,").splitlines()[:4]) + "\n", "report")


def test_a_cut_name_is_suspected():
    """Guards against a kernel that is listed twice because its last name is cut."""
    with pytest.warns(UserWarning, match="report ends without a line break: its last row may be"):
        summarise(NEW_TRACE.removesuffix("g\n") + "prefix_atten", "report")
    with pytest.warns(UserWarning, match="report: rows left out, .*: 1; line 7: 1 cells"):
        summarise(PROJECTION + "pacore:emb", "report")


def test_repeated_exports_count_once():
    """Guards sums against a file to which the same export was appended."""
    with pytest.warns(UserWarning, match="report: repeated rows, .*: 3"):
        assert summarise(NEW_TRACE + NEW_TRACE, "report") == summarise(NEW_TRACE, "report")


def test_other_tables_are_ignored():
    """Guards our sums against the rows of other reports in one file: `nsys stats` alone prints
    eight, and nvtx_gpu_proj_sum has columns Range and Style, too."""
    other = """
Time (%),Total Time (ns),Num Calls,Avg (ns),Med (ns),Min (ns),Max (ns),StdDev (ns),A,Name
98.4,59962131,27,2220819.7,1412.0,962,59539863,11455347.6,1,cudaMalloc
Range,Style,Total Proj Time (ns),Total Range Time (ns)
a,PushPop,1,2
"""
    assert summarise(CPU + other, "report") == summarise(other + CPU, "report")
    assert summarise(CPU + other, "report") == summarise(CPU, "report")


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
    assert line.startswith("LC_ALL=C PACORE_SPANS=nvtx nsys profile ") and line.endswith(
        "'a file.py'\n"
    )


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
    print("spans:", os.environ.get("PACORE_SPANS"), "locale:", os.environ["LC_ALL"])
    pathlib.Path(out.removeprefix("--output=") + ".nsys-rep").write_text("report")
    sys.exit(os.spawnv(os.P_WAIT, sys.argv[at], sys.argv[at:]))
assert os.environ["LC_ALL"] == "C", "numbers of the user's locale"
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
def test_from_end_to_end(fake_nsys, capfd, monkeypatch, code):
    """Guards the whole command: spans and C's locale in the child, its output on stderr, the report
    kept, one JSON document on stdout, and the exit code of a failed CMD."""
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    child = [sys.executable, "-c", f"print('child speaks'); raise SystemExit({code})"]
    parsed = options("--out", str(fake_nsys / "out"), "--json", "--", *child)
    assert nsys.run(parsed) == int(code != 0)
    out, err = capfd.readouterr()
    made = json.loads(out)
    assert by_name(made["spans"])["decoder layer"]["instances"] == 4
    assert "child speaks" in err and "spans: nvtx locale: C" in err
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
