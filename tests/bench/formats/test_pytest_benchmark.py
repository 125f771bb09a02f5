"""Files of pytest-benchmark, judged by pytest-benchmark itself."""

import json
from pathlib import Path

import pytest

from bench.formats import pytest_benchmark
from model.errors import InputError

ROW = {
    **{"op": "rms_norm", "case": "T16 C4096", "impl": "portable", "dtype": "float32"},
    **{"median_us": 30.0, "p20_us": 29.0, "p80_us": 33.0, "max_err": 2e-7, "repeats": 500},
    **{"device": "AMD EPYC", "commit": "0123456789ab+dirty", "time": "2026-11-27T23:10:39Z"},
}
BENCHMARK = {
    **{"group": None, "name": "test_sort[8]", "fullname": "tests/test_a.py::test_sort[8]"},
    **{"params": {"n": 8}, "param": "8", "extra_info": {"speedup": "3x"}, "options": {}},
    "stats": {"median": 2e-6, "rounds": 5, "data": [1e-6, 2e-6, 4e-6, 2e-6, 3e-6]},
}
DOCUMENT = {
    "machine_info": {"node": "vm", "cpu": {"brand_raw": "AMD EPYC"}},
    "commit_info": {"id": "0123456789abcdef", "dirty": True},
    "benchmarks": [BENCHMARK],
    "datetime": "2026-11-29T03:17:43+00:00",
    "version": "5.3.1",
}


def exported(out: Path, *rows: dict) -> dict:
    pytest_benchmark.write(rows, out)
    return json.loads(out.read_text())


def imported(folder: Path, document: object) -> list[dict]:
    path = folder / "b.json"
    path.write_text(json.dumps(document))
    return pytest_benchmark.read(path)


class TestExport:
    @pytest.mark.parametrize("times", [(29.0, 30.0, 33.0), (1.0, 9.0, 9.5), (None, 30.0, None)])
    def test_statistics_are_pytest_benchmarks(self, tmp_path, times):
        """Guards every statistic against pytest-benchmark's own of the same data."""
        Stats = pytest.importorskip("pytest_benchmark.stats").Stats  # noqa: N806
        row = ROW | dict(zip(("p20_us", "median_us", "p80_us"), times, strict=True))
        (benchmark,) = exported(tmp_path / "b.json", row)["benchmarks"]
        judge = Stats()
        for value in benchmark["stats"].pop("data"):
            judge.update(value)
        stats, expected = benchmark["stats"], judge.as_dict()
        assert (stats.pop("iterations"), stats.pop("outliers")) == (1, expected.pop("outliers"))
        assert stats == pytest.approx(expected, rel=1e-12, abs=1e-21)
        assert benchmark["stats"]["median"] == pytest.approx(30e-6 if times[1] == 30 else 9e-6)

    def test_pytest_benchmark_compares(self, tmp_path, monkeypatch, capsys):
        """Guards that the real `pytest-benchmark compare` reads the file and pairs its names."""
        cli = pytest.importorskip("pytest_benchmark.cli")
        exported(tmp_path / "a.json", ROW)
        exported(tmp_path / "b.json", ROW | {"median_us": 60.0, "p80_us": 61.0})
        files = [str(tmp_path / name) for name in ("a.json", "b.json")]
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.argv", ["pytest-benchmark", "compare", "--between=median", *files])
        cli.main()
        out = capsys.readouterr().out
        assert "test_op[rms_norm: T16 C4096: portable: float32]" in out
        assert "+100.0%" in out

    def test_only_the_latest_of_a_name(self, tmp_path):
        """Guards unique names: pytest-benchmark would keep any of them."""
        rows = [ROW | {"time": "2026-11-28T00:00:00Z", "median_us": 40.0}, ROW]
        document = exported(tmp_path / "b.json", *rows)
        assert [b["extra_info"]["median_us"] for b in document["benchmarks"]] == [40.0]
        assert document["datetime"] == "2026-11-28T00:00:00Z"

    def test_parts_are_no_repeats(self, tmp_path):
        """Guards the parts of a decode step, which differ in `part` only."""
        rows = [ROW | {"part": part} for part in ("linear", "attention")]
        assert pytest_benchmark.write(rows, tmp_path / "b.json").rows == 2

    def test_rows_without_a_place_are_counted(self, tmp_path):
        """Guards against the time of a form with wrong results."""
        rows = [ROW, ROW, ROW | {"impl": "a", "failure": "wrong"}, ROW | {"skipped": "large"}]
        written = pytest_benchmark.write(rows, tmp_path / "b.json")
        assert written.rows == 1
        assert written.left_out == {"failed": 1, "skipped": 1, "replaced by a later row": 1}

    def test_commit(self, tmp_path):
        """Guards `+dirty`, which is a field of its own there."""
        commit = exported(tmp_path / "b.json", ROW)["commit_info"]
        assert (commit["id"], commit["dirty"]) == ("0123456789ab", True)

    def test_several_devices_are_refused(self, tmp_path):
        """Guards against a file that compares two machines as one."""
        with pytest.raises(InputError, match="of 2 devices .AMD EPYC; H100.; a file of"):
            exported(tmp_path / "b.json", ROW, ROW | {"device": "H100", "impl": "triton"})
        assert not (tmp_path / "b.json").exists()

    def test_rows_without_times_are_refused(self, tmp_path):
        """Guards against a file without benchmarks."""
        with pytest.raises(InputError, match="none of the rows has"):
            exported(tmp_path / "b.json", ROW | {"failure": "wrong"})


