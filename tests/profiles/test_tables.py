"""The generated tables and plot: their content from committed rows, and number formats."""

import json
from pathlib import Path

import pytest

from bench.rows import jsonl
from model.errors import InputError
from model.terminal import Parser
from profiles.tables import command as tables
from profiles.tables import decode_plot
from profiles.tables.figures import folder, latest_row, milliseconds, small, spread
from profiles.tables.gpu import NONE_YET, gpus
from profiles.tables.kernels import Kernel, find_row, kernel_table
from profiles.tables.switches import LOOPS, Switch, both_forms, switch_table


def run(*arguments: str) -> int:
    parser = Parser()
    tables.add_arguments(parser)
    return tables.run(parser.parse_args(arguments))


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.name)
def test_a_page_has_the_tables_that_the_rows_give(page):
    """Guards every table of README and docs/: a figure changed by hand, or rows without a table."""
    text = page.read_text()
    states = tables.compare(text, tables.renew(text))
    assert {state for _, state in states} == {"agrees"}, "python -m profiles tables --write"


def test_every_generated_table_is_on_a_page():
    """Guards a table that is generated, kept up to date and shown nowhere."""
    tables.require_all_used(page.read_text() for page in tables.PAGES)


def test_the_plot_shows_the_rows():
    """Guards docs/decode.svg against rows that changed after it was drawn."""
    assert decode_plot.is_current(tables.PLOT), "python -m profiles tables --write"


SMALL = {"small": lambda: "| a |\n|---|\n| 2 |"}
STALE = "Before.\n\n<!-- table: small -->\n| a |\n|---|\n| 1 |\n<!-- end -->\nAfter: | 1 |\n"
CURRENT = STALE.replace("1 |\n<!--", "2 |\n<!--")


@pytest.fixture
def pages(tmp_path, monkeypatch) -> tuple[Path, Path]:
    """Two pages of the table `small`, both current; the plot is current too."""
    both = tmp_path / "a.md", tmp_path / "b.md"
    for page in both:
        page.write_text(CURRENT)
    monkeypatch.setattr(tables, "PAGES", both)
    monkeypatch.setattr(tables, "GENERATORS", SMALL)
    return both


def test_writing_changes_only_the_tables(pages, capsys):
    """Guards the text around the tables, the exit codes and the JSON document."""
    pages[0].write_text(STALE)
    assert run() == 1 and pages[0].read_text() == STALE
    assert "differs" in capsys.readouterr().out
    assert run("--write", "--json") == 0
    states = json.loads(capsys.readouterr().out)["tables"]
    assert states == [
        {"file": "a.md", "name": "small", "state": "written"},
        {"file": "b.md", "name": "small", "state": "agrees"},
        {"file": "decode.svg", "name": "plot", "state": "agrees"},
    ]
    assert pages[0].read_text() == CURRENT
    assert run() == 0


def test_several_pages_share_a_table(pages):
    """Guards the second page: it counts, and nothing is written unless all pages are right."""
    a, b = pages
    for texts in ((STALE, CURRENT), (CURRENT, STALE)):
        for page, text in zip(pages, texts, strict=True):
            page.write_text(text)
        assert run() == 1
    a.write_text(STALE)
    b.write_text("Nothing.\n")
    with pytest.raises(InputError, match="b.md: the page has no table"):
        run("--write")
    assert a.read_text() == STALE
    b.unlink()
    with pytest.raises(InputError, match="b.md: no such file"):
        run()


def test_one_file_alone(pages, tmp_path, capsys):
    """Guards `--file`: it takes any page, and the others and the plot do not count."""
    pages[0].write_text(STALE)
    assert run("--file", str(pages[1])) == 0
    copy = tmp_path / "copy.md"
    copy.write_text(STALE)
    assert run("--file", str(copy), "--write", "--json") == 0
    states = json.loads(capsys.readouterr().out.splitlines()[-1])["tables"]
    assert states == [{"file": "copy.md", "name": "small", "state": "written"}]
    assert copy.read_text() == CURRENT and pages[0].read_text() == STALE


