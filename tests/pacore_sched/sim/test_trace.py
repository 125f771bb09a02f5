"""Readers of traces against files of all kinds: what they read, and what they refuse."""

import json
import os

import numpy as np
import pytest

from model.errors import InputError
from pacore_sched.sim import trace
from pacore_sched.sim.trace import read_trace, trace_problems
from pacore_sched.sim.workload import SimProblem

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:47.6805900,4808,10
2023-11-16 18:15:46.6805900,374,44
"""


def test_azure_trace(tmp_path):
    """Misreading seven fractional digits, the order of arrival, or times from the first request."""
    path = tmp_path / "AzureLLMInferenceTrace_conv.csv"
    path.write_text(AZURE)
    requests = read_trace(path)
    assert [(r.arrival_s, r.input_tokens, r.output_tokens) for r in requests] == [
        (0.0, 374, 44),
        (1.0, 4808, 10),
    ]
    assert trace_problems(requests)[1] == SimProblem(1.0, 0, 4808, ((10,),))


def test_mooncake_trace(tmp_path):
    """Misreading milliseconds, or losing hash ids."""
    lines = [
        {"timestamp": 3000, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1]},
        {"timestamp": 4500, "input_length": 10, "output_length": 2, "hash_ids": [0]},
    ]
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    first, second = read_trace(path)
    assert (first.arrival_s, first.output_tokens, first.hash_ids) == (0.0, 500, (0, 1))
    assert (second.arrival_s, second.input_tokens) == (1.5, 10)


def test_trace_as_rounds(tmp_path):
    """Rounds from a trace whose rollouts' mean length differs from the trace's outputs."""
    path = tmp_path / "trace.jsonl"
    path.write_text('{"timestamp": 0, "input_length": 9, "output_length": 1000}\n')
    requests = read_trace(path) * 300
    drawn = trace_problems(requests, (16,), 0.5, seed=2)
    assert [len(lengths) for lengths in drawn[0].lengths] == [16, 1]
    lengths = [length for problem in drawn for length in problem.lengths[0]]
    assert np.mean(lengths) == pytest.approx(1000, rel=0.05)
    assert np.log(lengths).std() == pytest.approx(0.5, rel=0.05)
    cut = trace_problems(requests, (16,), 0.5, max_tokens=900)
    assert max(max(problem.lengths[0]) for problem in cut) == 900


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "a.csv",
            "TIMESTAMP,ContextTokens\n",
            "line 1: the columns are .*must include",
        ),
        ("a.csv", AZURE.replace("\n", ",TIMESTAMP\n", 1), "line 1: the columns .*each once"),
        ("a.csv", "", "line 1: the columns are"),
        ("a.csv", AZURE + "2023-11-16 18:15:48,12,\0\n", "line 4: GeneratedTokens is"),
        ("a.csv", AZURE + "x" * 200_000 + "\n", "line 4: field larger than field limit"),
        ("a.csv", AZURE + "2023-11-16 18:15:48,inf,3\n", "line 4: ContextTokens is 'inf'"),
        (
            "a.csv",
            AZURE + f"2023-11-16 18:15:48,{10**30},3\n",
            "integer from 0 to 1,000,000,000",
        ),
        ("a.csv", AZURE + f"2023-11-16 18:15:48,{'9' * 5000},3\n", "line 4: ContextTokens is '999"),
        ("a.csv", AZURE + "2023-11-16 18:15:48,12,many\n", "line 4: GeneratedTokens is 'many'"),
        ("a.csv", AZURE + "yesterday,12,3\n", "line 4: TIMESTAMP is 'yesterday'"),
        ("a.csv", AZURE + "2023-11-16 18:15:48,12\n", "line 4: no GeneratedTokens"),
        ("a.csv", AZURE + "2023-11-16 18:15:48,-1,3\n", "line 4: ContextTokens is '-1'"),
        ("a.csv", AZURE.splitlines()[0] + "\n2023-11-16 18:15:48,0,3\n", "no requests with tokens"),
        ("a.csv", AZURE.splitlines()[0] + "\n", "has no requests"),
        ("a.jsonl", '{"timestamp": 1}\n', "line 1: no input_length"),
        ("a.jsonl", "\n[1]\n", "line 2: not a JSON object"),
        (
            "a.jsonl",
            '{"timestamp": NaN, "input_length": 1, "output_length": 1}',
            "timestamp is nan",
        ),
        ("a.jsonl", '{"timestamp": 1e400, "input_length": 1, "output_length": 1}', "is inf"),
        ("a.jsonl", f'{{"timestamp": {10**400}}}', "timestamp is 1000"),
        ("a.jsonl", '{"timestamp": 1, "input_length": Infinity}', "input_length is inf"),
        ("a.jsonl", '{"timestamp": 1, "input_length": ' + "9" * 5000 + "}", "not a JSON object"),
        ("a.jsonl", "[" * 100_000, "line 1: not a JSON object"),
        ("a.txt", "", r"must end with \.csv or \.jsonl"),
    ],
)
def test_bad_traces_are_named(tmp_path, name, text, message):
    """An error that does not name the file and the line."""
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        read_trace(tmp_path / name)
    assert name in str(caught.value) and len(str(caught.value)) < 500


def test_requests_without_tokens_are_left_out(tmp_path):
    """An hour of a real trace refused for one request that was cancelled: such rows are counted.
    A byte order mark before the first column's name is no part of it."""
    path = tmp_path / "a.csv"
    rows = "2023-11-16 18:15:47,0,7\n2023-11-16 18:15:48,12,0\n"
    path.write_bytes(b"\xef\xbb\xbf" + (AZURE + rows).encode())
    with pytest.warns(UserWarning, match="without input or output tokens are left out: 2"):
        assert len(read_trace(path)) == 2


def test_files_that_are_no_traces(tmp_path, monkeypatch):
    """A wait without end for a FIFO, and memory without end for a file of any size."""
    os.mkfifo(tmp_path / "a.csv")
    (tmp_path / "b.csv").mkdir()
    (tmp_path / "c.csv").write_text(AZURE)
    (tmp_path / "d.csv").write_bytes(AZURE.encode("utf-16"))
    monkeypatch.setattr(trace, "MAX_TRACE_BYTES", 10)
    for name, message in (
        ("a.csv", "must be a file"),
        ("b.csv", "is a directory"),
        ("c.csv", "is larger than"),
        ("none.csv", "No such file"),
    ):
        with pytest.raises(InputError, match=message):
            read_trace(tmp_path / name)
    monkeypatch.undo()
    with pytest.raises(InputError, match="not UTF-8"):
        read_trace(tmp_path / "d.csv")
