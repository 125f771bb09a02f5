"""A user's own kernel in the op table: bench.suite.forms.add_form."""

import pytest
import torch

from bench.measure import timing
from bench.measure.ops import time_case
from bench.rows import show
from bench.suite import PEERS, cases
from bench.suite.forms import add_form, select
from kernels.norm import rms_norm
from model.errors import InputError

CPU = torch.device("cpu")
SHAPE = "T1 C4096"


@pytest.fixture(autouse=True)
def few_repeats(monkeypatch):
    """Few repeats, and a table that is what it was after the test."""
    monkeypatch.setattr(timing, "MAX_REPEATS", timing.MIN_REPEATS)
    for op in ("rms_norm", "sample"):
        monkeypatch.setitem(PEERS, op, dict(PEERS.get(op, {})))


def scaled(factor):
    """A `prepare` of rms_norm whose normalised rows are `factor` times too large."""

    def prepare(inputs):
        def call():
            y, total = rms_norm(**inputs, impl="eager")
            return y * factor, total

        return call

    return prepare


def test_a_right_form_is_timed_and_a_wrong_one_is_not(capsys):
    """Guards a user's benchmark: a kernel is timed next to eager and ours, a wrong one shows its
    error and no time, and neither keeps the others out of the table."""
    add_form("rms_norm", "mine", scaled(1))
    add_form("rms_norm", "wrong", scaled(1.01))
    (case,) = select(cases("cpu"), ["rms_norm"], SHAPE)
    rows = {row["impl"]: row for row in time_case(case, CPU, torch.float32)}
    assert list(rows) == ["eager", "portable", "mine", "wrong"]
    for impl in ("eager", "portable", "mine"):
        assert rows[impl]["failure"] is None
        assert rows[impl]["median_us"] > 0
    assert rows["mine"]["speedup"] > 0
    assert rows["wrong"]["median_us"] is None
    assert "exceeds" in rows["wrong"]["failure"]
    assert rows["wrong"]["max_err"] == pytest.approx(0.01, rel=0.01)
    show.times(list(rows.values()))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[3] for line in lines if line[:1] == ["rms_norm"]] == list(rows)
    assert "FAILED:" in next(line for line in lines if "wrong" in line)


def test_a_form_can_be_selected_and_replaced():
    """Guards a second attempt in one process: the latest kernel of a name counts, and `select`
    knows the name."""
    add_form("rms_norm", "mine", scaled(1.01))
    add_form("rms_norm", "mine", scaled(1))
    (case,) = select(cases("cpu"), impls=["mine"], shape=SHAPE)
    (row,) = time_case(case, CPU, torch.float32, ["mine"])
    assert row["failure"] is None


def test_an_op_without_peers_takes_a_form():
    """Guards ops that no library implements."""
    add_form("sample", "mine", scaled(1))
    assert all("mine" in case.peers for case in select(cases("cpu"), ["sample"]))


def test_names_that_are_refused():
    """Guards the reference: a form called "eager" would be compared with itself."""
    with pytest.raises(InputError, match="unknown op 'rms'; choose "):
        add_form("rms", "mine", scaled(1))
    for name in ("eager", "triton", "liger"):
        with pytest.raises(InputError, match=f"form '{name}' is built in"):
            add_form("rms_norm", name, scaled(1))
