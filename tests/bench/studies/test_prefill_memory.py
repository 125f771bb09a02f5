"""The study of a long prompt's memory, on a short one."""

import json
from pathlib import Path

import pytest

from bench import __main__ as command
from bench import peak_memory
from bench.studies.long import prefill_memory
from model.errors import InputError

ARGUMENTS = ["memory", "--tokens", "3000", "--chunk", "512", "--device", "cpu"]
pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")


def test_a_row(capsys):
    """Guards the row: KV pages that count as the prompt's, or a peak that is not this prompt's."""
    before = b"x" * (200 << 20)  # resident before, and freed
    del before
    assert command.main([*ARGUMENTS, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert (row["op"], row["failure"]) == ("prefill_memory", None)
    assert row["shape"] == {"model": "smallest", "tokens": 3000, "chunk": 512}
    assert row["kv_bytes"] == 49 * 64 * 2 * 16 * 4  # pages, tokens, K and V of a head, fp32
    assert 0 <= row["peak_bytes"] < row["bound_bytes"] < 100 << 20


def test_a_peak_beyond_the_bound(monkeypatch, capsys):
    """Guards the judgement: a bound that does not hold must end with exit code 1."""
    monkeypatch.setattr(prefill_memory, "prefill_bytes", lambda *_: -1)
    assert command.main(ARGUMENTS) == 1
    assert "exceeds the bound" in capsys.readouterr().out


def test_refusals(monkeypatch):
    """Guards against an error in the middle, or a number that is not a measurement."""
    with pytest.raises(InputError, match="exceed the context of tiny, 8,192 tokens"):
        command.main(["memory", "--model", "tiny", "--tokens", "8192", "--device", "cpu"])
    monkeypatch.setattr(prefill_memory, "free_bytes", lambda device: 10**6)
    with pytest.raises(InputError, match=r"a prompt of 3000 tokens: needs 0\.\d\d GB, 0\.00 GB"):
        command.main(ARGUMENTS)
    monkeypatch.undo()
    monkeypatch.setattr(peak_memory, "CLEAR", Path("/nonexistent/file"))
    with pytest.raises(InputError, match="cannot measure a CPU's memory here"):
        command.main(ARGUMENTS)
