"""The rows of a report: which rows are shown, and which numbers are valid."""

import json
from pathlib import Path

import pytest

from bench.report import rows as report_rows
from bench.report.command import write
from bench.rows import jsonl
from bench.rows.schema import NUMBERS, TIMES
from model.errors import InputError
from tests.support.report_rows import BASE, row


def test_latest_row_counts():
    """Guards which of two rows is shown: the later by time, in any order in the file."""
    rows = [
        row("rms_norm", "T1 C64", "triton", 20.0, time="2026-11-27T12:00:00Z"),
        row("rms_norm", "T1 C64", "triton", 30.0, time="2026-11-27T12:30:00+01:00"),  # earlier
        row("rms_norm", "T1 C64", "eager", 50.0, time=None, commit="unknown"),
        row("rms_norm", "T1 C64", "eager", 60.0, time=None, commit="unknown"),
    ]
    (measurements,) = report_rows.by_device(rows)
    assert {r["impl"]: r["median_us"] for r in measurements.timed} == {
        "triton": 20.0,
        "eager": 60.0,
    }
    assert [r["median_us"] for r in measurements.older] == [50.0, 30.0]


def test_a_check_replaces_no_time():
    """Guards times against a later row that only checked errors and has no time."""
    checked = row("rms_norm", "T1 C64", "triton", None, time="2026-11-27T12:00:00Z")
    (measurements,) = report_rows.by_device([row("rms_norm", "T1 C64", "triton", 20.0), checked])
    assert [r["median_us"] for r in measurements.timed] == [20.0] and not measurements.older


@pytest.mark.parametrize("us", [20.0, None])
@pytest.mark.parametrize("whole", [None, "all", "triton"])
def test_a_later_success_replaces_a_failure(whole, us):
    """Guards against a failure, of a form or a whole case, that is shown after a later success."""
    stopped = {"op": "rms_norm", "case": "T1 C64", "impl": whole, "dtype": "bfloat16"}
    stopped |= {"failure": "died", "device": BASE["device"], "time": "2026-11-27T09:00:00Z"}
    good = row("rms_norm", "T1 C64", "triton", us)
    (measurements,) = report_rows.by_device([stopped, good])
    assert [r["failure"] for r in measurements.latest] == [None]
    (measurements,) = report_rows.by_device([stopped | {"time": "2026-11-27T11:00:00Z"}, good])
    assert "died" in [r["failure"] for r in measurements.latest]


@pytest.mark.parametrize("name", (*TIMES, *NUMBERS))
def test_invalid_numbers(name):
    """Guards pictures against values that cannot be drawn: such a row is of kind "other"."""
    for value in ("text", -1, [1], True, float("nan"), 1e400, 10**400):
        whole = row("rms_norm", "T1 C64", "triton", 20.0) | {name: value}
        (measurements,) = report_rows.by_device([whole])
        assert [report_rows.kind_of(r) for r in measurements.latest] == ["other"], value


def test_no_history_outside_git(tmp_path):
    """Guards files outside a git repository, or not yet committed."""
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row("rms_norm", "T1 C64", "triton", 1.0)) + "\n")
    assert report_rows.committed(path) == []


@pytest.mark.parametrize("value", [None, "", ["x"], {"x": 1}, -1, True, 10**400, float("nan"), "x"])
def test_any_value_in_any_field(tmp_path, value):
    """A traceback in a table or picture for rows of other programs, or of other versions."""
    whole = row("rms_norm", "T1 C64", "triton", 20.0)
    path = tmp_path / "rows.jsonl"
    rows = [whole | {name: value} for name in whole if name != "schema"]
    rows += [whole | {"op": "packing", "version": value, "makespan_s": value}]
    rows += [{"new": value, "failure": value}, {}]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    page, *_ = write(report_rows.read([path]), tmp_path / "out")
    assert page.exists()


def test_rows_are_not_written_to_devices():
    """Guards memory: rows are appended to what is in the file, which /dev/zero has without end."""
    with pytest.raises(InputError, match="/dev/zero is a pipe, socket or device"):
        jsonl.append(Path("/dev/zero"), [{}])