def test_a_table_on_no_page_is_named(pages, monkeypatch):
    """Guards generated tables against being lost when a page is rewritten."""
    monkeypatch.setattr(tables, "GENERATORS", SMALL | {"large": SMALL["small"]})
    with pytest.raises(InputError, match="no page has the table 'large'"):
        run()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (STALE.replace("small", "large"), "no table is called 'large'; choose from: small"),
        (STALE.replace("<!-- end -->\n", ""), "has no `<!-- end -->`"),
        ("Nothing.\n", "the page has no table"),
    ],
)
def test_wrong_markers_are_named(text, message, monkeypatch):
    """Guards against a table that is silently never renewed."""
    monkeypatch.setattr(tables, "GENERATORS", SMALL)
    with pytest.raises(InputError, match=message):
        tables.renew(text)


def test_a_table_twice_on_a_page(monkeypatch):
    """Guards the first of two copies: it is stale, though the second agrees."""
    monkeypatch.setattr(tables, "GENERATORS", SMALL)
    text = STALE + CURRENT
    states = tables.compare(text, tables.renew(text))
    assert states == [("small", "differs"), ("small", "agrees")]


def test_figures():
    """Guards digits: thousands, a decimal below 100, percentiles, exponents without a zero."""
    assert [milliseconds(us) for us in (1_234_567, 99_960, 99_940, 51_416, 3)] == [
        "1,235",
        "100",
        "99.9",
        "51.4",
        "0.0",
    ]
    times = {"p20_us": 9_600, "median_us": 9_699, "p80_us": 111_200}
    assert spread(times) == "9.7 (9.6..111)"
    assert [small(value) for value in (0.00246, 1.41e-12, 25)] == ["2.46e-3", "1.41e-12", "2.50e+1"]


def test_the_latest_good_row_counts(tmp_path):
    """Guards tables against old rows of any file, and against failed rows."""
    old = {"op": "x", "time": "2026-01-01T00:00:00Z", "n": 1}
    jsonl.append(tmp_path / "a.jsonl", [old | {"time": "2026-01-03T00:00:00Z", "n": 3}])
    jsonl.append(tmp_path / "b.jsonl", [old, old | {"time": "2026-01-02T00:00:00Z", "n": 2}])
    jsonl.append(tmp_path / "c.jsonl", [old | {"time": "2026-01-04", "n": 4, "failure": "off"}])
    assert latest_row(folder(tmp_path), op="x")["n"] == 3
    with pytest.raises(InputError, match="needs a row with op 'y'"):
        latest_row(folder(tmp_path), op="y")


def compiled(arch: int, config: str, **more) -> dict:
    row = {"kernel": "k", "arch": arch, "dtype": "bfloat16", "config": config, "registers": arch}
    row |= {"spill_bytes": 0, "shared_bytes": 81_924, "programs_per_sm": 2}
    return row | {"wgmma": arch == 90, "wide_loads": 0.976} | more


def test_kernels_are_found_by_words_of_their_config():
    """Guards the kernel tables: words that must be absent, words for one architecture, and configs
    that match no row or several."""
    baseline = [
        compiled(90, "-rotary D=128 num_warps=4"),
        compiled(90, "D=128 num_warps=4", registers=7),
        compiled(80, "D=128 num_warps=4"),
        compiled(80, "D=128 num_warps=8", registers=8),
    ]
    kernel = Kernel("it", "k", "!-rotary D=128 90:num_warps=4 80:num_warps=8")
    assert [find_row(kernel, arch, baseline)["registers"] for arch in (90, 80)] == [7, 8]
    line = kernel_table([kernel], baseline).splitlines()[-1]
    assert line == "| it | 7 / 8 | 0 / 0 | 80 / 80 | 2 / 2 | yes | 98 / 98 % |"
    alone = kernel_table([kernel._replace(archs=(90,))], [baseline[1] | {"wide_loads": None}])
    assert alone.splitlines()[-1] == "| it | 7 / - | 0 / - | 80 / - | 2 / - | yes | TMA |"
    for config, count in (("D=128", 2), ("D=64", 0)):
        with pytest.raises(InputError, match=f"{count} rows of the static baseline"):
            find_row(Kernel("it", "k", config), 90, baseline)


