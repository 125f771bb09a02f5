"""The run journal: what a kill, a full disk or a second run may and may not do to it."""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.errors import InputError
from pacore_sched.answers import journal as journal_module
from pacore_sched.answers.journal import Journal, replace_file
from pacore_sched.answers.journal_lines import Expected, RolloutResult
from tests.support import ROOT

HEADER = {"model": "tiny", "widths": (4, 2), "seed": 0}
SEED = 2**62 + 1
EXPECTED = Expected({"a": 0, "b": 0, "photo": 2}, (30, 2, 1), lambda *rollout: SEED)
RESULT = RolloutResult(
    problem="a",
    round=0,
    index=0,
    seed=SEED,
    prompt_tokens=7,
    finish_reason="stop",
    text="four \u20ac\n</think>4",
    num_tokens=3,
    logprob=-0.1234567890123,
)


def results_of(count: int, **changes: object) -> list[RolloutResult]:
    return [replace(RESULT, index=index, **changes) for index in range(count)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "results.journal.jsonl"


def opened(
    path: Path, *, resume: bool, header: dict = HEADER, expected: Expected = EXPECTED
) -> Journal:
    return Journal(path, header, expected, resume=resume).begin()


def begin(path: Path, results: list[RolloutResult]) -> None:
    with opened(path, resume=False) as journal:
        journal.add(results)


def resumed(path: Path, problem: str = "a") -> list[RolloutResult]:
    with opened(path, resume=True) as journal:
        return journal.results(problem)


def test_results_are_read_back(path: Path):
    """A rounded number, or results in the order in which they ended, not by round and index."""
    later = replace(RESULT, round=1)
    later = replace(later, cut=(0, 2), dropped=(1, 29))
    with opened(path, resume=False) as journal:
        journal.add([later, *reversed(results_of(3))])
        assert journal.results("a") == [*results_of(3), later]
        assert journal.results("c") == []
    assert resumed(path) == [*results_of(3), later]


def test_tokens_are_read_back(path: Path):
    """Token ids or log-probabilities that are lost, rounded or of another type."""
    expected = replace(EXPECTED, tokens=True)
    result = replace(RESULT, tokens=(1, 2, 3), logprobs=(-0.5, -1e-9, -3.25))
    with opened(path, resume=False, expected=expected) as journal:
        journal.add([result])
    with opened(path, resume=True, expected=expected) as journal:
        assert journal.results("a") == [result]


def test_tokens_are_written_only_on_request(path: Path):
    """A text-only run whose journal is bloated by token ids."""
    whole = replace(RESULT, tokens=(1, 2), logprobs=(-1.0, -2.0))
    begin(path, [whole])
    assert resumed(path) == [RESULT]
    assert "logprobs" not in path.read_text()


def test_the_journal_is_readable_jsonl_while_it_is_written(path: Path):
    """A line that is buffered instead of written at once, or an answer that is written twice."""
    with opened(path, resume=False) as journal:
        journal.add([RESULT])
        journal.add_answer("a", "4", None)
        journal.add_answer("a", "4", None)
        journal.add_answer("a", "", "an error after the answer, which could not be read back")
        lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["header", "rollout", "answer"]
    assert lines[0] == {
        "kind": "header", "format": 2, "model": "tiny", "widths": [4, 2], "seed": 0,
    }  # fmt: skip
    assert lines[1]["text"] == RESULT.text
    with opened(path, resume=True) as journal:
        journal.add_answer("a", "4", None)
    assert len(path.read_text().splitlines()) == 3


@given(st.data())
def test_cut_anywhere(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject):
    """Complete lines that are lost when the journal was cut off at any byte, or a partial line that
    is kept."""
    path = tmp_path_factory.mktemp("cut") / "journal.jsonl"
    begin(path, results_of(3))
    whole = path.read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    complete = max(whole[:cut].count(b"\n") - 1, 0)
    with opened(path, resume=True) as journal:
        assert journal.results("a") == results_of(complete)
        assert journal.rollouts == complete
        journal.add(results_of(3)[complete:])
    assert path.read_bytes() == whole


def test_damage_in_the_middle_is_named(path: Path):
    """Damage before the last line that is silently dropped: it must be named, and not modified."""
    begin(path, results_of(3))
    lines = path.read_bytes().splitlines(keepends=True)
    damaged = b"".join([*lines[:2], b'{"kind": "rol\n', *lines[3:]])
    path.write_bytes(damaged)
    with pytest.raises(InputError, match="line 3 is damaged"):
        resumed(path)
    assert path.read_bytes() == damaged
    path.write_bytes(b"".join([*lines[:3], b"\0\0\0\n"]))  # as a lost disk page may look
    assert resumed(path) == results_of(2)


@pytest.mark.parametrize("content", [b"my notes", b"my notes\n", b'{"kind": "rollout"}\n', b"[]\n"])
def test_a_file_that_is_not_a_journal_is_not_touched(path: Path, content: bytes):
    """Overwriting a file of the user's that happens to have the journal's name."""
    path.write_bytes(content)
    for resume in (True, False):
        with pytest.raises(InputError, match="is not a run journal"):
            opened(path, resume=resume)
    assert path.read_bytes() == content


def test_nothing_is_overwritten(path: Path):
    """A new run that overwrites the journal of an existing one."""
    begin(path, [RESULT])
    with pytest.raises(InputError, match="continue it with --resume"):
        opened(path, resume=False)
    assert resumed(path) == [RESULT]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"widths": (4,)}, r"widths \[4, 2\], which is \[4\] now"),
        ({"seed": 1}, "seed 0, which is 1 now"),
        ({"stop": ["x"]}, r"stop None, which is \['x'\] now"),
    ],
)
def test_other_settings_are_refused(path: Path, changes: dict, message: str):
    """A resumed run that mixes results of different settings."""
    begin(path, [RESULT])
    with pytest.raises(InputError, match=message):
        opened(path, header=HEADER | changes, resume=True)
    with pytest.raises(InputError, match="model 'tiny', which is None now"):
        opened(path, header={"widths": (4, 2), "seed": 0}, resume=True)


