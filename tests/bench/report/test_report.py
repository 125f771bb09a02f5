"""`python -m bench report`: the page agrees with the rows, also with malformed ones."""

import base64
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from bench.report import command as report
from bench.report import rows as report_rows
from bench.report import tables as report_tables
from bench.report.sections import SECTIONS
from bench.rows.run_tables import RUNS
from model.errors import InputError
from model.terminal import Parser
from tests.support.report_rows import every_kind, heat, row

pytest.importorskip("matplotlib")


class Page(HTMLParser):
    """A page's headings, links and pictures, and its tables by the heading above them."""

    def __init__(self, text):
        super().__init__()
        self.headings, self.references, self.tables, self.items = [], [], {}, []
        self.tags, self._open = set(), []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self._open.append(tag)
        self.references += [value for name, value in attrs if name in ("src", "href", "srcset")]
        if tag == "table":
            heading = self.headings[-1] if self.headings else ""
            self.tables.setdefault(heading, [])
        if tag == "tr":
            self.tables[self.headings[-1]].append([])
        if tag in ("td", "th"):
            self.tables[self.headings[-1]][-1].append("")
        if tag in ("h1", "h2", "h3", "h4"):
            self.headings.append("")
        if tag == "li":
            self.items.append("")

    def handle_data(self, data):
        tag = self._open[-1] if self._open else ""
        if tag in ("td", "th"):
            self.tables[self.headings[-1]][-1][-1] += data
        if tag in ("h1", "h2", "h3", "h4"):
            self.headings[-1] += data
        if tag == "li":
            self.items[-1] += data

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass


def command(*arguments):
    parser = Parser(prog="report")
    report.add_arguments(parser)
    return report.run(parser.parse_args(list(map(str, arguments))))