class TestImport:
    def test_a_row_in_extra_info(self, tmp_path):
        """Guards the round trip, and files of `pytest bench/test_ops.py`."""
        document = exported(tmp_path / "a.json", ROW | {"shape": {"rows": 16}})
        assert imported(tmp_path, document) == [ROW | {"shape": {"rows": 16}}]

    def test_any_benchmark(self, tmp_path):
        """Guards units and percentiles, and an `extra_info` that is no row."""
        assert imported(tmp_path, DOCUMENT) == [
            {
                **{"op": "tests/test_a.py::test_sort", "case": "8"},
                **{"impl": "unknown", "dtype": "unknown", "repeats": 5},
                **{"median_us": pytest.approx(2.0), "p20_us": pytest.approx(1.8)},
                **{"p80_us": pytest.approx(3.2), "device": "AMD EPYC"},
                **{"commit": "0123456789ab+dirty", "time": DOCUMENT["datetime"], "schema": 1},
                "extra_info": {"speedup": "3x"},
            }
        ]

    def test_without_data_and_parameters(self, tmp_path):
        """Guards files of `--benchmark-save`, which have no samples."""
        stats = {"median": 2e-6, "rounds": 5}
        benchmark = BENCHMARK | {"stats": stats, "param": None, "extra_info": {}}
        (row,) = imported(tmp_path, {"benchmarks": [benchmark]})
        assert (row["case"], row["device"], row["commit"]) == ("no parameters", *["unknown"] * 2)
        assert not row.keys() & {"p20_us", "p80_us", "extra_info"}

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"stats": {}}, r"stats\.median is None; it must be seconds above 0"),
            ({"stats": {"median": 0}}, r"stats\.median is 0; it must be seconds"),
            ({"stats": {"median": "1"}}, r"stats\.median is '1'; it must be a number"),
            ({"stats": {"median": 1e20}}, "median_us is 1e[+]26; it must be from"),
            ({"stats": {"median": 1, "data": [True]}}, r"a value of stats\.data is True"),
            ({"fullname": None}, "fullname is None; it must be a text"),
            ({"param": 3}, "param is 3; it must be a text"),
            ({"extra_info": ROW | {"max_err": "x"}}, "max_err is 'x'; it must be a number"),
            ({"extra_info": ROW | {"op": None}}, "op is missing"),
        ],
    )
    def test_one_line_names_the_benchmark(self, tmp_path, changes, message):
        """Guards against tracebacks, and rows that `compare` would fail on."""
        document = DOCUMENT | {"benchmarks": [BENCHMARK, BENCHMARK | changes]}
        with pytest.raises(InputError, match=rf"b\.json: benchmarks\[1\]: {message}"):
            imported(tmp_path, document)

    def test_no_benchmarks(self, tmp_path):
        """Guards against an empty file of rows."""
        with pytest.raises(InputError, match="has no benchmarks"):
            imported(tmp_path, DOCUMENT | {"benchmarks": []})
