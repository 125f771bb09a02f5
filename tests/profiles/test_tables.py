"""The documents' tables: what the committed rows give, and how figures are written."""

import json

import pytest

from bench import jsonl
from model.errors import InputError
from model.terminal import Parser
from profiles.tables import command as tables
from profiles.tables.gpu import NONE_YET, gpus
from profiles.tables.kernels import Kernel, chosen, kernel_table
from profiles.tables.markdown import folder, markdown, milliseconds, one, small, spread
from profiles.tables.switches import LOOPS, Switch, both_forms, switch_table


def run(*arguments: str) -> int:
    parser = Parser()
    tables.add_arguments(parser)
    return tables.run(parser.parse_args(arguments))


@pytest.mark.parametrize("file", tables.DOCUMENTS, ids=lambda file: file.name)
def test_a_document_is_what_the_rows_give(file):
    """Guards every table of README and docs/: a figure changed by hand, or rows without a table."""
    text, made = file.read_text(), tables.DOCUMENTS[file]
    states = tables.compared(text, tables.renewed(text, made))
    assert states == dict.fromkeys(made, "agrees"), "python -m profiles tables --write"


MADE = {"small": lambda: "| a |\n|---|\n| 2 |"}
TEXT = "Before.\n\n<!-- table: small -->\n| a |\n|---|\n| 1 |\n<!-- end -->\nAfter: | 1 |\n"


def test_writing_changes_the_marked_body_alone(tmp_path, monkeypatch, capsys):
    """Guards the text around the tables, the exit codes, and the JSON document."""
    file = tmp_path / "README.md"
    monkeypatch.setattr(tables, "DOCUMENTS", {file: MADE})
    file.write_text(TEXT)
    assert run() == 1 and file.read_text() == TEXT
    assert "differs" in capsys.readouterr().out
    assert run("--write", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {
        "tables": [{"file": "README.md", "name": "small", "state": "written"}]
    }
    assert file.read_text() == TEXT.replace("1 |\n<!--", "2 |\n<!--")
    assert run() == 0


def test_each_document_has_tables_of_its_own(tmp_path, monkeypatch, capsys):
    """Guards the second document: it counts, `--file` takes one alone or a copy of it, and what is
    wrong says where; nothing is written unless all documents are right."""
    monkeypatch.setattr(tables, "DOCUMENTS", {tmp_path / "a.md": MADE, tmp_path / "b.md": MADE})
    good = TEXT.replace("1 |\n<!--", "2 |\n<!--")
    for a, b, code in ((good, good, 0), (TEXT, good, 1), (good, TEXT, 1)):
        (tmp_path / "a.md").write_text(a)
        (tmp_path / "b.md").write_text(b)
        assert run() == code
    assert run("--file", str(tmp_path / "a.md")) == 0
    copy = tmp_path / "copies" / "b.md"
    copy.parent.mkdir()
    copy.write_text(TEXT)
    assert run("--file", str(copy)) == 1
    with pytest.raises(InputError, match="c.md: only these have tables: a.md, b.md"):
        run("--file", str(tmp_path / "c.md"))
    (tmp_path / "a.md").write_text(TEXT)
    (tmp_path / "b.md").write_text("Nothing.\n")
    with pytest.raises(InputError, match="b.md: no marker for small"):
        run("--write")
    assert (tmp_path / "a.md").read_text() == TEXT
    (tmp_path / "b.md").unlink()
    with pytest.raises(InputError, match="cannot read .*b.md"):
        run()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TEXT.replace("small", "large"), "no table is called 'large'; choose of small"),
        (TEXT.replace("<!-- end -->\n", ""), "has no `<!-- end -->`"),
        ("Nothing.\n", "no marker for small"),
    ],
)
def test_markers_that_are_wrong_are_named(text, message):
    """Guards against a table that is silently never renewed."""
    with pytest.raises(InputError, match=message):
        tables.renewed(text, MADE)


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
    table = markdown(("", "left", " right"), [["a", "b", "1"], ["", "b", "2"]])
    assert table.splitlines() == [
        "| | left | right |",
        "|---|---|---:|",
        "| a | b | 1 |",
        "| | b | 2 |",
    ]


def test_the_latest_good_row_counts(tmp_path):
    """Guards tables against old rows, of whatever file, and against rows that failed."""
    old = {"op": "x", "time": "2026-01-01T00:00:00Z", "n": 1}
    jsonl.append(tmp_path / "a.jsonl", [old | {"time": "2026-01-03T00:00:00Z", "n": 3}])
    jsonl.append(tmp_path / "b.jsonl", [old, old | {"time": "2026-01-02T00:00:00Z", "n": 2}])
    jsonl.append(tmp_path / "c.jsonl", [old | {"time": "2026-01-04", "n": 4, "failure": "off"}])
    assert one(folder(tmp_path), op="x")["n"] == 3
    with pytest.raises(InputError, match="needs a row with op 'y'"):
        one(folder(tmp_path), op="y")


def compiled(arch: int, config: str, **more) -> dict:
    made = {"kernel": "k", "arch": arch, "dtype": "bfloat16", "config": config, "registers": arch}
    made |= {"spill_bytes": 0, "shared_bytes": 81_924, "programs_per_sm": 2}
    return made | {"wgmma": arch == 90, "wide_loads": 0.976} | more