def lines_of(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The paths of a report with every section."""
    return report.write(every_kind(), tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def page(written):
    return Page(written[0].read_text())


def test_every_section(page):
    """Guards the page's order: failures first, then the sections with rows of each device."""
    devices = ("NVIDIA H200", "unknown device", "AMD EPYC, 2 threads")
    starts = [page.headings.index(name) for name in devices]
    assert page.headings[0] == "Measurements" and starts == sorted(starts)
    sections = [
        [name for name in page.headings[start:end] if name in SECTIONS]
        for start, end in zip(starts, [*starts[1:], None], strict=True)
    ]
    assert sections == [list(SECTIONS)[:-1], ["Other rows"], ["Ops", "Roofline"]]


def test_empty_sections_are_named(written):
    """Guards against empty sections, and against not saying that they have no rows."""
    text = written[0].read_text()
    cpu = text[text.index('<h2 id="amd-epyc') :]
    empty = re.search("Sections without rows: (.*?)\\.", cpu)[1].split(", ")
    assert empty == [name for name in SECTIONS if name not in ("Ops", "Roofline")]


def test_failures_come_first(written, page):
    """Guards against failures that are missing from the page or listed after the tables."""
    text = written[0].read_text()
    failure = "NVIDIA H200: rms_norm, T7 C4096, triton, bfloat16: max error 0.5 &gt; 0.01"
    assert 0 < text.index("1 of ") < text.index(failure) < text.index("<table>")


def test_skipped_forms_have_their_reason(page):
    """Guards against missing peers without a reason, or with a list of all their cases."""
    assert "flashinfer: not installed" in page.items
    rows = [
        row(op, case, "compile", us, skipped=None if us else "no compiler")
        for op, case, us in (
            ("rms_norm", "T1", None),
            ("layer_norm", "T1", None),
            ("rms_norm", "T2", 5.0),
        )
    ]
    (measurements,) = report_rows.by_device(rows)
    assert report_tables.skipped_lines(measurements) == ["compile: no compiler (T1)"]
    (measurements,) = report_rows.by_device(rows[:2])
    assert report_tables.skipped_lines(measurements) == ["compile: no compiler"]


def test_times_are_those_of_the_rows(page):
    """Guards the op tables: each number agrees with its row, within the cell's rounding."""
    header, *lines = page.tables["prefix_attention"]
    rows = {(r["case"], r["impl"]): r for r in every_kind() if r["op"] == "prefix_attention"}
    assert len(lines) == sum(not r["skipped"] for r in rows.values())
    for line in lines:
        cells = dict(zip(header, line, strict=True))
        expected = rows[cells["case"], cells["impl"]]
        assert float(cells["median us"].replace(",", "")) == pytest.approx(
            expected["median_us"], abs=0.5
        )
        low, high = (float(x.replace(",", "")) for x in cells["p20..p80"].split(".."))
        assert (low, high) == pytest.approx((expected["p20_us"], expected["p80_us"]), abs=0.5)
        rate = expected["bytes"] / expected["median_us"] / 1e3
        assert float(cells["GB/s"].replace(",", "")) == pytest.approx(rate, abs=0.051)
        assert float(cells["% roofline"]) == pytest.approx(expected["roofline_pct"], abs=0.051)


def test_tables_of_jobs_and_parts(page):
    """Guards the fields of whole jobs, and against shares of another step's sum."""
    header, line = page.tables["packing"]
    assert dict(zip(header, line, strict=True)).items() >= {
        ("case", "tiny 8 x [8]"),
        ("policy", "fcfs"),
        ("makespan s", "12.2"),
        ("time to answer s", "7.5"),
    }
    header, line = page.tables["pacore"]
    cells = dict(zip(header, line, strict=True))
    assert (cells["seconds"], cells["tokens/s"]) == ("2.50", "321.5")
    _, *parts = page.tables["Decode step"]
    assert [part[1:] for part in parts] == [
        ["default", "bfloat16", "42", "linear 71%, rotary_attention 29%"],
        ["eager", "bfloat16", "31", "linear 100%"],
    ]


def test_page_holds_its_pictures(written, page):
    """Guards a page that is sent without its folder: it loads nothing from elsewhere."""
    assert page.tags.isdisjoint({"script", "iframe", "object", "embed", "video"})
    assert page.tags & {"link"} and "data:," in page.references
    assert all(ref.startswith(("data:", "#")) for ref in page.references)
    assert not re.search(r"url\(|@import|https?://", written[0].read_text())
    embedded = [ref for ref in page.references if ref.startswith("data:image/png")]
    files = {path.read_bytes() for path in written[1:]}
    assert {base64.b64decode(ref.split(",")[1]) for ref in embedded} == files
    assert len(embedded) == len(written) - 1 == len(set(written)) - 1


def test_same_rows_same_bytes(tmp_path):
    """Guards comparing reports by diff: no creation time, no dependence on set order."""
    rows = heat("B16 P512 S128", 800.0, 100.0)
    first, second = (report.write(rows, tmp_path / name) for name in ("a", "b"))
    assert [path.name for path in first] == [path.name for path in second]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(first, second, strict=True))


def test_names_are_text(tmp_path):
    """Guards against rows that write into the page, or into files outside the folder."""
    evil = '<script>alert("x")</script>&amp;'
    rows = [
        row("../../op", evil, "triton", 5.0, device=evil, commit=evil),
        row("rms_norm", evil, evil, None, failure=evil, skipped=None, device=evil),
        {"op": evil, evil: 1, "device": evil},
    ]
    paths = report.write(rows, tmp_path / "out")
    page = Page(paths[0].read_text())
    assert "script" not in page.tags
    assert evil in page.headings and page.tables[evil] == [[evil], ["1"]]
    assert page.tables["../../op"][1][0] == evil
    assert {path.parent for path in paths} == {tmp_path / "out"}
    assert {path.name for path in tmp_path.rglob("*")} == {"out", *(path.name for path in paths)}