SWITCH = Switch("it", "k", "D=128 90:AHEAD=1 num_warps=4", "AHEAD=0", "AHEAD=1 launch_pdl=True")


def test_a_switch_shows_both_forms():
    """Guards the tables of switches: the old figure comes first, equal figures appear once, and new
    or unknown loops are visible."""
    old = compiled(90, "AHEAD=0 D=128 num_warps=4", buffers=[2, None], bytes_in_flight=[8192, None])
    new = compiled(90, "AHEAD=1 D=128 num_warps=4 launch_pdl=True", registers=91, wgmma=False)
    new |= {"buffers": [3, 2], "bytes_in_flight": None}
    figures = {" registers": lambda row: row["registers"], " CTAs per SM": lambda row: 2}
    figures |= {name: LOOPS[name] for name in (" buffers", " KB in flight")}
    text = switch_table([SWITCH._replace(archs=(90,))], figures, [new, old])
    assert text.splitlines() == [
        "| kernel in bf16 | arch | registers | CTAs per SM | buffers | KB in flight |",
        "|---|---|---:|---:|---:|---:|",
        "| it | sm_90 | 90 -> 91 | 2 | 2, - -> 3, 2 | 8, - -> - |",
    ]


@pytest.mark.parametrize(
    ("configs", "message"),
    [
        (["AHEAD=0 D=128 num_warps=4"], "0 rows .* match .*AHEAD=1"),
        (["AHEAD=1 D=128 num_warps=4 launch_pdl=True"], "0 rows .* match .*AHEAD=0"),
        (["AHEAD=0 D=128 num_warps=4", "AHEAD=0 D=128 num_warps=4 X=1"], "2 rows .*AHEAD=0"),
        (
            ["AHEAD=0 D=128 num_warps=4 X=0", "AHEAD=1 D=128 num_warps=4 launch_pdl=True X=1"],
            "k on sm_90, it: the two forms differ in more than AHEAD=0 -> AHEAD=1 .*: X=0 X=1",
        ),
    ],
)
def test_forms_that_differ_in_more_than_the_switch_are_refused(configs, message):
    """Guards against figures of another switch: a form that is missing, ambiguous or different."""
    with pytest.raises(InputError, match=message):
        both_forms(SWITCH, 90, [compiled(90, config) for config in configs])


def measured(op: str, case: str, impl: str, us: float, **more) -> dict:
    row = {"op": op, "case": case, "impl": impl, "dtype": "bfloat16", "failure": None}
    row |= {"p20_us": us - 1, "median_us": us, "p80_us": us + 1, "bytes": 4_000_000 * us}
    row |= {"copy_gb_s": 5000.0, "roofline_pct": 80.4, "device": "NVIDIA H100", "commit": "abc"}
    return row | {"torch": "2.13.0", "triton": "3.6.0", "driver": "570"} | more


