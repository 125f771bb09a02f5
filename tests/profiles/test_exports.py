"""How profilers' exports write numbers: units, absent values, locales; and mangled exports."""

import csv
import io
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.errors import InputError
from profiles.__main__ import main
from profiles.profilers import ncu_summary, nsys_summary
from profiles.profilers.exports import Export, read_text
from profiles.profilers.numbers import DURATION, PERCENT, PLAIN, RATE, absent

DATA = Path(__file__).parent / "data"
HEADER = "Name,Start (ns),Amount (MB),Count\n"
C, ENGLISH, GERMAN, FRENCH, SWISS = (
    (".", ""),
    (".", ","),
    (",", "."),
    (",", "\u202f"),
    (".", "\u2019"),
)


def written(value: float, digits: int, locale: tuple[str, str]) -> str:
    """A number in a locale: its decimal mark, its separator of thousands."""
    decimal, group = locale
    return f"{value:,.{digits}f}".translate({ord(","): group or None, ord("."): decimal})


def export(text: str) -> Export:
    return Export(text, "x.csv", {"kind": ("Start",)}, "export again")


def numbers(*cells: str) -> list[float | None]:
    """Cells of a column that has a unit, as one export."""
    rows = "".join(f'a,1,"{cell}",1\n' for cell in cells)
    (table,) = export(HEADER + rows).tables["kind"]
    return [table.number(row, "Amount", PLAIN) for row in table.rows]


@pytest.mark.parametrize(
    ("cells", "values"),
    [
        (["117.344", "65,77"], [117344, 65.77]),
        (["117,344", "65.77"], [117344, 65.77]),
        (["117,344", "1,234,567"], [117344, 1234567]),
        (["117.344", "1.234.567"], [117344, 1234567]),
        (["117.344", "0.500"], [117.344, 0.5]),
        (["117,344", "1\u202f234,5"], [117.344, 1234.5]),
        (["117.344", "1\u2019234.5"], [117.344, 1234.5]),
        (["117.344", "1234.567"], [117.344, 1234.567]),
        (["1.234,5", "7.0e2"], None),
        (["12,34,567.5", "1,234"], [1234567.5, 1234]),
        (["1,5e+06", "1.234"], [1.5e6, 1234]),
        (["117.344", "12"], None),
        (["117.344", "1,234"], None),
        (["65,77", "65.77"], None),
        (["12", "345"], [12, 345]),
        (["1e40", "x", "1.2.3", "5 (1; 4)", "0x10", "1_0", "\u0661"], [None] * 7),
    ],
)
def test_marks_are_decided_by_the_whole_export(cells, values):
    """Guards against a factor of 1,000: a mark means what it must mean in another number of the
    export, and an export that leaves it open, or contradicts itself, is refused."""
    if values is None:
        with pytest.raises(InputError, match=r"x.csv, line \d, column 'Amount'.*; export again"):
            numbers(*cells)
    else:
        assert numbers(*cells) == values


def test_columns_without_unit_decide_nothing():
    """Guards ncu's compute capability "9.0" and its list of TPCs "0,1" in a German export."""
    (table,) = export(HEADER + '9.0,1,"65,77",2\n"0,1",2,1.234,3\n').tables["kind"]
    assert [table.number(row, "Amount", PLAIN) for row in table.rows] == [65.77, 1234]


def test_absent_values():
    """Guards the spellings of nothing; words and zero are something."""
    spellings = ("", " ", "n/a", "N/A", "None", "(null)", "nan", "-nan", "-nan(ind)", "inf", "-inf")
    for text in (*spellings, "(!) n/a", "(!) nan", "no data", "<null>", "-", "NULL"):
        assert absent(text), text
    for text in ("0", "-1", "nano", "information", "none of these", "(null) x"):
        assert not absent(text), text


def test_units():
    """Guards the spellings of units in 2022 and later, and factors of 1,000 and 1,024."""
    for unit in ("us", "usec", "usecond", "\u00b5s", "\u03bcs"):
        assert DURATION.factor(unit) == 1
    assert [DURATION.factor(unit) for unit in ("ns", "nsecond", "ms", "s", "second")] == [
        pytest.approx(factor) for factor in (1e-3, 1e-3, 1e3, 1e6, 1e6)
    ]
    for unit in ("Gbyte/s", "Gbyte/second", "GB/s"):
        assert RATE.factor(unit) == 1
    assert RATE.factor("byte/s") == 1e-9 and RATE.factor("Tbyte/s") == 1e3
    assert RATE.factor("KiB/s") == 1024e-9
    for unit in ("", "days", "Gbyte", "Gbit/s", "%", "i/s", "iB/s", "cycle"):
        assert DURATION.factor(unit) is None and RATE.factor(unit) is None
    assert PERCENT.factor("%") == 1 and PERCENT.factor("ratio") is None