def test_one_run_at_a_time(path: Path):
    """Two runs that write to one journal at the same time, which duplicates rollouts."""
    with (
        opened(path, resume=False),
        pytest.raises(InputError, match="written by another run"),
    ):
        opened(path, resume=True)
    assert resumed(path) == []


def test_a_path_that_cannot_be_written(tmp_path: Path):
    """A traceback, instead of an InputError with the reason, for a missing folder."""
    with pytest.raises(InputError, match=r"cannot write .*nowhere.*: No such file"):
        opened(tmp_path / "nowhere" / "journal.jsonl", resume=False)


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    """Limit files to `size` bytes: a write stores what fits, and the next write fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk(path: Path):
    """A partial line left behind when a write does not fit, or a journal that cannot be resumed."""
    journal = opened(path, resume=False)
    journal.add(results_of(2))
    before = path.read_bytes()
    with (
        disk_of(len(before) + 50),
        pytest.raises(InputError, match="the 2 rollouts in it are safe"),
    ):
        journal.add(results_of(4)[2:])
    assert path.read_bytes() == before
    journal.close()
    with opened(path, resume=True) as journal:
        journal.add(results_of(4)[2:])
        assert journal.results("a") == results_of(4)


def test_no_space_is_one_line(path: Path, monkeypatch: pytest.MonkeyPatch):
    """A message without the system's reason or the remedy, or of several lines."""
    with opened(path, resume=False) as journal:
        with monkeypatch.context() as patch:
            patch.setattr(journal_module.os, "write", full)
            with pytest.raises(InputError) as caught:
                journal.add([RESULT])
        assert "No space left on device" in str(caught.value)
        assert "--resume" in str(caught.value)
        assert "\n" not in str(caught.value)
        journal.add([RESULT])
    assert resumed(path) == [RESULT]


def full(file: int, data: bytes) -> int:
    raise OSError(28, os.strerror(28))


def test_a_write_in_parts(path: Path, monkeypatch: pytest.MonkeyPatch):
    """Lost bytes when the system accepts only a part of a write without being full."""
    write = os.write
    monkeypatch.setattr(journal_module.os, "write", lambda file, data: write(file, data[:10]))
    begin(path, results_of(2))
    assert resumed(path) == results_of(2)


@pytest.mark.cli
def test_killed(path: Path):
    """A rollout lost by kill -9 right after `add`."""
    script = f"""
import os, signal
from tests.pacore_sched.answers.test_journal import *
journal = opened({str(path)!r}, resume=False)
journal.add([RESULT])
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True)
    assert done.returncode == -9
    assert resumed(path) == [RESULT]


def test_fsync_runs_once_a_second(path: Path, monkeypatch: pytest.MonkeyPatch):
    """An fsync for every rollout, which may take ten milliseconds, or none at the end."""
    now, syncs = [0.0], []
    monkeypatch.setattr(journal_module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(journal_module.os, "fsync", lambda file: syncs.append(now[0]))
    with opened(path, resume=False) as journal:
        for index, result in enumerate(results_of(30)):
            now[0] = 0.1 * index
            journal.add([result])
    # After each of two seconds, which rounding of tenths may shift, and at the end.
    assert len(syncs) in (3, 4)


def test_a_file_is_replaced_atomically(tmp_path: Path):
    """A partial results file that is visible, also when the disk fills up or a line raises."""
    path = tmp_path / "results.jsonl"
    replace_file(path, ["one", "\u20ac"])
    assert path.read_text(encoding="utf-8") == "one\n\u20ac\n"
    assert [file.name for file in tmp_path.iterdir()] == ["results.jsonl"]
    seen = []
    replace_file(path, (seen.append(path.read_text(encoding="utf-8")) or "two" for _ in range(2)))
    assert seen == ["one\n\u20ac\n"] * 2
    replace_file(path, ["one", "\u20ac"])
    with disk_of(100), pytest.raises(InputError, match=r"cannot write .*results.jsonl"):
        replace_file(path, ["x" * 1000] * 100)
    with pytest.raises(ZeroDivisionError):
        replace_file(path, (str(1 / n) for n in (1, 0)))
    assert path.read_text(encoding="utf-8") == "one\n\u20ac\n"
    assert [file.name for file in tmp_path.iterdir()] == ["results.jsonl"]


def test_a_draft_is_no_fifo(tmp_path: Path):
    """Waiting for the reader of a FIFO with the temporary name."""
    os.mkfifo(tmp_path / "results.jsonl.partial")
    with pytest.raises(InputError, match="partial is a pipe, socket or device"):
        replace_file(tmp_path / "results.jsonl", ["one"])