def test_kernels_are_chosen_by_words_of_their_configuration():
    """Guards the kernel tables: a word that must not be there, one of an architecture, and a
    choice that is not one."""
    baseline = [
        compiled(90, "-rotary D=128 num_warps=4"),
        compiled(90, "D=128 num_warps=4", registers=7),
        compiled(80, "D=128 num_warps=4"),
        compiled(80, "D=128 num_warps=8", registers=8),
    ]
    kernel = Kernel("it", "k", "!-rotary D=128 90:num_warps=4 80:num_warps=8")
    assert [chosen(kernel, arch, baseline)["registers"] for arch in (90, 80)] == [7, 8]
    line = kernel_table([kernel], baseline).splitlines()[-1]
    assert line == "| it | 7 / 8 | 0 / 0 | 80 / 80 | 2 / 2 | yes | 98 / 98 % |"
    alone = kernel_table([kernel._replace(archs=(90,))], [baseline[1] | {"wide_loads": None}])
    assert alone.splitlines()[-1] == "| it | 7 / - | 0 / - | 80 / - | 2 / - | yes | TMA |"
    for config, found in (("D=128", 2), ("D=64", 0)):
        with pytest.raises(InputError, match=f"{found} rows of the static baseline"):
            chosen(Kernel("it", "k", config), 90, baseline)


SWITCH = Switch("it", "k", "D=128 90:AHEAD=1 num_warps=4", "AHEAD=0", "AHEAD=1 launch_pdl=True")


def test_a_switch_is_shown_by_both_of_its_forms():
    """Guards the tables of switches: the old figure stands first, one that both forms have stands
    alone, and loops that are new or unknown are seen."""
    old = compiled(90, "AHEAD=0 D=128 num_warps=4", buffers=[2, None], bytes_in_flight=[8192, None])
    new = compiled(90, "AHEAD=1 D=128 num_warps=4 launch_pdl=True", registers=91, wgmma=False)
    new |= {"buffers": [3, 2], "bytes_in_flight": None}
    figures = {" registers": lambda row: row["registers"], " programs per SM": lambda row: 2}
    figures |= {name: LOOPS[name] for name in (" buffers", " KB in flight")}
    made = switch_table([SWITCH._replace(archs=(90,))], figures, [new, old])
    assert made.splitlines() == [
        "| kernel in bf16 | for | registers | programs per SM | buffers | KB in flight |",
        "|---|---|---:|---:|---:|---:|",
        "| it | sm_90 | 90 -> 91 | 2 | 2, - -> 3, 2 | 8, - -> - |",
    ]


@pytest.mark.parametrize(
    ("configs", "message"),
    [
        (["AHEAD=0 D=128 num_warps=4"], "0 rows .* have .*AHEAD=1"),
        (["AHEAD=1 D=128 num_warps=4 launch_pdl=True"], "0 rows .* have .*AHEAD=0"),
        (["AHEAD=0 D=128 num_warps=4", "AHEAD=0 D=128 num_warps=4 X=1"], "2 rows .*AHEAD=0"),
        (
            ["AHEAD=0 D=128 num_warps=4 X=0", "AHEAD=1 D=128 num_warps=4 launch_pdl=True X=1"],
            "k on sm_90, it: more than AHEAD=0 -> AHEAD=1 .* differs: X=0 X=1",
        ),
    ],
)
def test_forms_that_do_not_differ_in_the_switch_alone_are_refused(configs, message):
    """Guards against figures of another switch: a form that is missing, doubled, or not a twin."""
    with pytest.raises(InputError, match=message):
        both_forms(SWITCH, 90, [compiled(90, config) for config in configs])


def measured(op: str, case: str, impl: str, us: float, **more) -> dict:
    made = {"op": op, "case": case, "impl": impl, "dtype": "bfloat16", "failure": None}
    made |= {"p20_us": us - 1, "median_us": us, "p80_us": us + 1, "bytes": 4_000_000 * us}
    made |= {"copy_gb_s": 5000.0, "roofline_pct": 80.4, "device": "NVIDIA H100", "commit": "abc"}
    return made | {"torch": "2.13.0", "triton": "3.6.0", "driver": "570"} | more


def test_a_gpu_with_rows_gets_its_tables(tmp_path):
    """Guards the first GPU's rows: they become README's tables by lying in a folder, and the line
    that says that there are none goes."""
    cpu = tmp_path / "cpu"
    jsonl.append(cpu / "ops.jsonl", [measured("op", "c", "eager", 9, device="AMD EPYC, 2 threads")])
    assert gpus(tmp_path) == NONE_YET
    shape, case = "step3-vl-10b B16 P2048 S512", "B16 P2048 S512"
    found = [
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
        # Not the op table's: forms in pairs, and what has no case there.
        measured("prefix_attention", case, "triton", 45, section="pairs"),
        measured("prefix_attention", case, "triton ahead=1", 40, section="pairs"),
        measured("launch", "100", "triton", 2, section="launches"),
    ]
    jsonl.append(tmp_path / "h100" / "all.jsonl", found)
    origin, steps, ops = gpus(tmp_path).split("\n\n")
    assert "NVIDIA H100" in origin and "bfloat16 5,000 GB/s, 771 TFLOP/s" in origin
    assert "`profiles/results/h100/`" in origin and "commit abc" in origin
    assert steps.splitlines()[2:] == [
        "| step3-vl-10b | 16 | 2,048 | 512 | 40.0 (40.0..40.0) | 4.0 (4.0..4.0) | 4,000 | 80 % |"
        " 3.5 (3.5..3.5) | 80 % |"
    ]
    assert ops.splitlines()[2:] == [
        "| `prefix_attention` | B16 P2048 S512 | triton | 50.0 (49.0..51.0) | 80 % | 20.0 |"
        " 1.20 (fa3) |"
    ]
