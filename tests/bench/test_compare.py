"""`bench compare`: when a slow-down is one, turns, checkouts that leave nothing behind, row files.

The statistic is judged on synthetic runs, whose truth is known; the command on a small repository
whose bench tells times instead of taking them.
"""

import ast
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bench import rows
from bench.compare import command as compare
from bench.compare import turns
from bench.compare.slowdown import judged, unpaired
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
    """Runs A B B A ... of a shared machine: a drifting speed, bursts that last some runs, runs that
    differ by 8 %, and one in fifteen that takes three times as long."""
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
    """As the command comes to it: new pairs, and more of them, for what the next stage decides."""
    for times, doubted in compare.STAGES:
        found = judged(noisy_pairs(draw, 5 * times, slowdown), THRESHOLD).verdict
        if found not in doubted:
            break
    return found


def test_equal_sides_are_never_told_apart():
    """Guards against false alarms: 200 comparisons of 40 equal rows each on a noisy machine."""
    draw = np.random.default_rng(0)
    found = [verdict(draw, 1.0) for _ in range(200 * 40)]
    assert found.count("slower") + found.count("faster") == 0


@pytest.mark.parametrize(("slowdown", "expected"), [(2.0, "slower"), (0.5, "faster")])
def test_a_doubling_is_found(slowdown, expected):
    """Guards against a statistic so careful that it finds nothing, for all that noise does."""
    draw = np.random.default_rng(1)
    found = [verdict(draw, slowdown) for _ in range(200)]
    assert found.count(expected) >= 195


def pairs_of(*logs: float) -> list:
    return [(1.0, math.exp(value)) for value in logs]


@pytest.mark.parametrize(
    ("logs", "expected"),
    [
        ([0.15] * 9 + [-1.0], "slower"),  # one spoilt pair of ten hides nothing
        ([0.08] * 10, "same"),  # sure, but below the threshold
        ([0.3] * 6 + [-0.5] * 4, "unclear"),  # the centre is clear, but pairs disagree
        ([0.3] * 6 + [0.05] * 4, "unclear"),  # or agree on less than counts
        ([0.06, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7], "unclear"),  # all slower, widely
        ([-0.15] * 9 + [1.0], "faster"),
    ],
)
def test_each_rule_of_the_statistic(logs, expected):
    """Guards threshold, spread and agreement: without any one of them a case here changes sides."""
    assert judged(pairs_of(*logs), THRESHOLD).verdict == expected


def row(median: float, p20: float | None = None, p80: float | None = None, **more) -> dict:
    fields = {"op": "rms_norm", "case": "T1", "impl": "eager", "dtype": "float32", "device": "cpu"}
    times = {"median_us": median, "p20_us": p20 or median, "p80_us": p80 or median}
    return fields | times | {"failure": None} | more


def test_spread_of_rows_is_that_of_repeats_or_else_of_percentiles():
    """Guards row files: a wide row, or repeats that differ, must widen the margin."""
    assert unpaired([row(100)], [row(130)], THRESHOLD).verdict == "slower"
    assert unpaired([row(100, 80, 125)], [row(130)], THRESHOLD).verdict == "unclear"
    repeats = [row(80), row(100), row(125)]
    assert unpaired(repeats, [row(130)], THRESHOLD).verdict == "unclear"
    assert unpaired([row(99), row(100), row(101)], [row(130)], THRESHOLD).verdict == "slower"


STAND_IN = {
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
    "bench/rows.py": "def device_name(device): return 'stand-in'\n",
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
    found = {name: call(sets - 1) for name, call in candidates.items()}
    return {name: Timing(TIMES[op] * next(NOISE)) for name, (op, _, _) in found.items()}
""",
}


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A git repository with a bench that tells times; returns its commit(path=text) -> name."""
    root, temporary = tmp_path / "repository", tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(rows, "ROOT", root)
    monkeypatch.setattr("tempfile.tempdir", str(temporary))

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), "-c", "user.name=n", "-c", "user.email=e", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def commit(**changes: str) -> str:
        for name, text in (STAND_IN | changes).items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text)
        git("add", "--all")
        git("commit", "--allow-empty", "--quiet", "-m", "made for a test")
        return git("rev-parse", "HEAD")

    root.mkdir()
    git("init", "--quiet")
    yield commit
    assert list(temporary.iterdir()) == [], "a checkout was left behind"


