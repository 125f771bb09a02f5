"""The rows behind a report: which of them count, and what is a number."""

import json

import pytest

from bench.report import rows as report_rows
from tests.support.report_rows import BASE, row


def test_latest_row_counts():
    """Guards which of two rows is shown: the later by its time, whatever the order in the file."""
    rows = [
        row("rms_norm", "T1 C64", "triton", 20.0, time="2026-11-27T12:00:00Z"),
        row("rms_norm", "T1 C64", "triton", 30.0, time="2026-11-27T12:30:00+01:00"),  # earlier
        row("rms_norm", "T1 C64", "eager", 50.0, time=None, commit="unknown"),
        row("rms_norm", "T1 C64", "eager", 60.0, time=None, commit="unknown"),
    ]
    (found,) = report_rows.by_device(rows)
    assert {one["impl"]: one["median_us"] for one in found.timed} == {"triton": 20.0, "eager": 60.0}
    assert [one["median_us"] for one in found.older] == [50.0, 30.0]


def test_a_check_replaces_no_time():
    """Guards times against a later check of the numbers alone, which has none."""
    checked = row("rms_norm", "T1 C64", "triton", None, time="2026-11-27T12:00:00Z")
    (found,) = report_rows.by_device([row("rms_norm", "T1 C64", "triton", 20.0), checked])
    assert [one["median_us"] for one in found.timed] == [20.0] and not found.older


@pytest.mark.parametrize("us", [20.0, None])
@pytest.mark.parametrize("whole", [None, "all", "triton"])
def test_a_case_that_runs_again_failed_no_more(whole, us):
    """Guards against a failure, of a form or a whole case, that outlives the run that mended it."""
    stopped = {"op": "rms_norm", "case": "T1 C64", "impl": whole, "dtype": "bfloat16"}
    stopped |= {"failure": "died", "device": BASE["device"], "time": "2026-11-27T09:00:00Z"}
    good = row("rms_norm", "T1 C64", "triton", us)
    (found,) = report_rows.by_device([stopped, good])
    assert [one["failure"] for one in found.latest] == [None]
    (found,) = report_rows.by_device([stopped | {"time": "2026-11-27T11:00:00Z"}, good])
    assert "died" in [one["failure"] for one in found.latest]


@pytest.mark.parametrize("name", report_rows.NUMBERS)
def test_numbers_that_are_none(name):
    """Guards pictures against values that no axis has: such a row is of no known kind."""
    for value in ("text", -1, [1], True, float("nan"), 1e400):
        whole = row("rms_norm", "T1 C64", "triton", 20.0) | {name: value}
        (found,) = report_rows.by_device([whole])
        assert [report_rows.kind_of(one) for one in found.latest] == ["other"], value


def test_no_history_outside_git(tmp_path):
    """Guards files that are in no repository, or new in one."""
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row("rms_norm", "T1 C64", "triton", 1.0)) + "\n")
    assert report_rows.committed(path) == []
