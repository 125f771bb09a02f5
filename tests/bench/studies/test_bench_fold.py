"""`python -m bench fold`: what it reports about the projector's folded weights."""

import json

import pytest
import torch

from bench import __main__ as command
from bench.inputs import views
from bench.studies import fold

CPU = torch.device("cpu")


@pytest.fixture
def small(monkeypatch):
    """The whole command, at a small width."""
    right = fold.run
    monkeypatch.setattr(fold, "run", lambda device: right(device, width=16, channels=24))


def test_rows(small, capsys):
    """Guards the table: both paths err by roundings, fewer of them in fp16, and the fold is exact
    where nothing is rounded."""
    assert command.main(["fold", "--device", "cpu", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [row["dtype"] for row in rows] == ["bfloat16", "float16"]
    for row, roundoff in zip(rows, (2**-8, 2**-11), strict=True):
        assert row["case"] == "C16, 24 of 4096 channels, 49 tokens"
        for path in fold.PATHS:
            assert roundoff / 8 < row[f"{path}_rms_err"] < roundoff
            assert row[f"{path}_rms_err"] < row[f"{path}_max_err"] < 4 * roundoff
        assert row["folded_max_err"] != row["unfolded_max_err"]
        assert row["fp64_max_err"] < 1e-13
    assert command.main(["fold", "--device", "cpu"]) == 0
    assert "folded" in capsys.readouterr().out


def test_a_wrong_fold_fails(small, monkeypatch, capsys):
    """Guards the row in fp64: an error of fp32's size is not what folding costs."""
    right = fold.fold

    def narrow(*weights):
        return tuple(x.double() for x in right(*(weight.float() for weight in weights)))

    monkeypatch.setattr(fold, "fold", narrow)
    assert command.main(["fold", "--device", "cpu"]) == 1
    assert capsys.readouterr().out.count("FAILED: off by") == 2


def test_work():
    """Guards the counts of both paths: the folded one's against the projector's cases, which
    torch's own count checks; the other's against the shapes of w2 and w3."""
    width, out, grid = 8, 12, (52, 52)
    counts = fold.work(grid, width, out, itemsize=2)
    weights = 32 * 16 * 9 + 12 * 32
    assert counts["unfolded_bytes"] == 2 * weights
    assert counts["unfolded_products"] == 169 * weights
    first = 26 * 26 * 16 * 8 * 9
    assert 2 * (first + counts["folded_products"]) == views.projector_flops([grid], width, out)