def changed(path: str, old: str, new: str) -> dict[str, str]:
    assert old in STAND_IN[path]
    return {path: STAND_IN[path].replace(old, new)}


@pytest.mark.cli
def test_a_planted_slow_down_is_found_and_equal_commits_are_equal(repository, capsys):
    """Guards the whole way from two commits to an exit code, the working tree among them."""
    before = repository()
    after = repository(**changed("bench/timing.py", '"rms_norm": 10.0', '"rms_norm": 20.0'))
    code, found = result(capsys, before, after, "--device", "cpu")
    verdicts = {(r["op"], r["case"], r["impl"]): r["verdict"] for r in found["rows"]}
    assert code == 1
    assert set(verdicts.values()) == {"slower", "same"}
    assert {key[0] for key, value in verdicts.items() if value == "slower"} == {"rms_norm"}
    again = {r["pairs"] for r in found["rows"] if r["op"] == "rms_norm"}
    assert again == {10}, "a suspect is measured again, twice as often"
    code, found = result(capsys, after, ".", "--device", "cpu", "--op", "rms_norm")
    assert (code, {r["verdict"] for r in found["rows"]}) == (0, {"same"})
    assert len(found["rows"]) == 4


@pytest.mark.cli
def test_tables_name_what_changed(repository, capsys):
    """Guards what a person sees: op, case, ratio and the sum."""
    before = repository()
    after = repository(**changed("bench/timing.py", '"silu_mul": 20.0', '"silu_mul": 10.0'))
    assert compare.run(options(before, after, "--device", "cpu")) == 0
    out = capsys.readouterr().out
    assert "faster in B" in out and "slower in B" not in out
    assert "silu_mul" in out and "0.50" in out and "rms_norm" not in out
    assert "6 rows" in out and "2 faster" in out


@pytest.mark.cli
def test_cases_and_forms_of_one_side_are_named(repository, capsys):
    """Guards against a silent gap: a new case, and a form that B no longer gets right."""
    before = repository(**changed("bench/cases.py", ', Case("rms_norm", "T2")', ""))
    after = repository(
        **changed(
            "bench/ops.py",
            '"failure": None}',
            '"failure": "off" if (case.op, impl) == ("silu_mul", "portable") else None}',
        )
    )
    code, found = result(capsys, before, after, "--device", "cpu")
    assert code == 1
    assert any("only in" in note and "T2" in note for note in found["notes"])
    assert found["wrong"] == ["silu_mul, T1, portable: B: off"]
    assert {r["verdict"] for r in found["rows"]} == {"same"} and len(found["rows"]) == 3


@pytest.mark.cli
def test_a_process_that_dies_costs_only_what_comes_after(repository, capsys):
    """Guards what is finished: it is told, with what the process said last."""
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
    code, found = result(capsys, before, after, "--device", "cpu")
    assert code == 1 and len(found["rows"]) == 4
    assert "silu_mul" in found["wrong"][0] and "no memory" in found["wrong"][0]


@pytest.mark.cli
def test_ctrl_c_leaves_no_process_and_no_folder(repository, monkeypatch):
    """Guards the user's machine: workers end and checkouts go, whenever it comes."""
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


class Told:
    """A side that answers from a list and writes down when it was asked."""

    def __init__(self, name: str, log: list) -> None:
        self.name, self.log = name, log

    def ask(self, name: str, forms: list, budget_s: float) -> dict:
        self.log.append(self.name)
        return {form: 100.0 * 1.05 ** len(self.log) for form in forms}