def test_devices_are_never_mixed(tmp_path):
    """Guards against mixing times of two machines in a table or a speed-up."""
    rows = [
        row("rms_norm", "T1 C64", "eager", 100.0, device="slow"),
        row("rms_norm", "T1 C64", "triton", 10.0, device="slow"),
        row("rms_norm", "T1 C64", "eager", 8.0, device="fast"),
        row("rms_norm", "T1 C64", "triton", 4.0, device="fast"),
    ]
    assert [
        [r["median_us"] for r in measurements.timed] for measurements in report_rows.by_device(rows)
    ] == [
        [100.0, 10.0],
        [8.0, 4.0],
    ]
    same_name = [r | {"device": r["device"].upper()} for r in rows[:2]] + rows[:2]
    paths = report.write(same_name, tmp_path)
    assert len({path.name for path in paths}) == len(paths) == 5


WRONG = (None, "text", -1, 0, [1], {"a": 1}, True, float("nan"), 1e400)


def test_rows_of_any_kind(tmp_path):
    """Guards the report against files of other tools or versions: fields of wrong types."""
    whole = row("rms_norm", "T1 C64", "triton", 20.0, part="linear", tokens_per_second=5.0)
    wrong = [
        whole | {"op": op, "case": f"{op} {name} {value!r}", name: value}
        for op in ("rms_norm", "decode_part", "pacore", "packing", "roofline")
        for name in (*whole, "timeline", "policy")
        for value in WRONG
        if name not in ("op", "case", "device")
    ]
    wrong += [{name: value} for name in ("op", "case", "device", "commit") for value in WRONG]
    wrong += [{}, {"op": "decode_part"}, {"op": "pacore"}, {"op": "rms_norm", "failure": "died"}]
    wrong += [{"op": "pacore", "case": "a", "timeline": {"seconds": [1], "running": 2}}]
    few = [r for number, r in enumerate(wrong) if number % 23 == 0]  # drawing is slow
    report.write(few, tmp_path)
    for measurements in report_rows.by_device(wrong):
        kinds = {report_rows.kind_of(r) for r in measurements.latest}
        assert kinds <= {
            "op",
            "roofline",
            "decode_part",
            *RUNS,
            "no numbers",
            "other",
        }
        report_tables.op_tables(measurements)
        for title, build in SECTIONS.items():
            if title not in ("Ops", "Roofline", "Decode step", "Occupancy", "History"):
                build(measurements, str(tmp_path / "other"))


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, r"rows\.jsonl: no such file"),
        (b"", r"no rows in .*rows\.jsonl"),
        (b"\n".join([b"[1, 2]", b""]), r"rows\.jsonl:1: each line must be a JSON object"),
        (b'{"op": "a"}\nop,case\n', r"rows\.jsonl:2: each line must be a JSON object"),
        (b"\x89PNG\r\n\xff\xfe\n", r"rows\.jsonl is not UTF-8 text"),
        ("folder", r"rows\.jsonl is a directory; it must be a file"),
    ],
)
def test_files_without_rows(tmp_path, content, complaint):
    """Guards a mistyped path: one line that names the file, and no report is written."""
    path = tmp_path / "rows.jsonl"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=complaint) as raised:
        command(path, "--out", tmp_path / "out")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_folder_that_cannot_be(tmp_path):
    """Guards against a traceback if a file has the name of the report's folder."""
    (tmp_path / "out").write_text("")
    with pytest.raises(InputError, match="cannot write .*out"):
        report.write(heat("B1 P1 S1", 2.0, 1.0), tmp_path / "out")


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_without_packages(monkeypatch, tmp_path, package):
    """Guards GPU nodes without these packages: `check` says so before anything is measured."""
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=f"pip install {package}"):
        report.check(tmp_path / "out")


def git(folder, *arguments):
    who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    subprocess.run(["git", "-C", folder, *who, *arguments], check=True, capture_output=True)


