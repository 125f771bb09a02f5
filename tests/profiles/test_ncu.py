"""`python -m profiles ncu`: its command line, and its summary of ncu's exports.

tests/profiles/data/ncu_2022_raw.csv is what ncu 2022.3.0 prints with `--page raw --csv` for a
report that comes with it (addConstDouble, on a GPU of 48 bytes of DRAM per cycle), reduced to 47 of
763 columns.
"""

import argparse
import csv
import json
import sys
from pathlib import Path

import pytest
import torch

from model.errors import InputError
from model.terminal import Parser
from profiles.profilers import launch, ncu
from profiles.profilers.ncu_summary import display, summarise

DATA = Path(__file__).parent / "data" / "ncu_2022_raw.csv"
RAW = DATA.read_text()
# Units as later versions spell them, with --print-units base and separated thousands; the counter
# of Hopper's wgmma; two launches, one without figures.
NEW = """\
==PROF== Connected to process 1 (python)
"ID","Kernel Name","Context","dram__bytes_read.sum.per_second","dram__bytes_write.sum.per_second",\
"dram__throughput.avg.pct_of_peak_sustained_elapsed","gpu__time_duration.sum",\
"sm__inst_executed_pipe_tensor_op_gmma.avg.pct_of_peak_sustained_active",\
"sm__inst_executed_pipe_tensor_op_hmma.avg.pct_of_peak_sustained_active"
"","","","byte/s","Gbyte/s","%","ns","%","%"
"0","prefix_attention_kernel","1","3,000,000,000,000","500","72.9","12,345","61.5","0"
"1","merge_kernel","1","n/a","500","n/a","2,000","",""
"""


def options(*words: str) -> argparse.Namespace:
    parser = Parser()
    ncu.add_arguments(parser)
    return parser.parse_args(words)


def changed(column: str, value: str, row: int = 2) -> str:
    """The real export with one cell changed."""
    rows = list(csv.reader(RAW.splitlines()))
    rows[row][rows[0].index(column)] = value
    return "\n".join(",".join(f'"{cell}"' for cell in cells) for cells in rows)


def test_real_export():
    """Guards units, the choice of metrics and shares of stall reasons, against manual sums."""
    (found,) = summarise(RAW, "report")
    assert found["kernel"] == "addConstDouble(int, double *, double, double *)"
    assert found["duration_us"] == pytest.approx(239.008)
    moved = (25.170048e6 + 23.673216e6) / 239.008e-6  # bytes read and written, per second
    assert found["dram_gb_s"] == pytest.approx(204.358281)
    assert found["dram_gb_s"] == pytest.approx(moved / 1e9, rel=1e-3)
    assert (found["dram_pct"], found["tensor_pct"]) == (91.749499, 0.0)
    assert (found["occupancy_pct"], found["possible_occupancy_pct"]) == (74.451195, 100.0)
    assert found["registers"] == 16
    assert list(found["stalls"]) == ["long_scoreboard", "short_scoreboard", "wait"]
    latency = 83.67  # "warp cycles per issued instruction": the sum of all reasons
    assert found["stalls"]["long_scoreboard"] == pytest.approx(66.985584 / latency, rel=1e-3)


def test_later_versions():
    """Guards other spellings of units, thousands, wgmma's counter, and absent figures."""
    attention, merge = summarise(NEW, "report")
    assert attention["duration_us"] == pytest.approx(12.345)
    assert attention["dram_gb_s"] == pytest.approx(3500)
    assert (attention["dram_pct"], attention["tensor_pct"]) == (72.9, 61.5)
    assert merge["duration_us"] == pytest.approx(2)
    missing = ("dram_gb_s", "dram_pct", "tensor_pct", "occupancy_pct", "registers")
    assert [merge[name] for name in missing] == [None] * 5 and merge["stalls"] == {}


def german(text: str) -> str:
    """A raw page as ncu writes it in de_DE: figures with "," and "." exchanged, the rest as is."""
    header, units, *rows = csv.reader(text.splitlines())
    figures = ["__" in name for name in header]
    mark = str.maketrans(",.", ".,")
    rows = [
        [
            cell.translate(mark) if is_figure else cell
            for cell, is_figure in zip(row, figures, strict=True)
        ]
        for row in rows
    ]
    return "\n".join(",".join(f'"{cell}"' for cell in row) for row in (header, units, *rows))


