"""`bench compare`: the statistic, alternating runs, removal of checkouts, row files.

The statistic is tested on synthetic runs with known ratios, the command on a small repository whose
fake bench package returns fixed times.
"""

import ast
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bench.compare import command as compare
from bench.compare import turns
from bench.compare.slowdown import judge_pairs, judge_rows
from bench.measure import origin as rows
from model.errors import InputError
from model.terminal import Parser

THRESHOLD = 0.1


def options(*arguments: str):
    parser = Parser()
    compare.add_arguments(parser)
    return parser.parse_args(arguments)


def result(capsys, *arguments: str) -> tuple[int, dict]:
    code = compare.run(options(*arguments, "--json"))
    return code, json.loads(capsys.readouterr().out.splitlines()[-1])


def noisy_pairs(draw: np.random.Generator, rounds: int, slowdown: float) -> list:
    """Runs A B B A ... on a shared machine: drifting speed, bursts over several runs, 8 % variation
    between runs, and one run in fifteen that takes three times as long."""
    count = 2 * rounds
    drift = np.cumsum(draw.normal(0, 0.03, count)) + draw.normal(0, 0.02) * np.arange(count)
    burst = np.zeros(count)
    for _ in range(draw.poisson(count / 20)):
        start = draw.integers(count)
        burst[start : start + draw.integers(1, 6)] = draw.uniform(0.3, 1.0)
    outlier = math.log(3) * (draw.random(count) < 1 / 15)
    logs = drift + burst + outlier + draw.normal(0, 0.08, count)
    pairs = []
    for index in range(rounds):
        a, b = logs[2 * index : 2 * index + 2][:: 1 if index % 2 == 0 else -1]
        pairs.append((math.exp(a), slowdown * math.exp(b)))
    return pairs


def verdict(draw: np.random.Generator, slowdown: float) -> str:
    """The command's verdict: each stage judges new pairs, and more of them."""
    for num_processes, retried_verdicts in compare.STAGES:
        pairs = noisy_pairs(draw, 5 * num_processes, slowdown)
        current = judge_pairs(pairs, THRESHOLD).verdict
        if current not in retried_verdicts:
            break
    return current


def test_equal_sides_are_never_reported_as_changed():
    """Guards against false alarms: 200 comparisons of 40 equal rows each on a noisy machine."""
    draw = np.random.default_rng(0)
    verdicts = [verdict(draw, 1.0) for _ in range(200 * 40)]
    assert verdicts.count("slower") + verdicts.count("faster") == 0


@pytest.mark.parametrize(("slowdown", "expected"), [(2.0, "slower"), (0.5, "faster")])
def test_a_doubling_is_found(slowdown, expected):
    """Guards against a statistic so careful that it misses a doubling in noise."""
    draw = np.random.default_rng(1)
    verdicts = [verdict(draw, slowdown) for _ in range(200)]
    assert verdicts.count(expected) >= 195


def pairs_of(*logs: float) -> list:
    return [(1.0, math.exp(value)) for value in logs]


@pytest.mark.parametrize(
    ("logs", "expected"),
    [
        ([0.15] * 9 + [-1.0], "slower"),  # one outlier in ten pairs
        ([0.08] * 10, "same"),  # consistent, but below the threshold
        ([0.3] * 6 + [-0.5] * 4, "unclear"),  # the centre is clear, but pairs disagree
        ([0.3] * 6 + [0.05] * 4, "unclear"),  # or some are below the threshold
        ([0.06, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7], "unclear"),  # large spread
        ([-0.15] * 9 + [1.0], "faster"),
    ],
)
def test_each_rule_of_the_statistic(logs, expected):
    """Guards threshold, spread and agreement: without any one of them a verdict here changes."""
    assert judge_pairs(pairs_of(*logs), THRESHOLD).verdict == expected


def row(median: float, p20: float | None = None, p80: float | None = None, **more) -> dict:
    fields = {"op": "rms_norm", "case": "T1", "impl": "eager", "dtype": "float32", "device": "cpu"}
    times = {"median_us": median, "p20_us": p20 or median, "p80_us": p80 or median}
    return fields | times | {"failure": None} | more


