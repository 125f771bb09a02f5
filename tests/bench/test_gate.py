"""`bench gate`: what makes it fail, and that its minimums refer to existing cases."""

import json

import pytest
import torch

from bench import gate
from bench.gate import MIN_SPEEDUPS, MinSpeedup
from bench.rows import show
from bench.suite import cases
from model.terminal import Parser
from profiles.tables.results import OPS_CPU, measured

MINIMUM = MinSpeedup("rms_norm", "T1 C4096", "eager", 2.0, (1.8, 2.2), 1.5)


def run(monkeypatch, capsys, *runs: dict[str, float | str]) -> tuple[int, dict]:
    """Exit code and only row of a gate whose case has the times or failures of `runs`, in order."""
    measurements = iter(runs)
    threads = []

    def time_case(case, device, dtype, impls, budget_s):
        threads.append(torch.get_num_threads())
        times = next(measurements)
        return [
            {"impl": impl, "failure": None, "skipped": None}
            | ({"failure": time} if isinstance(time := times[impl], str) else {"median_us": time})
            for impl in impls
        ]

    monkeypatch.setattr(gate, "time_case", time_case)
    monkeypatch.setattr(gate, "MIN_SPEEDUPS", (MINIMUM,))
    parser = Parser()
    gate.add_arguments(parser)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    code = gate.run(parser.parse_args(["--json"]))
    assert set(threads) == {1} and torch.get_num_threads() == 2
    torch.set_num_threads(before)
    assert next(measurements, None) is None, "a ratio that holds is measured once"
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    return code, row


def test_a_ratio_that_holds(monkeypatch, capsys):
    """Guards the ratio's direction: eager's time over ours."""
    code, row = run(monkeypatch, capsys, {"eager": 16.0, "portable": 10.0})
    assert (code, row["ratio"], row["failure"]) == (0, 1.6, None)


def test_a_ratio_counts_when_it_is_below_twice(monkeypatch, capsys):
    """Guards against a gate that fails from a burst of other work, and one that never fails."""
    low, good = {"eager": 10.0, "portable": 10.0}, {"eager": 20.0, "portable": 10.0}
    assert run(monkeypatch, capsys, low, good)[0] == 0
    code, row = run(monkeypatch, capsys, low, low)
    assert code == 1 and "speed-up 1.00 is below the minimum of 1.5" in row["failure"]


def test_wrong_numbers_fail(monkeypatch, capsys):
    """Guards against a fast form with wrong numbers: it has no ratio."""
    wrong = {"eager": 10.0, "portable": "max error 1 exceeds 0"}
    code, row = run(monkeypatch, capsys, wrong, wrong)
    assert code == 1 and row["ratio"] is None and "max error" in row["failure"]


def test_the_table_lists_every_minimum(capsys):
    """Guards the printed table: a line per minimum with its verdict."""
    fields = {"floor": 1.5, "ratio": 2.0, "failure": None}
    fields |= {"device": "cpu", "torch": "0", "commit": "c"}
    show.gate([vars(MINIMUM) | fields, vars(MINIMUM) | fields | {"ratio": None, "failure": "slow"}])
    out = capsys.readouterr().out
    assert "holds" in out and "FAILED: slow" in out and "1.8..2.2" in out


@pytest.mark.parametrize(
    "minimum", MIN_SPEEDUPS, ids=lambda minimum: f"{minimum.op} {minimum.over}"
)
def test_minimums_have_a_case_and_a_margin(minimum):
    """Guards the table of minimums: each has an existing case and peer, and a margin that noise
    does not reach, in the committed rows too."""
    names = {(case.op, case.name): case for case in cases("cpu")}
    case = names[minimum.op, minimum.case]
    assert minimum.over in ("eager", *case.peers)
    times = {
        row["impl"]: row["median_us"]
        for row in measured(OPS_CPU)
        if (row["op"], row.get("case")) == (minimum.op, minimum.case) and row.get("median_us")
    }
    recorded = times[minimum.over] / times["portable"]
    assert minimum.minimum <= 0.9 * min(minimum.seen[0], minimum.recorded, recorded)