def test_a_gpu_with_rows_gets_its_tables(tmp_path):
    """Guards the first GPU's rows: being in a folder is enough to become tables, instead of the
    line that no GPU was measured."""
    cpu = tmp_path / "cpu"
    jsonl.append(cpu / "ops.jsonl", [measured("op", "c", "eager", 9, device="AMD EPYC, 2 threads")])
    assert gpus(tmp_path) == NONE_YET
    shape, case = "step3-vl-10b B16 P2048 S512", "B16 P2048 S512"
    rows = [
        measured("roofline", "copy, matrix product", None, 0, gemm_tflop_s=771.4)
        | {"median_us": None},
        measured("decode_step", shape, "eager", 40_000),
        measured("decode_step", shape, "default", 9_000),
        measured("decode_step", shape, "default", 4_000),  # measured again
        measured("decode_step", shape, "default, FP8 KV", 3_500),
        measured("prefix_attention", case, "eager", 1_000),
        measured("prefix_attention", case, "triton", 70),
        measured("prefix_attention", case, "triton", 50),  # again
        measured("prefix_attention", case, "fa3", 60),
        measured("prefix_attention", case, "flashinfer", 75),
        measured("prefix_attention", "B1", "triton", 50) | {"median_us": None, "failure": "off"},
        measured("prefix_attention", "B2", "triton", 50, failure="off"),  # timed anyway
        # Not for the op table: forms in pairs, and sections without its cases.
        measured("prefix_attention", case, "triton", 45, section="pairs"),
        measured("prefix_attention", case, "triton ahead=1", 40, section="pairs"),
        measured("launch", "100", "triton", 2, section="launches"),
    ]
    jsonl.append(tmp_path / "h100" / "all.jsonl", rows)
    origin, steps, ops = gpus(tmp_path).split("\n\n")
    assert "NVIDIA H100" in origin and "bfloat16 5,000 GB/s, 771 TFLOP/s" in origin
    assert "`profiles/results/h100/`" in origin and "commit abc" in origin
    assert steps.splitlines()[2:] == [
        "| step3-vl-10b | 16 | 2,048 | 512 | 40.0 (40.0..40.0) | 4.0 (4.0..4.0) | 4,000 | 80 % |"
        " 3.5 (3.5..3.5) | 80 % |"
    ]
    assert ops.splitlines()[2:] == [
        "| `prefix_attention` | B16 P2048 S512 | triton | 50.0 (49.0..51.0) | 80 % | 20.0x |"
        " 1.20x (fa3) |"
    ]


def test_the_plot_prefers_a_gpu(tmp_path):
    """Guards the plot against ignoring the first GPU, and against cases that lack a form."""
    cpu = decode_plot.plotted(tmp_path)
    assert cpu["machine"].endswith("threads, fp32") and len(cpu["cases"]) == 3
    assert [form["impl"] for form in cpu["cases"][0]["forms"]] == ["eager", "sdpa", "portable"]
    rows = [
        measured("prefix_attention", case, impl, us, roofline_pct=50.0)
        for case in ("B16 P2048 S128", "4 x (B4 P512 S64)")
        for impl, us in (("eager", 1_000), ("sdpa", 200), ("triton", 50))
    ]
    jsonl.append(tmp_path / "h100" / "rows.jsonl", rows[:-1])
    gpu = decode_plot.plotted(tmp_path)
    assert gpu["machine"] == "NVIDIA H100, bf16"
    (case,) = gpu["cases"]
    assert case["floor_ms"] == 0.025
    assert case["forms"][-1] == {"impl": "triton", "p20": 0.049, "median": 0.05, "p80": 0.051}


def test_the_plot_is_redrawn_when_its_numbers_change(tmp_path):
    """Guards the staleness check, and bytes that differ from run to run."""
    pytest.importorskip("matplotlib")
    file, again = tmp_path / "decode.svg", tmp_path / "again.svg"
    assert not decode_plot.is_current(file)
    decode_plot.draw(file)
    decode_plot.draw(again)
    assert file.read_bytes() == again.read_bytes() and decode_plot.is_current(file)
    number = str(decode_plot.plotted()["cases"][0]["forms"][0]["median"])
    assert number in file.read_text()
    file.write_text(file.read_text().replace(number, number + "1"))
    assert not decode_plot.is_current(file)
    file.write_text("<svg/>")
    assert not decode_plot.is_current(file)
