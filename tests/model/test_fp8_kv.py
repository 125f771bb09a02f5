"""Tests of `python -m bench fp8`, which compares FP8 pages with the model's dtype."""

import math

import pytest
import torch

from bench import __main__ as command
from bench.studies import fp8_kv
from model.step3vl import Step3VL


def test_compare():
    """Guards the numbers, on two distributions over two tokens computed by hand."""
    old = torch.tensor([[0.0, 0.0], [0.0, 0.0]])
    new = torch.tensor([[0.0, math.log(3)], [0.0, math.log(3)]])
    row = fp8_kv.compare(old + 1, new + 1, torch.tensor([0, 1]))
    assert row["kl_mean"] == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert row["loss"] == pytest.approx(math.log(2))
    assert row["loss_fp8"] == pytest.approx(math.log(4 / 3))
    assert row["rms_err"] == pytest.approx(math.log(3) / math.sqrt(2))
    assert row["same_top1"] == 0.0


def test_command(monkeypatch, capsys):
    """Guards the row: FP8 pages differ from those in the model's dtype, which equal themselves."""
    tiny = Step3VL.from_preset("tiny", seed=0)
    monkeypatch.setattr(fp8_kv.Step3VL, "from_preset", lambda *args, **kwargs: tiny)
    monkeypatch.setattr(fp8_kv, "TOKENS", 70)
    row = fp8_kv.run(torch.device("cpu"))[0]
    assert row["tokens"] == 70 and 0 < row["rms_err"] < 0.1 and row["kl_mean"] > 0
    ids = torch.arange(1, 70)
    logits = fp8_kv.logits(tiny, ids)
    assert fp8_kv.compare(logits, fp8_kv.logits(tiny, ids), ids)["kl_p99"] == 0
    assert command.main(["fp8", "--device", "cpu"]) == 0
    assert "same_top1" in capsys.readouterr().out
