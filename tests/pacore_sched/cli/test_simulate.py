"""`python -m pacore_sched simulate`: its tables, JSON document, pictures and error messages."""

import json
import os
import re
import signal
import subprocess
import sys
from multiprocessing import active_children
from pathlib import Path

import pytest

from model.errors import InputError
from model.terminal import Parser
from pacore_sched.cli import simulate
from pacore_sched.sched.view_queue import VISION_BUDGETS
from pacore_sched.sim.report import gains, geometric_mean, medians

ROOT = Path(__file__).parents[3]
FAST = ("--problems", "3", "--max-tokens", "9000", "--max-running", "24", "--jobs", "1")


def run(*arguments):
    parser = Parser(prog="simulate")
    simulate.add_arguments(parser)
    return simulate.run(parser.parse_args(arguments))


def rows_of(capsys, *arguments):
    assert run("--json", *FAST, *arguments) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]


def test_moves_between_gpus(capsys):
    """--no-migrate that moves rollouts, medians over both forms, or columns of one GPU."""
    options = ("--workload", "vqa", "--policy", "fcfs", "--seeds", "1", "--gpus")
    (moved,), (stay,), (alone,) = (
        rows_of(capsys, *options, *gpus) for gpus in (["2"], ["2", "--no-migrate"], ["1"])
    )
    assert moved["migrate"] and moved["moved_rollouts"] > 0
    assert (stay["migrate"], stay["moved_rollouts"], stay["moved_tokens"]) == (False, 0, 0)
    assert alone.keys() == stay.keys() - {
        "migrate",
        "moved_rollouts",
        "moved_tokens",
        "critical_path_s",
    }
    assert 0 < stay["critical_path_s"] == moved["critical_path_s"] < moved["makespan_s"]
    assert len(medians([moved, stay])) == 2 and len(medians([alone])) == 1


def test_table_and_document(capsys):
    """A missing table, no gains, or anything but one document on the last line."""
    assert (
        run("--workload", "vqa", "--seeds", "2", "--policy", "fcfs", "barrier", "--json", *FAST)
        == 0
    )
    *lines, document = capsys.readouterr().out.splitlines()
    text = "\n".join(lines)
    assert "vqa, sigma_w 0.55: medians of 2 seeds" in text
    assert "times faster than baselines and oracle in mean time to answer" in text
    rows = json.loads(document)["rows"]
    assert [(row["policy"], row["seed"]) for row in rows] == [
        ("fcfs", 0),
        ("barrier", 0),
        ("fcfs", 1),
        ("barrier", 1),
    ]


def test_sweep_and_variants(capsys):
    """A missing combination of workload, spread and the three variants of --compare."""
    rows = rows_of(
        capsys,
        *("--workload", "all", "--seeds", "1", "--policy", "later-round-first"),
        *("--sigma-w", "0.35", "0.8", "--compare", "--max-tokens", "65536"),
    )
    keys = {(r["workload"], r["sigma_w"], r["shared_reads"], r["kv_dtype"]) for r in rows}
    assert len(rows) == len(keys) == 4 * 2 * 3
    runs = {
        (r["sigma_w"], r["shared_reads"], r["kv_dtype"]): r for r in rows if r["workload"] == "vl"
    }
    shared, apart, fp8 = ((0.8, *v) for v in ((True, "bf16"), (False, "bf16"), (True, "fp8")))
    assert runs[shared]["makespan_s"] < runs[apart]["makespan_s"]
    assert runs[fp8]["makespan_s"] < runs[shared]["makespan_s"]


def test_processes_do_not_change_rows(capsys):
    """A process pool that changes rows or their order."""
    arguments = ("--workload", "vqa", "--seeds", "2", "--policy", "fcfs", "later-round-first")
    assert rows_of(capsys, *arguments, "--jobs", "2") == rows_of(capsys, *arguments)


def test_arrivals_widths_and_objective(capsys):
    """Ignoring --arrivals, --widths or --slo."""
    common = ("--workload", "vqa", "--seeds", "1", "--policy", "fcfs")
    (plain,) = rows_of(capsys, *common, "--slo", "60")
    (spaced,) = rows_of(capsys, *common, "--arrivals", "poisson", "--rate", "0.0001")
    (wide,) = rows_of(capsys, *common, "--widths", "4,2")
    assert plain["goodput_per_h"] == pytest.approx(3 * 3600 / plain["makespan_s"])
    assert spaced["makespan_s"] > 5 * plain["makespan_s"]
    assert spaced["tta_mean_s"] < plain["tta_mean_s"]
    assert wide["used_tok_s"] < plain["used_tok_s"]