def test_encodings(tmp_path):
    """Guards marks of byte order, UTF-16 as PowerShell writes, ends of lines, and a NUL."""
    text = "Start (ns),Amount (MB),Name\n1,1.5,a\n"
    for content in (
        text.encode("utf-8-sig"),
        text.encode("utf-16"),
        text.replace("\n", "\r\n").encode(),
        text.replace("\n", "\r").encode(),
        b"\xff\x00\n" + text.encode("utf-8-sig"),
    ):
        (tmp_path / "x.csv").write_bytes(content)
        tables = export(read_text(tmp_path / "x.csv")).tables["kind"]
        assert [row.cells for row in tables[0].rows] == [("1", "1.5", "a")]


def test_a_column_that_occurs_twice():
    """Guards against reading either of two columns with one name."""
    (table,) = export("Start (ns),Start (us),b\n1,2,3\n").tables["kind"]
    with pytest.raises(InputError, match="x.csv: two columns 'Start'"):
        table.number(table.rows[0], "Start", DURATION)


METRICS = {  # by name: unit, values
    "gpu__time_duration.sum": ("us", st.floats(0.01, 1e6)),
    "dram__bytes.sum.per_second": ("Gbyte/s", st.floats(0, 5e3)),
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": ("%", st.floats(0, 100)),
    "launch__registers_per_thread": ("register/thread", st.integers(16, 255)),
}
LAUNCHES = st.lists(
    st.fixed_dictionaries({name: values for name, (_, values) in METRICS.items()}),
    min_size=1,
    max_size=4,
)


def ncu_page(launches: Sequence[dict], digits: int, locale: tuple[str, str]) -> str:
    """A raw page of launches; whole numbers have no decimals."""
    file = io.StringIO()
    page = csv.writer(file, quoting=csv.QUOTE_ALL)
    names = list(launches[0])  # hypothesis varies their order
    page.writerow(["ID", "Kernel Name", "CC", *names])
    page.writerow(["", "", "", *(METRICS[name][0] for name in names)])
    for index, launch in enumerate(launches):
        values = [launch[name] for name in names]
        cells = (written(x, 0 if isinstance(x, int) else digits, locale) for x in values)
        page.writerow([index, "f(int, int)", "9.0", *cells])
    return file.getvalue()


@settings(max_examples=120, derandomize=True, deadline=None)
@given(LAUNCHES, st.sampled_from((2, 3, 6)))
def test_a_page_in_any_locale_is_read_right_or_refused(launches, digits):
    """Guards all figures of ncu: those of C's locale, or one line; never others."""
    right = ncu_summary.summarise(ncu_page(launches, 6, C), "x")
    for locale in (ENGLISH, GERMAN, FRENCH, SWISS):
        try:
            found = ncu_summary.summarise(ncu_page(launches, digits, locale), "x")
        except InputError as error:
            assert digits == 3 and "export again with `LC_ALL=C" in str(error)
            continue
        for one, other in zip(found, right, strict=True):
            rounded = {name: value for name, value in other.items() if isinstance(value, float)}
            for name, value in rounded.items():
                assert one[name] == pytest.approx(value, abs=0.6 * 10**-digits), (locale, name)


SOURCES: dict[str, Callable] = {
    "ncu_2022_raw.csv": ncu_summary.summarise,
    "nsys_2022_cpu.csv": nsys_summary.summarise,
    "nsys_2022_gpu.csv": nsys_summary.summarise,
}
TEXTS = {name: (DATA / name).read_text() for name in SOURCES}
PIECES = st.sampled_from(
    [
        *',."\n\r-%()\x00\u2028\ufeff\u0661',
        "",
        "n/a",
        "-1",
        "1e308",
        "1.234",
        "1,5",
        "nan",
        '"",',
        "x" * 200,
    ]
)


@settings(max_examples=200, derandomize=True, deadline=None)
@given(st.sampled_from(sorted(SOURCES)), st.data())
def test_a_mangled_export_is_summarised_or_refused(name, data):
    """Guards the command line against tracebacks: cells, marks and lines lost, doubled, changed."""
    text = TEXTS[name]
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text)))
        end = min(len(text), start + data.draw(st.sampled_from((0, 1, 2, 5, 40, 2000))))
        text = text[:start] + data.draw(PIECES | st.just(text[start:end] * 2)) + text[end:]
    summarise = SOURCES[name]
    module = ncu_summary if summarise is ncu_summary.summarise else nsys_summary
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            module.display(summarise(text, "x"), "x")
        except InputError as error:
            assert "\n" not in str(error)


def test_what_the_c_locale_decides(tmp_path, capsys):
    """Guards a genuine export whose few numbers would fit two notations: the one that we made, or
    that the user says was made with LC_ALL=C, is read."""
    lines = [
        '"ID","Kernel Name","gpu__time_duration.sum"',
        '"","","usecond"',
        '"0","kernel_a","1.234"',
    ]
    file = tmp_path / "raw.csv"
    file.write_text("\n".join(lines) + "\n")
    with pytest.raises(InputError, match="may be 1.234 or 1,234.* with --c-locale"):
        main(["ncu", "--summarise", str(file), "--json"])
    assert main(["ncu", "--summarise", str(file), "--c-locale", "--json"]) == 0
    (launch,) = json.loads(capsys.readouterr().out)["launches"]
    assert launch["duration_us"] == 1.234
