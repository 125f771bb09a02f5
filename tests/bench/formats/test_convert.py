"""`bench convert`: formats are told apart, rows survive, and no input gives a traceback."""

import copy
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import __main__ as bench
from bench.formats.command import FORMATS, READERS, WRITERS, detect
from bench.rows import jsonl
from model.errors import InputError
from tests.bench.formats.test_flashinfer_bench import ROW, TRACE
from tests.bench.formats.test_pytest_benchmark import DOCUMENT
from tests.support import ROOT

COMMITTED = sorted((ROOT / "profiles" / "results").glob("*/bench.jsonl"))
FOREIGN = FORMATS[1:]


def convert(*words: object) -> int:
    return bench.main(["convert", *map(str, words)])


def one_file(folder: Path, name: str, document: object) -> Path:
    path = folder / name
    path.write_text(json.dumps(document) + "\n")
    return path


@pytest.mark.filterwarnings("ignore:rows left out")
@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.parent.name)
def test_committed_rows_survive(path, name, tmp_path, capsys):
    """Guards every field of every timed row, and the counts of the others."""
    out, back = tmp_path / "out", tmp_path / "back.jsonl"
    assert convert(path, "--to", name, "--out", out, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    rows = jsonl.read(path)
    assert document["rows"] + sum(document["left_out"].values()) == len(rows)
    assert convert(out, "--to", "rows", "--out", back) == 0
    timed = {json.dumps(row) for row in rows if row.get("median_us")}
    survived = [json.dumps(row) for row in jsonl.read_measured(back)]
    assert len(survived) == document["rows"]
    assert set(survived) <= timed
    if name == "flashinfer-bench":
        assert set(survived) == timed


@pytest.mark.filterwarnings("ignore:rows left out")
@pytest.mark.parametrize("source", [TRACE, DOCUMENT], ids=FOREIGN)
def test_report_and_compare_read_what_was_imported(source, tmp_path, capsys):
    """Guards rows that lack a field of the commands' keys, which those would ignore."""
    pytest.importorskip("matplotlib")
    rows = tmp_path / "rows.jsonl"
    assert convert(one_file(tmp_path, "in.json", source), "--to", "rows", "--out", rows) == 0
    assert bench.main(["compare", str(rows), str(rows)]) == 0
    assert "1 rows of" in capsys.readouterr().out
    out = tmp_path / "report"
    assert bench.main(["report", str(rows), "--no-history", "--out", str(out)]) == 0
    (row,) = jsonl.read(rows)
    assert row["op"] in (out / "index.html").read_text()


class TestDetection:
    @pytest.mark.parametrize(
        ("document", "name"), list(zip([ROW, TRACE, DOCUMENT], FORMATS, strict=True))
    )
    def test_by_content(self, document, name, tmp_path):
        """Guards each format, whatever the file's name."""
        assert detect(one_file(tmp_path, "x", document)) == name

    def test_indented_json(self, tmp_path):
        """Guards pytest-benchmark's own files, whose first line is a brace."""
        path = tmp_path / "b.json"
        path.write_text(json.dumps(DOCUMENT, indent=4))
        assert detect(path) == "pytest-benchmark"

    @pytest.mark.parametrize(
        "text", ["", "{}", "[]", "op", '{"definition": "a"}', "\n\n", "\ufeff"]
    )
    def test_anything_else_is_refused(self, text, tmp_path):
        """Guards the message that says what the formats are."""
        path = tmp_path / "x"
        path.write_text(text)
        with pytest.raises(InputError, match=r"x is in none of the formats: rows .JSONL with op"):
            detect(path)

    def test_folders_and_missing_files(self, tmp_path):
        """Guards against reading a folder that is no dataset as an empty one."""
        with pytest.raises(InputError, match="has no folder traces/"):
            detect(tmp_path)
        with pytest.raises(InputError, match="no such file"):
            detect(tmp_path / "none")

    def test_an_explicit_format_is_used(self, tmp_path):
        """Guards against an option that only detects."""
        rows = one_file(tmp_path, "rows.jsonl", ROW)
        with pytest.raises(InputError, match="has no traces with an evaluation"):
            convert(rows, "--from", "flashinfer-bench", "--to", "rows", "--out", tmp_path / "out")


@pytest.mark.parametrize("name", FORMATS)
class TestTarget:
    def test_nothing_is_overwritten(self, name, tmp_path):
        """Guards a file, a folder with files, and a link to nowhere."""
        rows = one_file(tmp_path, "rows.jsonl", ROW)
        kept = one_file(tmp_path, "kept", ROW)
        (tmp_path / "link").symlink_to(tmp_path / "nowhere")
        for target in (kept, rows, tmp_path, tmp_path / "link"):
            with pytest.raises(InputError, match="exists: choose another path for --out"):
                convert(rows, "--to", name, "--out", target)
        assert kept.read_text() == rows.read_text()
        assert not (tmp_path / "nowhere").exists()

    def test_what_cannot_be_written(self, name, tmp_path):
        """Guards against a traceback where a parent is a file."""
        rows = one_file(tmp_path, "rows.jsonl", ROW)
        with pytest.raises(InputError, match="cannot write"):
            convert(rows, "--to", name, "--out", rows / "out")


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 200)
    | st.sampled_from([2**62, 10**30, 10**400, -(10**400), 1e300, "NaN", "PASSED", "../x", "a\0b"])
    | st.floats()
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=4,
)


def key_paths(data, path=()):
    """The path of every key and element in nested JSON, and of the whole."""
    yield path
    pairs = data.items() if isinstance(data, dict) else enumerate(data)
    for key, value in pairs if isinstance(data, dict | list) else ():
        yield from (
            key_paths(value, (*path, key)) if isinstance(value, dict | list) else [(*path, key)]
        )


def changed(data, path, value):
    """A copy of `data` with `value` at `path`."""
    data = copy.deepcopy({"": data})
    parent = data
    for key in ("", *path)[:-1]:
        parent = parent[key]
    parent[("", *path)[-1]] = value
    return data[""]


INPUTS = {
    "rows": ROW | {"shape": {"batch": 16}, "part": "a", "skipped": None},
    "flashinfer-bench": TRACE,
    "pytest-benchmark": DOCUMENT,
}
INPUTS_WITH_ROWS = [
    *INPUTS.items(),
    ("flashinfer-bench", TRACE | {"row": INPUTS["rows"]}),
    (
        "pytest-benchmark",
        changed(DOCUMENT, ("benchmarks", 0, "extra_info"), INPUTS["rows"]),
    ),
]


@pytest.mark.filterwarnings("ignore:")
@settings(max_examples=150)
@given(
    st.sampled_from(INPUTS_WITH_ROWS).flatmap(
        lambda pair: st.tuples(
            st.just(pair[0]),
            st.builds(changed, st.just(pair[1]), st.sampled_from(list(key_paths(pair[1]))), VALUES),
        )
    ),
    st.sampled_from(FORMATS),
)
def test_any_value_at_any_key(tmp_path_factory, source, target):
    """Guards against a traceback, or more than one line, for any content of a file; and against
    rows that the other commands refuse."""
    name, document = source
    folder = tmp_path_factory.mktemp("convert")
    path, out = one_file(folder, "in", document), folder / "out"
    try:
        detect(path)
        WRITERS[target](READERS[name](path), out)
    except InputError as error:
        assert str(error).isprintable()
        return
    assert READERS[target](out)