def test_traces_and_chat(capsys, tmp_path):
    """Workloads of single requests that do not run: a trace file and the fitted chat traffic."""
    trace = tmp_path / "trace.jsonl"
    lines = [{"timestamp": 500 * i, "input_length": 300, "output_length": 40} for i in range(5)]
    trace.write_text("\n".join(map(json.dumps, lines)))
    rows = rows_of(
        capsys, "--workload", str(trace), "--seeds", "1", "--policy", "fcfs", "--problems", "4"
    )
    assert rows[0]["workload"] == "trace.jsonl"
    assert rows[0]["used_tok_s"] * rows[0]["makespan_s"] == pytest.approx(4 * 40)
    (chat,) = rows_of(capsys, "--workload", "deepseek-r1", "--seeds", "1", "--policy", "fcfs")
    assert chat["workload"] == "deepseek-r1"


def test_photos(capsys, tmp_path):
    """Photos that cost no time, ignored options, or tables without what only some rows have."""
    common = ("--workload", "photos-720p", "--seeds", "1", "--policy", "fcfs", "--gpu", "h100")
    fast = (*common, *FAST, "--problems", "30")
    budgets = [rows_of(capsys, *fast, "--vision-budget", budget)[0] for budget in VISION_BUDGETS]
    first_tokens = [row["request_ttft_mean_s"] for row in budgets]
    assert first_tokens == sorted(first_tokens, reverse=True) and len(set(first_tokens)) == 3
    (alone,) = rows_of(capsys, *fast, "--concurrency", "1")
    assert alone["request_ttft_p99_s"] < 0.35 and alone["gpu_idle"] > 0.005
    run(*fast, "--concurrency", "4")
    text = capsys.readouterr().out
    assert re.search(r"requests/s +TTFT ms +p50 +p99 +TPOT ms +ITL p99 ms +without the tower", text)
    assert "the GPUs' time in percent, vision budget 'balanced'" in text
    run("--workload", "deepseek-r1", "--seeds", "1", "--policy", "fcfs", *FAST)
    text = capsys.readouterr().out
    assert "requests/s" in text and "tower" not in text


def test_medians_of_rows_with_different_fields():
    """Medians over runs with and without images, or over two vision budgets."""
    row = dict.fromkeys(("workload", "sigma_w", "policy", "gpus", "shared_reads", "kv_dtype"), "x")
    with_images = row | {"vision_budget": "balanced", "gpu_tower": 0.5}
    rows = [row | {"seed": 0}, with_images | {"seed": 0}, with_images | {"seed": 1}]
    assert medians([*rows, with_images | {"seed": 0, "vision_budget": "latency"}]) == [
        row | {"seeds": 1},
        with_images | {"seeds": 2},
        with_images | {"seeds": 1, "vision_budget": "latency"},
    ]


def test_pictures(capsys, tmp_path):
    """Missing or empty pictures, or a file without all rows or with wrong medians."""
    pytest.importorskip("matplotlib")
    out = tmp_path / "made" / "here"
    assert (
        run("--workload", "vqa", "--seeds", "2", "--policy", "fcfs", "--out", str(out), *FAST) == 0
    )
    assert {path.name for path in out.iterdir()} == {
        "vqa-occupancy.png",
        "vqa-answers.png",
        "rows.json",
        "medians.jsonl",
    }
    assert all(path.stat().st_size > 10_000 for path in out.glob("*.png"))
    rows = json.loads((out / "rows.json").read_text())["rows"]
    assert [row["seed"] for row in rows] == [0, 1]
    (line,) = map(json.loads, (out / "medians.jsonl").read_text().splitlines())
    assert (line["policy"], line["seeds"], line["goodput_per_h"]) == ("fcfs", 2, None)
    middle = (rows[0]["makespan_s"] + rows[1]["makespan_s"]) / 2
    assert line["makespan_s"] == pytest.approx(middle, rel=1e-4)
    assert "vqa-answers.png" in capsys.readouterr().out


