"""Columns and tables: cells, headings, and how the terminal, Markdown and HTML show them."""

import sys

import pytest

from bench.rows.columns import Column, Kind, Table, columns_of, make_table, markdown
from bench.rows.formats import config_text, error, microseconds, number, percent, rate, spread
from bench.rows.show import print_table, show

NAME, US = Column("name", "name"), Column(" us", "us", microseconds)
JUNK = ("text", [1], {"a": 1}, True, float("nan"), float("inf"), 10**400)


def test_cells_without_a_value_are_empty():
    """Guards rows of older versions: a missing field or None is an empty cell, 0 is a number."""
    table = make_table("t", (NAME, US), [{"name": "a"}, {"name": None, "us": 0}, {"us": 1234.5}])
    assert table == Table("t", ["name", " us"], [("a", ""), ("", "0.0"), ("", "1,234")])


def test_a_function_of_the_row():
    """Guards computed cells: the format gets the function's value, and None is an empty cell."""
    double = Column(" twice", lambda row: 2 * row["n"] if row["n"] else None, number(".1f"))
    assert [double.cell({"n": n}) for n in (3, None)] == ["6.0", ""]


def test_optional_columns_need_a_value():
    """Guards the width of tables: an optional column is left out without values, not with one, and
    any other column stays."""
    columns = (US, Column("note", "note", optional=True))
    assert make_table("", columns, [{}, {}]).header == [" us"]
    filled = make_table("", columns, [{}, {"note": "x"}])
    assert (filled.header, filled.lines) == ([" us", "note"], [("", ""), ("", "x")])
    assert make_table("", columns, []) == Table("", [" us"], [])


def test_alignment(capsys):
    """Guards numbers below each other: a heading that begins with a space aligns right, also below
    a long value, in the terminal and in Markdown."""
    table = make_table("times", (NAME, US), [{"name": "x" * 30, "us": 5}, {"name": "b", "us": 1e6}])
    print_table(table)
    assert capsys.readouterr().out.splitlines() == [
        "",
        "times",
        f"name{' ' * 26}         us",
        f"{'x' * 30}        5.0",
        f"b{' ' * 29}  1,000,000",
    ]
    assert markdown(Table("", ("", "left", " right"), [["a", "b", "1"], ["", "b", "2"]])) == (
        "| | left | right |\n|---|---|---:|\n| a | b | 1 |\n| | b | 2 |"
    )


def test_a_name_is_text(monkeypatch, capsys):
    """Guards names that look like markup: pipes in Markdown, rich's tags on a terminal, and braces
    in the values that a title names."""
    name = "a|b [bold]c[/bold] [/d] {e}"
    kind = Kind("of {name}", (NAME,))
    table = kind.table([{"name": name}])
    assert table.title == f"of {name}"
    assert markdown(table).splitlines()[-1] == r"| a\|b [bold]c[/bold] [/d] {e} |"
    pytest.importorskip("rich")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    show(kind, [{"name": name}])
    assert capsys.readouterr().out.count(name) == 2


def test_formats():
    """Guards digits, signs and units, and values of other tools that are no numbers: they are shown
    as they are, and none ends a report."""
    assert [microseconds(us) for us in (0.04, 999.94, 1000, 12345.6)] == [
        "0.0",
        "999.9",
        "1,000",
        "12,346",
    ]
    assert [number(",.2f", per=1e6)(1_234_567_890), number(".1f", unit=" %")(5)] == [
        "1,234.57",
        "5.0 %",
    ]
    assert [percent("+.1f")(-0.0123), percent(".1f", unit="")(0.5)] == ["-1.2 %", "50.0"]
    assert error(0.00123) == "1.2e-03"
    assert config_text({"block": 64, "num_warps": 4}) == "block=64 num_warps=4"
    for write in (microseconds, number(",.1f"), percent(".0f")):
        assert [write(value) for value in JUNK] == [str(value) for value in JUNK]


def test_fields_of_times():
    """Guards percentiles and rates: their units, and rows without a time."""
    row = {"p20_us": 900, "median_us": 1000.0, "p80_us": 1100, "bytes": 5_000_000}
    times = Column("", spread())
    assert [times.cell(r) for r in (row, row | {"p80_us": None}, {})] == ["900.0..1,100", "", ""]
    gb_s = Column("", rate("bytes", 1e3), number(".1f"))
    assert [gb_s.cell(r) for r in (row, row | {"median_us": None}, {})] == ["5.0", "", ""]


def test_columns_of_unknown_rows():
    """Guards tables of rows of an unknown kind: each field that has a value, in order; floats align
    right."""
    rows = [{"op": "x", "name": "a", "none": None}, {"op": "x", "us": 1.5, "name": "b"}]
    columns = columns_of(rows, omit=("op",))
    assert [column.heading for column in columns] == ["name", " us"]
    assert make_table("", columns, rows).lines == [("a", ""), ("b", "1.5")]