def test_history_from_git(tmp_path, capsys):
    """Guards rows of older versions of a file: history, never the latest row, and optional."""
    old, new = (
        row("rms_norm", "T1 C64", "triton", us, commit=commit, time=time)
        for us, commit, time in (
            (30.0, "b" * 12, "2026-11-27T13:00:00Z"),  # even if it seems to be later
            (20.0, "c" * 12, "2026-11-27T12:00:00Z"),
        )
    )
    path = lines_of(tmp_path / "repo" / "rows.jsonl", [old])
    git(path.parent, "init", "-q")
    git(path.parent, "add", ".")
    git(path.parent, "commit", "-q", "-m", "one")
    path.write_text("no rows\n")
    git(path.parent, "commit", "-q", "-a", "-m", "a version that cannot be read")
    lines_of(path, [new])
    assert report_rows.committed(path) == [old]
    (measurements,) = report_rows.by_device([new], [old, new])
    assert (
        [r["median_us"] for r in measurements.latest],
        [r["median_us"] for r in measurements.older],
    ) == (
        [20.0],
        [30.0],
    )
    for extra, there in (((), True), (("--no-history",), False)):
        assert command(path, "--out", tmp_path / "out", "--json", *extra) == 0
        document = json.loads(capsys.readouterr().out)
        names = [Path(name).name for name in document["pictures"]]
        assert any("history" in name for name in names) == there
        assert ("History" in Page((tmp_path / "out" / "index.html").read_text()).headings) == there


def test_command_prints_what_it_wrote(tmp_path, capsys):
    """Guards the command's output: existing paths, one per line, or one JSON document."""
    rows = [*heat("B1 P1 S1", 2.0, 1.0), row("rms_norm", "T1", "triton", None, failure="wrong")]
    path = lines_of(tmp_path / "rows.jsonl", rows)
    assert command(path, "--out", tmp_path / "out") == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == str(tmp_path / "out" / "index.html")
    assert set(printed) == {str(file) for file in (tmp_path / "out").iterdir()}
    assert command(path, "--out", tmp_path / "out", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert [document["page"], *document["pictures"]] == printed
    assert (document["rows"], document["failures"]) == (len(rows), 1)


PROBE = """<script>
addEventListener("load", () => Object.assign(document.body.dataset, {
  pictures: document.images.length,
  loaded: [...document.images].filter(i => i.naturalWidth == i.getAttribute("width")).length,
  wider: document.documentElement.scrollWidth > innerWidth,
}))
</script>"""
ALLOWED = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
POLICY = f'<head><meta http-equiv="Content-Security-Policy" content="{ALLOWED}">'  # or the console
QUIET = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run")
QUIET += ("--disable-background-networking", "--disable-component-update", "--disable-sync")


def browse(page, folder, width, *, probe=PROBE):
    """A page's data- attributes in a browser, and the lines on the browser's console."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("neither chromium nor google-chrome is on the PATH")
    copy = folder / f"probed-{width}.html"
    copy.write_text(page.replace("<head>", POLICY).replace("</body>", f"{probe}</body>"))
    flags = (f"--user-data-dir={folder}", f"--window-size={width},2000", "--enable-logging=stderr")
    done = subprocess.run(
        [browser, *QUIET, *flags, "--dump-dom", copy.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    body = re.search("<body([^>]*)>", done.stdout)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return dict(re.findall('data-(\\w+)="(.*?)"', body[1])), console


@pytest.mark.parametrize("width", [420, 1280])
def test_in_a_browser(written, tmp_path, width):
    """Guards the page in a browser: all pictures at their size, no wider than the screen."""
    data, console = browse(written[0].read_text(), tmp_path, width)
    count = str(len(written) - 1)
    assert data == {"pictures": count, "loaded": count, "wider": "false"}
    assert console == []


def test_browser_finds_faults(tmp_path):
    """Guards the test above: it detects a broken picture, a wide page, a request and an error."""
    text = '<img width="8" src="data:image/png;base64,AAAA"><img width="2000" src="x.png">'
    fault = PROBE + "<script>console.error('planted')</script>"
    data, console = browse(f"<head></head><body>{text}</body>", tmp_path, 420, probe=fault)
    assert data == {"pictures": "2", "loaded": "0", "wider": "true"}
    assert all(any(word in line for line in console) for word in ("planted", "x.png"))
