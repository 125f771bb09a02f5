"""The study of continuations in transformers, on a tiny model."""

import json
import sys
from pathlib import Path

import pytest
import torch

from bench import __main__ as command
from bench.generate import study
from bench.generate.study import GenerateCase
from model.config import PRESETS
from model.errors import InputError

WORDS = ["generate", "--model", "tiny", "--device", "cpu", "--repeats", "2"]
SMALL = ["--prompt", "70", "--sequences", "3", "--new-tokens", "4"]
linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")


@linux
@pytest.mark.judge
def test_rows(capsys):
    """Guards rows of one form for the other, times that lack steps, and errors that nothing was
    compared for."""
    assert command.main([*WORDS, *SMALL, "--json"]) == 0
    rows = stock, shared, patched = json.loads(capsys.readouterr().out)["rows"]
    assert tuple(row["impl"] for row in rows) == study.FORMS
    for row in rows:
        assert (row["case"], row["op"], row["failure"]) == ("tiny P70 W3 T4", "generate", None)
        assert row["repeats"] == 2 * 3  # steps after the first
        assert row["p20_us"] <= row["median_us"] <= row["p80_us"]
        assert 0 < row["ttft_us"] < 1e6 * row["seconds"]
        assert row["tokens_per_second"] == pytest.approx(3 * 4 / row["seconds"])
        assert row["peak_bytes"] > 0 and row["roofline_pct"] > 0
    for ours in (shared, patched):
        assert (ours["same_steps"], ours["steps"]) == (4, 4)
        assert 0 < ours["max_err"] < 1e-4
    assert stock["max_err"] is None and shared["max_err"] != patched["max_err"]
    kv = PRESETS["tiny"].decoder.kv_bytes_per_token(4)
    pages = (2 + 3) * 64 * kv
    assert [row["kv_bytes"] for row in rows] == [3 * 73 * kv, pages, pages]


@linux
@pytest.mark.judge
def test_other_tokens(monkeypatch, capsys):
    """Guards the comparison: other tokens, and logits that explain them, must be seen."""
    plain = study.generate

    def differently(model, prompt, **options):
        return plain(model, prompt.flip(1), **options)

    monkeypatch.setattr(study, "generate", differently)
    assert command.main([*WORDS, *SMALL]) == 1
    out = capsys.readouterr().out
    assert "first 0" in out
    assert "FAILED: max error" in out


def test_floor():
    """Guards the floor of a step: weights, and the prompt's KV once for all sequences."""
    step, config = GenerateCase(512, 16, 32).step, PRESETS["smollm2-135m"].decoder
    assert step.tokens == 511 + 16 * 16
    more = GenerateCase(1512, 16, 32).step.bytes(config, torch.float32)
    kv = config.kv_bytes_per_token(4)
    assert more - step.bytes(config, torch.float32) == 1000 * kv


@pytest.mark.judge
def test_mistakes(monkeypatch):
    """Guards the one line for what cannot be measured, before minutes of work."""
    with pytest.raises(InputError, match=r"8,190 and 32 tokens exceed the context of tiny"):
        command.main([*WORDS, "--prompt", "8190"])
    with pytest.raises(InputError, match="unknown preset 'none'"):
        command.main([*WORDS, "--model", "none"])
    with monkeypatch.context() as absent:
        absent.setitem(sys.modules, "transformers", None)
        with pytest.raises(InputError, match="transformers: not installed"):
            command.main([*WORDS, *SMALL])
    monkeypatch.setattr(study, "free_bytes", lambda device: 10**6)
    with pytest.raises(InputError, match=r"copies of the prompt's KV need 0\.\d\d GB, 0\.00 GB"):
        command.main([*WORDS, "--prompt", "1000"])