def test_turns_alternate_so_that_drift_leaves_the_ratios():
    """Guards the order: a machine that slows down by 5 % with every run is no slow-down of B."""
    log = []
    pairs = turns.take_turns(
        [Told("A", log), Told("B", log)], ("rms_norm", "T1"), ["eager"], 4, 0.1, lambda n: None
    )
    assert "".join(log) == "ABBAABBA"
    assert judged(pairs["rms_norm", "T1", "eager"], 0.01).ratio == pytest.approx(1)


def test_the_worker_begins_without_our_code():
    """Guards commits from before a move: until it knows whose code to time it may import none."""
    nodes = ast.parse(turns.WORKER.read_text()).body
    names = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    names |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    assert {name.split(".")[0] for name in names} <= {*sys.stdlib_module_names}


@pytest.mark.cli
def test_this_checkout_has_the_names_that_the_worker_uses(tmp_path):
    """Guards the worker against renamed functions: it times a real case of the working tree."""
    settings = turns.Settings("cpu", None, 1)
    side = turns.Side("A", rows.ROOT, tmp_path, settings)
    try:
        shape = next((op, case) for op, case in side.cases if op == "rms_norm")
        ready = side.ask("prepare", *shape, [])
        assert ready == {"forms": ["eager", "portable"], "unfit": {}}
        assert all(us > 0 for us in side.ask("time", ready["forms"], 0.001).values())
        with pytest.raises(turns.Refused, match="KeyError: 'no-such'"):
            side.ask("time", ["no-such"], 0.001)
    finally:
        side.end()


def written(path: Path, *found: dict) -> str:
    path.write_text("".join(json.dumps(one) + "\n" for one in found))
    return str(path)


def test_row_files(tmp_path, capsys):
    """Guards the comparison of recorded rows: equal keys, repeats, and rows of one side."""
    a = written(
        tmp_path / "a.jsonl",
        row(100),
        row(101),
        row(50, case="T2"),
        row(10, case="T3"),
        row(5, op="silu_mul"),
    )
    b = written(
        tmp_path / "b.jsonl",
        row(200),
        row(50, case="T2"),
        row(0, case="T3", failure="off") | {"median_us": None},
    )
    code, found = result(capsys, a, b)
    assert code == 1
    assert {r["case"]: r["verdict"] for r in found["rows"]} == {"T1": "slower", "T2": "same"}
    assert found["rows"][0]["ratio"] == pytest.approx(2, rel=0.01)
    assert any("silu_mul" in note and "a.jsonl" in note for note in found["notes"])
    assert found["wrong"] == ["rms_norm, T3, eager, float32: B: off"]
    code, found = result(capsys, b, a, "--shape", "T2")
    assert code == 0 and len(found["rows"]) == 1 and not found["wrong"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.jsonl", "other.jsonl"], "A was measured on cpu, B on gpu"),
        (["a.jsonl", "none.jsonl"], "there is no file"),
        (["a.jsonl", "HEAD"], "only be compared with another file"),
        (["no-such-commit", "."], "'no-such-commit' is neither a commit"),
        ([".", ".", "--op", "rms"], "unknown op 'rms'"),
        ([".", ".", "--rounds", "2"], "--rounds must be 3 or more"),
        ([".", ".", "--budget", "0"], "must be positive"),
        (["a.jsonl", "a.jsonl", "--shape", "T9"], "nothing in common"),
    ],
)
def test_mistakes_get_one_line(tmp_path, monkeypatch, arguments, message):
    """Guards the user from tracebacks, and from times of two machines side by side."""
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "a.jsonl", row(1))
    written(tmp_path / "other.jsonl", row(1, device="gpu"))
    with pytest.raises(InputError) as error:
        compare.run(options(*arguments))
    assert message in str(error.value) and "\n" not in str(error.value)