def test_european_numbers():
    """Guards against a factor of 1,000: a German page gives the same figures, because its shares
    tell what its marks are; one that does not tell is refused."""
    assert summarise(german(RAW), "report") == summarise(RAW, "report")
    page = NEW.split("\n", 1)[1]
    assert summarise(german(page), "report") == summarise(page, "report")
    short = '"ID","Kernel Name","gpu__time_duration.sum"\n"","","us"\n"0","f","117.344"\n'
    message = r"line 3, column 'gpu__time_duration.sum': '117.344' may be 117.344 or 117,344.0, and"
    with pytest.raises(InputError, match=f"{message}.* `LC_ALL=C ncu --import REPORT --page raw"):
        summarise(short, "report")
    (found,) = summarise(short.replace("117.344", "117.344000"), "report")
    assert found["duration_us"] == pytest.approx(117.344)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed", "6577.000000", "is impossible"),
        ("sm__warps_active.avg.pct_of_peak_sustained_active", "101.100000", "is impossible"),
        ("gpu__time_duration.sum", "-1.000000", "is impossible"),
        ("sm__throughput.avg.pct_of_peak_sustained_elapsed", "46,5", "of different locales"),
    ],
)
def test_impossible_figures_are_refused(column, value, message):
    """Guards the figures against marks that were lost or changed on the way."""
    with pytest.raises(InputError, match=f"report, line 3, column '{column}'.*{message}.*LC_ALL=C"):
        summarise(changed(column, value), "report")


def test_more_than_the_peak():
    """Guards real reports: shares from two passes can exceed 100 %, and ncu does not clamp them."""
    column = "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed"
    (found,) = summarise(changed(column, "104.200000"), "report")
    assert found["dram_pct"] == 104.2


def test_odd_figures_and_rows(capsys):
    """Guards the other figures and launches: an odd one is left out and counted, an absent one is
    not; nor is one that is cut in its last cell read. Two pages in one file; Blackwell's names."""
    page = NEW.replace('"n/a","500"', '"x","500"').replace("dram__bytes_", "dram__bytes_op_")
    with pytest.warns(UserWarning, match="report: rows left out, .*: 2; line 5: .* has 'x', no n"):
        attention, merge = summarise(page + '"2","cut_kernel","1","3', "report")
    assert attention["dram_gb_s"] == pytest.approx(3500) and merge["dram_gb_s"] is None
    (found,) = summarise(changed("gpu__time_duration.sum", "(!) nan"), "report")
    assert found["duration_us"] is None
    display([found], "report")
    assert "addConstDouble" in capsys.readouterr().out
    assert summarise(NEW + RAW, "report") == summarise(NEW, "report") + summarise(RAW, "report")
    with pytest.warns(UserWarning, match="report: repeated rows, .*: 1"):
        assert summarise(RAW + RAW, "report") == summarise(RAW, "report")
    with pytest.warns(UserWarning, match="report: rows left out, .*: 1; line 5"):
        assert summarise(NEW.removesuffix('"\n'), "report") == [attention | {"dram_gb_s": 3500}]
    with pytest.raises(InputError, match="or no launch after it; line 3: 2 cells, where the head"):
        summarise("\n".join([*RAW.splitlines()[:2], '"0","2489']), "report")


def test_messages_between_launches(recwarn):
    """Guards the launches after a message, which is no row that was left out."""
    lines = NEW.splitlines(keepends=True)
    lines.insert(4, "==WARNING== 1, 2, 3 counters are missing\n")
    assert summarise("".join([*lines, "==PROF== Disconnected, 0"]), "x") == summarise(NEW, "x")
    assert not recwarn.list


def test_tensor_cores_of_blackwell():
    """Guards the name of the counter that `ncu --query-metrics --chips gb100` lists."""
    old = "sm__inst_executed_pipe_tensor_op_gmma."
    new = "sm__pipe_tensor_subpipe_hmma_cycles_active."
    assert summarise(NEW.replace(old, new), "x")[0]["tensor_pct"] == 61.5


