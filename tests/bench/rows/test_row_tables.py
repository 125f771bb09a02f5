"""The tables of each kind of row: what they show, compare and leave out."""

import pytest

from bench.report.rows import OURS
from bench.rows import op_tables, run_tables, show
from bench.rows.columns import make_table
from kernels.runtime.dispatch import IMPLS
from tests.support.report_rows import BASE, part, row


def cells(kind, rows):
    """The table's lines, each as heading -> cell."""
    table = kind.table(rows)
    return [dict(zip(map(str.strip, table.header), line, strict=True)) for line in table.lines]


def test_times():
    """Guards the op table: a form without a time has its reason instead of rates, a wrong one that
    was timed has both, and a skipped one has no line."""
    timed = row("op", "c", "triton", 2000.0, num_bytes=4e6, flops=6e9, max_err=0.5)
    rows = [
        timed | {"settings": "s", "timer": "events", "tokens_per_second": 1234.5},
        timed | {"failure": "off"},
        row("op", "c", "eager", None, failure="out of memory"),
        row("op", "c", "fa3", None, skipped="not installed"),
    ]
    good, wrong, failed = cells(op_tables.OPS, rows)
    assert good == {
        **{"op": "op", "case": "c", "impl": "triton", "dtype": "bfloat16"},
        **{"median us": "2,000", "p20..p80": "1,800..2,400", "GB/s": "2.0", "TFLOP/s": "3.000"},
        **{"% roofline": f"{timed['roofline_pct']:.1f}", "x eager": "", "max error": "5.0e-01"},
        "note": "s, launches included, 1,234.5 tokens/s",
    }
    assert (wrong["median us"], wrong["note"]) == ("2,000", "WRONG: off")
    assert (failed["GB/s"], failed["% roofline"], failed["note"]) == (
        *("", ""),
        "FAILED: out of memory",
    )


def test_share_of_the_data_sheets_peak():
    """Guards rows from before the field: they have no empty column for it."""
    old, new = row("op", "c", "triton", 1.0), row("op", "c", "triton", 1.0, peak_fraction=0.456)
    assert "% peak" not in cells(op_tables.OPS, [old])[0]
    header = op_tables.OPS.table([old, new]).header
    assert header.index(" % peak") == header.index(" % roofline") + 1
    assert [line["% peak"] for line in cells(op_tables.OPS, [old, new])] == ["", "45.6"]


def test_largest_errors():
    """Guards the table of errors: the largest of all cases, a failure over any number, nothing
    where there is no row, and no skipped forms."""
    rows = [
        row("op", "c", "triton", None, max_err=0.25),
        row("op", "d", "triton", None, max_err=0.5),
        row("op", "c", "triton", None, dtype="float32", max_err=9.0),
        row("op", "d", "triton", None, dtype="float32", failure="off", max_err=None),
        row("op", "c", "eager", None, max_err=None),
        row("op", "c", "fa3", None, dtype="float16", skipped="not installed"),
    ]
    assert cells(op_tables.errors(rows), rows) == [
        {
            **{"op": "op", "impl": "triton"},
            **{"bfloat16": "5.0e-01", "float32": "FAILED", "float16": ""},
        },
        {"op": "op", "impl": "eager", "bfloat16": "", "float32": "", "float16": ""},
    ]


def test_parts_add_up_to_their_own_step():
    """Guards shares against the sum of another form's parts."""
    parts = [part("c", "default", "linear", 30.0), part("c", "default", "sample", 10.0)]
    parts.append(part("c", "eager", "linear", 31.0))
    assert [
        (line["us, profiled"], line["time by part"])
        for line in cells(op_tables.DECODE_PARTS, parts)
    ] == [
        ("40", "linear 75%, sample 25%"),
        ("31", "linear 100%"),
    ]


def test_setups_are_compared_with_the_first_of_their_case():
    """Guards the gains from packing: in a report, rows of two models are next to each other."""
    rows = [
        BASE | {"op": "packing", "case": case, "impl": policy, "makespan_s": s, "tta_mean_s": s / 2}
        for case, policy, s in (("a", "one", 8.0), ("a", "all", 2.0), ("b", "one", 3.0))
    ]
    rows[1] |= {"drafted": 10, "accepted": 7, "tta_mean_s": 0}
    first, second, other = cells(run_tables.PACKING, rows)
    assert (first["x makespan"], second["x makespan"], other["x makespan"]) == (
        "1.00",
        "4.00",
        "1.00",
    )
    assert (second["x time to answer"], second["drafts accepted"]) == ("", "7 of 10")


@pytest.mark.parametrize("op", run_tables.RUNS)
def test_runs_say_why_they_failed(op):
    """Guards against a failed run in a table of good ones; without failures there is no column."""
    kind, good = run_tables.RUNS[op], row(op, "c", "default", 5.0)
    assert "" not in kind.table([good]).header
    assert kind.table([good, good | {"failure": "off"}]).lines[1][-1] == "FAILED: off"


@pytest.mark.parametrize("op", run_tables.RUNS)
@pytest.mark.parametrize("value", [None, "text", -1, 0, [1], {"a": 1}, True, 10**400])
def test_runs_of_other_tools(op, value):
    """Guards reports against fields of wrong types: they are shown as they are."""
    kind = run_tables.RUNS[op]
    names = {column.field for column in kind.columns if isinstance(column.field, str)}
    names |= {"drafted", "accepted", "makespan_s", "tta_mean_s"}
    for name in names - {"case"}:
        rows = [row(op, "c", "default", 5.0), row(op, "c", "default", 5.0) | {name: value}]
        make_table("", kind.columns, kind.lines(rows))


def test_tuning(capsys):
    """Guards `tune`: every candidate has a line before measuring; after it, the best is marked."""
    names = {"part": "rms_norm", "key": "C4096"}
    configs = [{"block": 64}, {"block": 128, "num_warps": 4}]
    show.tuning([names | {"candidates": configs, "cases": ["T1", "T16"]}])
    assert [line.split()[2:] for line in capsys.readouterr().out.splitlines()[3:]] == [
        ["block=64", "T1;", "T16"],
        ["block=128", "num_warps=4", "T1;", "T16"],
    ]
    measured = row("rms_norm", "T1", "triton", 5.0) | names
    rows = [measured | {"tiles": config, "chosen": config == configs[1]} for config in configs]
    rows.append(measured | {"tiles": {}, "chosen": False, "failure": "off"})
    assert [line[""] for line in cells(op_tables.TUNED, rows)] == ["", "chosen", "FAILED: off"]


def test_names_of_our_forms():
    """Guards the colours of reports, which do not import the kernels, against a new form."""
    assert ("default", *(impl for impl in IMPLS if impl != "eager")) == OURS
