"""The tables of a report: which columns they have, and rows of unknown kinds."""

import re

import pytest

from bench.report import command as report
from bench.report.rows import by_device
from bench.report.tables import MAX_LENGTH, MAX_ROWS, op_tables, other_tables, run_tables
from tests.support.report_rows import BASE, row


def test_rows_of_several_runs_can_be_told_apart():
    """Guards reports, which show many runs, where a terminal shows one and leaves out its model and
    dtype."""
    names = {"op": "packing", "impl": "fcfs", "makespan_s": 12.25}
    rows = [BASE | names | {"case": case} for case in ("small", "large")]
    (measurements,) = by_device(rows)
    (table,) = run_tables(measurements)
    assert table.header[:4] == ["case", "dtype", "policy", " makespan s"]
    assert [line[0] for line in table.lines] == ["small", "large"]


def test_no_empty_columns():
    """Guards against columns of rates that no row has, and one of ops below the op's name."""
    (measurements,) = by_device([row("rms_norm", "T1", "eager", None, failure="off")])
    (table,) = op_tables(measurements)
    assert table.header == ["case", "impl", "dtype", " max error", "note"]


def test_unknown_kinds():
    """Guards files of other tools: long values and many rows are cut, and the page says so."""
    rows = [{"op": "mystery", "text": "x" * 1000, "us": n / 3} for n in range(1, MAX_ROWS + 2)]
    (measurements,) = by_device(rows)
    (table,) = other_tables(measurements)
    assert table.title == f"mystery: the first {MAX_ROWS} of {MAX_ROWS + 1} rows"
    assert (table.header, len(table.lines)) == (["text", " us"], MAX_ROWS)
    assert table.lines[0] == ("x" * (MAX_LENGTH - 1) + "…", "0.3333")


def test_alignment(tmp_path):
    """Guards the page's numbers against being aligned like names."""
    pytest.importorskip("matplotlib")
    page, *_ = report.write([{"op": "mystery", "name": "a", "us": 1.5}], tmp_path)
    head, *lines = re.findall("<tr>(.*?)</tr>", page.read_text().split("mystery</h4>")[1])
    assert head == '<th>name</th><th class="right">us</th>'
    assert lines == ['<td>a</td><td class="right">1.5</td>']