def test_selected_is_no_reason_to_wait():
    """Guards the stall list against "selected", the one "reason" that is work."""
    text = changed("smsp__average_warps_issue_stalled_selected_per_issue_active.ratio", "500")
    (found,) = summarise(text, "report")
    assert list(found["stalls"])[0] == "long_scoreboard"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            RAW.replace("gpu__time_duration.sum", "time"),
            "no column 'gpu__time_duration.sum'; there are",
        ),
        (RAW.replace("Kernel Name", "Kernel"), "not the output of `ncu --import REPORT --page raw"),
        ("==ERROR== nothing", "not the output of `ncu --import REPORT --page raw"),
        ("\n".join(RAW.splitlines()[:2]), "no row of units, or no launch"),
        ("\n".join(RAW.splitlines()[:1]), "no row of units, or no launch"),
        ("\n".join([RAW.splitlines()[0], RAW.splitlines()[2]]), "no row of units, or no launch"),
        (RAW.replace('"usecond"', '"days"'), "line 3, .*: the unit is 'days'; it must be ns, us"),
        ('"ID","Kernel Name","Metric Name"\n"0","f","x"\n', "one metric per line; export with"),
    ],
)
def test_what_is_missing_is_named(text, message):
    """Guards other pages and new versions: an error message, no wrong figure and no traceback."""
    with pytest.raises(InputError, match=message):
        summarise(text, "report")


def test_command_line():
    """Guards ncu's command line: one op, only its kernels, warm; explicit caches and clocks."""
    parsed = options("--op", "rms_norm", "--shape", "T16", "--impl", "triton", "--out", "d")
    assert ncu.command_line("ncu", parsed) == [
        "ncu", "--set=full", "--target-processes=all", "--profile-from-start=off",
        "--cache-control=all", "--clock-control=none", "--force-overwrite", "--export=d/rms_norm",
        sys.executable, "-m", "profiles", "launch", "--op", "rms_norm",
        "--shape", "T16", "--impl", "triton", "--device=cuda",
    ]  # fmt: skip
    parsed = options("--op", "x", "--kernel", "merge", "--skip", "1", "--count", "2")
    line = ncu.command_line("ncu", parsed)
    assert {"--kernel-name=regex:merge", "--launch-skip=1", "--launch-count=2"} < set(line)


def test_mistakes(monkeypatch, tmp_path):
    """Guards the one-line messages for a missing op, tool, GPU or report."""
    with pytest.raises(InputError, match="say what to profile"):
        ncu.run(options())
    with pytest.raises(InputError, match="there is no report"):
        ncu.run(options("--summarise", str(tmp_path / "x.ncu-rep")))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match="ncu is not on the PATH: install .* profiles torch"):
        ncu.run(options("--op", "rms_norm"))
    monkeypatch.setattr(ncu, "tool", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="ncu needs a GPU"):
        ncu.run(options("--op", "rms_norm"))


def test_summary_of_a_file(capsys):
    """Guards exports from other machines: a raw CSV needs no tool here. Both text and JSON."""
    assert ncu.run(options("--summarise", str(DATA), "--json")) == 0
    assert json.loads(capsys.readouterr().out)["launches"] == summarise(RAW, "x")
    display(summarise(NEW, "report"), "report")
    shown = capsys.readouterr().out
    assert "3,500" in shown and "61.5 %" in shown


class Cudart:
    def __init__(self, log: list) -> None:
        self.cudaProfilerStart = lambda: log.append("start")
        self.cudaProfilerStop = lambda: log.append("stop")


def test_launch_marks_only_warm_calls(monkeypatch):
    """Guards what ncu and nsys see: compilation comes before the marks; all calls and the wait for
    the last kernel are between them."""
    log = []
    monkeypatch.setattr(torch.cuda, "cudart", lambda: Cudart(log))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    launch.between_marks(lambda: log.append("call"), 2, torch.device("cuda"))
    assert log == ["call"] * launch.WARM_UP + ["wait", "start", "call", "call", "wait", "stop"]


def test_launch_runs_a_case(capsys):
    """Guards the command on a real op, and its error messages."""
    parser = Parser()
    launch.add_arguments(parser)
    words = ["--op", "rms_norm", "--device", "cpu"]
    assert launch.run(parser.parse_args([*words, "--impl", "eager", "--dtype", "bf16"])) == 0
    assert "1 x rms_norm" in (shown := capsys.readouterr().out) and "eager, bfloat16" in shown
    with pytest.raises(InputError, match="unknown op 'norm'"):
        launch.run(parser.parse_args(["--op", "norm", "--device", "cpu"]))
    with pytest.raises(InputError, match="no case has 'T0 '"):
        launch.run(parser.parse_args([*words, "--shape", "T0 "]))