def test_spread_of_rows_is_that_of_repeats_or_else_of_percentiles():
    """Guards row files: wide percentiles, or repeats that differ, must widen the margin."""
    assert judge_rows([row(100)], [row(130)], THRESHOLD).verdict == "slower"
    assert judge_rows([row(100, 80, 125)], [row(130)], THRESHOLD).verdict == "unclear"
    repeats = [row(80), row(100), row(125)]
    assert judge_rows(repeats, [row(130)], THRESHOLD).verdict == "unclear"
    assert judge_rows([row(99), row(100), row(101)], [row(130)], THRESHOLD).verdict == "slower"


FAKE_BENCH = {
    "torch.py": """
import os
float32 = "float32"
def device(name): return name
def set_num_threads(n):
    assert n == 1 and int(os.environ["MALLOC_TRIM_THRESHOLD_"]) > 1 << 30
    assert os.environ["MALLOC_MMAP_MAX_"] == "0"
    for cache in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        assert "bench-caches-" in os.environ[cache]
""",
    "bench/__init__.py": "",
    "bench/rows.py": "def device_name(device): return 'fake'\n",
    "bench/cases.py": """
class Case:
    def __init__(self, op, name): self.op, self.name = op, name
    def bytes(self, dtype): return 1
    def inputs(self, seed, device, dtype): return seed
def cases(device): return [Case("rms_norm", "T1"), Case("rms_norm", "T2"), Case("silu_mul", "T1")]
""",
    "bench/ops.py": """
MAIN_DTYPE = {"cpu": "float32"}
def check_case(case, device, dtype, impls):
    return [{"impl": impl, "failure": None} for impl in impls or ("eager", "portable")]
""",
    "bench/numerics.py": "def form(op, name): return lambda inputs: lambda: (op, name, inputs)\n",
    "bench/timing.py": """
import itertools
TIMES = {"rms_norm": 10.0, "silu_mul": 20.0}
NOISE = itertools.cycle([1.0, 1.03, 0.98, 1.01])
class Timing:
    def __init__(self, us): self.median_us = us
def sets_for(num_bytes, device): return 2
def measure(candidates, *, device, sets, budget_s):
    print("not an answer")
    results = {name: call(sets - 1) for name, call in candidates.items()}
    return {name: Timing(TIMES[op] * next(NOISE)) for name, (op, _, _) in results.items()}
""",
}


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A git repository with a fake bench package; returns its commit(path=text) -> commit id."""
    root, temporary = tmp_path / "repository", tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(turns, "ROOT", root)
    monkeypatch.setattr("tempfile.tempdir", str(temporary))

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), "-c", "user.name=n", "-c", "user.email=e", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def commit(**changes: str) -> str:
        for name, text in (FAKE_BENCH | changes).items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text)
        git("add", "--all")
        git("commit", "--allow-empty", "--quiet", "-m", "for a test")
        return git("rev-parse", "HEAD")

    root.mkdir()
    git("init", "--quiet")
    yield commit
    assert list(temporary.iterdir()) == [], "a checkout was not removed"


def changed(path: str, old: str, new: str) -> dict[str, str]:
    assert old in FAKE_BENCH[path]
    return {path: FAKE_BENCH[path].replace(old, new)}


@pytest.mark.cli
def test_a_planted_slow_down_is_found_and_equal_commits_are_equal(repository, capsys):
    """Guards the whole command, from two commits (or the working tree) to the exit code."""
    before = repository()
    after = repository(**changed("bench/timing.py", '"rms_norm": 10.0', '"rms_norm": 20.0'))
    code, document = result(capsys, before, after, "--device", "cpu")
    verdicts = {(r["op"], r["case"], r["impl"]): r["verdict"] for r in document["rows"]}
    assert code == 1
    assert set(verdicts.values()) == {"slower", "same"}
    assert {key[0] for key, value in verdicts.items() if value == "slower"} == {"rms_norm"}
    again = {r["pairs"] for r in document["rows"] if r["op"] == "rms_norm"}
    assert again == {10}, "a change is measured again with twice as many pairs"
    code, document = result(capsys, after, ".", "--device", "cpu", "--op", "rms_norm")
    assert (code, {r["verdict"] for r in document["rows"]}) == (0, {"same"})
    assert len(document["rows"]) == 4


@pytest.mark.cli
def test_tables_name_what_changed(repository, capsys):
    """Guards the printed op, case, ratio and summary."""
    before = repository()
    after = repository(**changed("bench/timing.py", '"silu_mul": 20.0', '"silu_mul": 10.0'))
    assert compare.run(options(before, after, "--device", "cpu")) == 0
    out = capsys.readouterr().out
    assert "faster in B" in out and "slower in B" not in out
    assert "silu_mul" in out and "0.50" in out and "rms_norm" not in out
    assert "6 rows" in out and "2 faster" in out


@pytest.mark.cli
def test_cases_and_forms_of_one_side_are_named(repository, capsys):
    """Guards against silently omitting a new case, or a form that is wrong in B."""
    before = repository(**changed("bench/cases.py", ', Case("rms_norm", "T2")', ""))
    after = repository(
        **changed(
            "bench/ops.py",
            '"failure": None}',
            '"failure": "off" if (case.op, impl) == ("silu_mul", "portable") else None}',
        )
    )
    code, document = result(capsys, before, after, "--device", "cpu")
    assert code == 1
    assert any("only in" in note and "T2" in note for note in document["notes"])
    assert document["wrong"] == ["silu_mul, T1, portable: B: off"]
    assert {r["verdict"] for r in document["rows"]} == {"same"} and len(document["rows"]) == 3


@pytest.mark.cli
def test_rows_from_before_a_process_died_are_kept(repository, capsys):
    """Guards finished rows against a worker that dies; its last output is reported."""
    before = repository()
    dying = "def measure(candidates, *, device, sets, budget_s):\n"
    after = repository(
        **changed(
            "bench/timing.py",
            dying,
            dying + "    import os, sys\n"
            "    if candidates['eager'](0)[0] == 'silu_mul':\n"
            "        print('no memory', file=sys.stderr, flush=True); os._exit(9)\n",
        )
    )
    code, document = result(capsys, before, after, "--device", "cpu")
    assert code == 1 and len(document["rows"]) == 4
    assert "silu_mul" in document["wrong"][0] and "no memory" in document["wrong"][0]


@pytest.mark.cli
def test_ctrl_c_leaves_no_process_and_no_folder(repository, monkeypatch):
    """Guards against workers and checkouts that remain after Ctrl-C."""
    processes = []
    take = turns.take_turns

    def interrupted(sides, *arguments):
        processes.extend(side._process for side in sides)
        take(sides, *arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(turns, "take_turns", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare.run(options(repository(), ".", "--device", "cpu"))
    assert len(processes) == 2 and all(process.poll() is not None for process in processes)


class FakeSide:
    """A side whose times grow with every request; it logs the order of requests."""

    def __init__(self, name: str, log: list) -> None:
        self.name, self.log = name, log

    def request(self, name: str, forms: list, budget_s: float) -> dict:
        self.log.append(self.name)
        return {form: 100.0 * 1.05 ** len(self.log) for form in forms}


def test_runs_alternate_so_that_drift_cancels():
    """Guards the order: a machine that slows down by 5 % per run must not make B slower."""
    log = []
    pairs = turns.take_turns(
        [FakeSide("A", log), FakeSide("B", log)],
        ("rms_norm", "T1"),
        ["eager"],
        4,
        0.1,
        lambda n: None,
    )
    assert "".join(log) == "ABBAABBA"
    assert judge_pairs(pairs["rms_norm", "T1", "eager"], 0.01).ratio == pytest.approx(1)


def test_the_worker_imports_none_of_our_code_at_the_top():
    """Guards old commits: before the worker knows which checkout to time, it must import nothing
    of ours, whose modules may have moved."""
    nodes = ast.parse(turns.WORKER.read_text()).body
    names = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    names |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    assert {name.split(".")[0] for name in names} <= {*sys.stdlib_module_names}


@pytest.mark.cli
def test_this_checkout_has_the_names_that_the_worker_uses(tmp_path):
    """Guards the worker against renamed functions: it times a real case of the working tree."""
    side = turns.Side("A", rows.ROOT, tmp_path, turns.WorkerOptions("cpu", None, 1))
    try:
        shape = next((op, case) for op, case in side.cases if op == "rms_norm")
        prepared = side.request("prepare", *shape, [])
        assert prepared == {"forms": ["eager", "portable"], "unfit": {}}
        assert all(us > 0 for us in side.request("time", prepared["forms"], 0.001).values())
        with pytest.raises(turns.WorkerError, match="KeyError: 'no-such'"):
            side.request("time", ["no-such"], 0.001)
    finally:
        side.end()


def write_rows(path: Path, *rows: dict) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_row_files(tmp_path, capsys):
    """Guards the comparison of recorded rows: equal keys, repeats, and rows of only one file."""
    a = write_rows(
        tmp_path / "a.jsonl",
        row(100),
        row(101),
        row(50, case="T2"),
        row(10, case="T3"),
        row(5, op="silu_mul"),
    )
    b = write_rows(
        tmp_path / "b.jsonl",
        row(200),
        row(50, case="T2"),
        row(1, case="T3", failure="off") | {"median_us": None},
    )
    code, document = result(capsys, a, b)
    assert code == 1
    assert {r["case"]: r["verdict"] for r in document["rows"]} == {"T1": "slower", "T2": "same"}
    assert document["rows"][0]["ratio"] == pytest.approx(2, rel=0.01)
    assert any("silu_mul" in note and "a.jsonl" in note for note in document["notes"])
    assert document["wrong"] == ["rms_norm, T3, eager, float32: B: off"]
    code, document = result(capsys, b, a, "--shape", "T2")
    assert code == 0 and len(document["rows"]) == 1 and not document["wrong"]


@pytest.mark.parametrize("name", ["median_us", "p20_us", "p80_us"])
@pytest.mark.parametrize("value", [0, -1, float("nan"), 1e400, 10**400, 1e-320, "1", [], True])
def test_invalid_times_name_the_line(tmp_path, name, value):
    """A traceback of the logarithm, or a NaN as a result, for a time that is none."""
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    write_rows(a, row(1))
    write_rows(b, row(1), row(2) | {name: value})
    with pytest.raises(InputError, match=rf"b\.jsonl:2: {name} is .*; it must be from 1e-6 to"):
        compare.run(options(str(a), str(b)))


@pytest.mark.parametrize("name", ["op", "case", "impl", "dtype", "device", "failure"])
def test_invalid_texts_name_the_line(tmp_path, name):
    """A traceback for a list where a text belongs, which cannot be a key."""
    write_rows(tmp_path / "a.jsonl", row(1) | {name: ["x"]})
    with pytest.raises(InputError, match=rf"a\.jsonl:1: {name} is \['x'\]; it must be a text"):
        compare.run(options(*2 * [str(tmp_path / "a.jsonl")]))


def test_rows_without_percentiles(tmp_path, capsys):
    """A KeyError for rows of other tools that have the median only."""
    median_only = {k: v for k, v in row(1).items() if k not in ("p20_us", "p80_us")}
    write_rows(tmp_path / "a.jsonl", median_only)
    write_rows(tmp_path / "b.jsonl", median_only | {"p20_us": None})
    code, document = result(capsys, str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"))
    assert code == 0 and document["rows"][0]["verdict"] == "same"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.jsonl", "other.jsonl"], "A was measured on cpu, B on gpu"),
        (["a.jsonl", "none.jsonl"], "there is no file"),
        (["a.jsonl", "HEAD"], "only be compared with another file"),
        (["no-such-commit", "."], "'no-such-commit' is neither a commit"),
        ([".", ".", "--op", "rms"], "unknown op 'rms'; choose one of"),
        (["a.jsonl", "a.jsonl", "--shape", "T9"], "must share at least one case"),
    ],
)
def test_mistakes_get_one_line(tmp_path, monkeypatch, arguments, message):
    """Guards against tracebacks, and against comparing times of two machines."""
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "a.jsonl", row(1))
    write_rows(tmp_path / "other.jsonl", row(1, device="gpu"))
    with pytest.raises(InputError) as error:
        compare.run(options(*arguments))
    assert message in str(error.value) and "\n" not in str(error.value)