def test_pictures_without_matplotlib(monkeypatch, tmp_path):
    """Reporting that matplotlib is missing only after minutes of simulation."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(simulate, "simulate_run", lambda run: pytest.fail("simulated in vain"))
    with pytest.raises(InputError, match="pip install matplotlib"):
        run("--out", str(tmp_path), *FAST)


def test_gains():
    """Comparing runs of different problems, or inverted ratios (above 1 is better)."""
    row = {"workload": "w", "sigma_w": 0.5, "seed": 0, "shared_reads": True, "kv_dtype": "bf16"}
    rows = [
        row | {"policy": "fcfs", "tta_mean_s": 30.0},
        row | {"policy": "ours", "tta_mean_s": 20.0},
        row | {"policy": "ours", "tta_mean_s": 1.0, "seed": 1},  # the baseline lacks this seed
    ]
    assert gains(rows, "fcfs", "tta_mean_s") == {"fcfs": [1.0], "ours": [1.5]}
    assert geometric_mean([2.0, 8.0]) == pytest.approx(4.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--workload", "nowhere"), "neither a trace file nor one of vqa"),
        (("--workload", "nowhere.csv"), "nowhere.csv: No such file"),
        (("--policy", "lifo"), "unknown policy 'lifo'"),
        (("--gpu", "b300"), "unknown GPU 'b300'"),
        (("--model", "llama"), "unknown preset 'llama'"),
        (("--gpus", "1000000"), "--gpus: '1000000' is not an integer from 1 to 4,096"),
        (("--problems", "200000", "--workload", "vqa"), "make 17,000,000 rollouts"),
        (("--widths", "0"), "integers from 1 to 65536"),
        (("--max-tokens", "2000", "--workload", "vl"), "must be between 0 and the limit"),
        (("--max-running", "4096"), "--token-budget must be at least --max-running"),
        (("--rate", "1e-320"), "--rate: '1e-320' is not a number from 1e-09 to 1,000,000,000"),
        (("--kv", "fp4"), "invalid choice: 'fp4'"),
        (("--vision-budget", "none"), "invalid choice: 'none'"),
        (("--concurrency", "0"), "--concurrency: '0' is not an integer from 1"),
        (("--concurrency", "2", "--arrivals", "poisson"), "--concurrency and --arrivals exclude"),
        (("--max-tokens", "700000", "--workload", "vqa", "--policy", "fcfs"), "does not fit"),
    ],
)
def test_bad_options(arguments, message):
    """An invalid option that is accepted, or an error that does not name it."""
    with pytest.raises(InputError, match=message):
        run("--jobs", "1", "--problems", "2", *arguments)


def test_out_that_cannot_be_written(tmp_path):
    """Finding out only after the simulation that the folder cannot be created."""
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        run("--out", str(tmp_path / "file" / "folder"), *FAST)


@pytest.mark.parametrize("name", ["rows.json", "medians.jsonl", "vqa-answers.png"])
def test_a_file_that_cannot_be_written(name, monkeypatch, tmp_path):
    """Waiting for ever for a FIFO's reader, or an error, after the simulation."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(simulate, "simulate_run", lambda run: pytest.fail("it began"))
    (tmp_path / name).symlink_to("/dev/null")
    with pytest.raises(InputError, match=f"{name} is a pipe, socket or device"):
        run("--out", str(tmp_path), "--workload", "vqa", *FAST)


def killed(run: simulate.SimRun) -> None:
    """A simulation whose process the system kills for its memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def endless(run: simulate.SimRun) -> None:
    """A simulation that runs for a minute, and says that it has begun."""
    signal.alarm(60)
    os.write(1, b"begun\n")  # at once: both processes write
    signal.pause()


def test_a_killed_process_is_one_line(monkeypatch):
    """A traceback of BrokenProcessPool for a lack of memory."""
    monkeypatch.setattr(simulate, "simulate_run", killed)
    with pytest.raises(InputError, match="was killed, perhaps because memory ran out"):
        run("--workload", "vqa", "--seeds", "2", *FAST[:-1], "2")


def test_ctrl_c_ends_the_processes(monkeypatch):
    """Half a minute between Ctrl-C and the end, until the simulations in progress have ended."""
    processes = []

    def interrupted(futures):
        processes.extend(active_children())
        raise KeyboardInterrupt

    monkeypatch.setattr(simulate, "simulate_run", endless)
    monkeypatch.setattr(simulate, "as_completed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("--workload", "vqa", "--seeds", "2", *FAST[:-1], "2")
    assert [process.exitcode for process in processes] == 2 * [-signal.SIGKILL]


@pytest.mark.cli
def test_no_process_outlives_the_command():
    """Processes that wait for work for ever, with their memory, after their parent was killed."""
    code = (
        "from tests.pacore_sched.cli import test_simulate as t;"
        "t.simulate.simulate_run = t.endless;"
        "t.run('--workload', 'vqa', '--seeds', '2', *t.FAST[:-1], '2')"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout.readline() == b"begun\n"
        process.kill()
        assert process.stdout.read() in (b"", b"begun\n")  # returns when all have ended
