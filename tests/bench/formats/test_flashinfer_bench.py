"""Datasets of flashinfer-bench: what the schema demands, and what becomes of foreign traces."""

import ast
import json
from pathlib import Path

import pytest

from bench.formats import flashinfer_bench
from bench.rows import jsonl
from model.errors import InputError

SHAPE = {"batch": 16, "prefix": 2048, "fp8": False, "scale": 0.5, "lengths": [1, 2], "kind": "a"}
ROW = {
    **{"op": "rms_norm", "case": "T16 C4096", "impl": "portable", "dtype": "float32"},
    **{"median_us": 30.0, "p20_us": 29.0, "p80_us": 33.0, "speedup": 1.5, "max_err": 2e-7},
    **{"device": "AMD EPYC", "torch": "2.13.0", "time": "2026-11-27T23:10:39Z", "failure": None},
}
EVALUATION = {
    "status": "PASSED",
    "log": "",
    "correctness": {"max_relative_error": 2e-3, "max_absolute_error": 1e-3},
    "performance": {"latency_ms": 0.01, "reference_latency_ms": 0.03, "speedup_factor": 3.0},
    "environment": {"hardware": "NVIDIA H100", "libs": {"cuda": "12.8", "torch": "2.9.0"}},
    "timestamp": "2025-10-01T12:00:00",
}
TRACE = {
    "definition": "rmsnorm_h4096",
    "workload": {
        "axes": {"batch_size": 32},
        "inputs": {"hidden_states": {"type": "random"}},
        "uuid": "6120f144-b973-4bd9-b884-77ecb132914e",
    },
    "solution": "rmsnorm_triton",
    "evaluation": EVALUATION,
}


def exported(out: Path, *rows: dict) -> tuple[dict, list[dict], list[dict]]:
    """The only definition of an export, its workloads and its traces."""
    flashinfer_bench.write(rows, out)
    (definition,) = out.glob("definitions/*/*.json")
    (workloads,), (traces,) = out.glob("workloads/*/*.jsonl"), out.glob("traces/*/*.jsonl")
    assert definition.stem == workloads.stem == traces.stem
    return json.loads(definition.read_text()), jsonl.read(workloads), jsonl.read(traces)


def imported(folder: Path, **changes: object) -> dict:
    """The row of TRACE with other members in its evaluation; None removes one."""
    evaluation = {k: v for k, v in (EVALUATION | changes).items() if v is not None}
    path = folder / "traces.jsonl"
    path.write_text(json.dumps(TRACE | {"evaluation": evaluation}) + "\n")
    (row,) = flashinfer_bench.read(path)
    return row


class TestExport:
    def test_definition(self, tmp_path):
        """Guards what flashinfer-bench demands of a Definition: code with `run`, all axes."""
        rows = [ROW | {"shape": {"rows": 1}}, ROW | {"case": "other", "shape": {"width": 2}}]
        definition, workloads, traces = exported(tmp_path / "out", *rows)
        assert definition["name"] == "rms_norm_float32" == traces[0]["definition"]
        assert definition["op_type"] == "rms_norm"
        assert definition["axes"] == {"rows": {"type": "var"}, "width": {"type": "var"}}
        functions = ast.parse(definition["reference"]).body
        assert [f.name for f in functions if isinstance(f, ast.FunctionDef)] == ["run"]
        assert [w["workload"] for w in workloads] == [t["workload"] for t in traces]
        assert not any("evaluation" in workload for workload in workloads)

    def test_only_integers_are_axes(self, tmp_path):
        """Guards against booleans, which are integers in Python, and axes that are no sizes."""
        _, _, (trace,) = exported(tmp_path / "out", ROW | {"shape": SHAPE | {"offset": -1}})
        assert trace["workload"]["axes"] == {"batch": 16, "prefix": 2048}

    def test_a_dtype_is_another_definition(self, tmp_path):
        """Guards against ranking fp32 against bf16, which a Definition of both would allow."""
        rows = [ROW, ROW | {"dtype": "bfloat16"}]
        assert flashinfer_bench.write(rows, tmp_path / "out").rows == 2
        names = sorted(path.stem for path in tmp_path.glob("out/traces/*/*.jsonl"))
        assert names == ["rms_norm_bfloat16", "rms_norm_float32"]

    def test_implementations_share_a_workload(self, tmp_path):
        """Guards the comparison of solutions, which goes by a workload's uuid, across exports."""
        uuids = [
            exported(tmp_path / name, *rows)[1]
            for name, rows in (("a", [ROW, ROW | {"impl": "eager"}]), ("b", [ROW]))
        ]
        assert uuids[0] == uuids[1]
        assert len(uuids[0]) == 1

    @pytest.mark.parametrize(
        ("changes", "status"),
        [
            ({}, "PASSED"),
            ({"failure": "max error 1 exceeds 0.1"}, "INCORRECT_NUMERICAL"),
            ({"failure": "max error inf exceeds 1", "max_err": None}, "INCORRECT_NUMERICAL"),
            ({"failure": "OSError: x", "trace": "...", "median_us": None}, "RUNTIME_ERROR"),
            ({"failure": "TIMEOUT: 60 s"}, "TIMEOUT"),
        ],
    )
    def test_results_that_a_status_demands(self, tmp_path, changes, status):
        """Guards against traces that flashinfer-bench refuses: a wrong result with a time, an
        error with a correctness."""
        _, _, (trace,) = exported(tmp_path / "out", ROW | changes)
        evaluation = trace["evaluation"]
        assert evaluation["status"] == status
        assert ("performance" in evaluation) == (status == "PASSED")
        assert ("correctness" in evaluation) == (status in ("PASSED", "INCORRECT_NUMERICAL"))
        assert evaluation["log"] == (changes.get("failure") or "")

    def test_units_and_unknown_errors(self, tmp_path):
        """Guards milliseconds, the reference's time, and an absolute error of 0 that nobody
        measured."""
        _, _, (trace,) = exported(tmp_path / "out", ROW)
        performance = trace["evaluation"]["performance"]
        assert performance == {
            "latency_ms": pytest.approx(0.03),
            "reference_latency_ms": pytest.approx(0.045),
            "speedup_factor": 1.5,
        }
        correctness = {"max_relative_error": 2e-7, "max_absolute_error": "NaN"}
        assert trace["evaluation"]["correctness"] == correctness

    def test_rows_without_a_result_are_counted(self, tmp_path):
        """Guards against losing rows silently, and against a time of 0 for one without."""
        rows = [ROW, ROW | {"median_us": None}, ROW | {"skipped": "too large"}, {"op": "roofline"}]
        written = flashinfer_bench.write(rows, tmp_path / "out")
        assert written.rows == 1
        assert written.left_out == {
            "without a time or a failure": 1,
            "skipped": 1,
            "without case and impl and dtype": 1,
        }

    def test_names_stay_inside_the_folder(self, tmp_path):
        """Guards against writing elsewhere: an op may have any name."""
        flashinfer_bench.write([ROW | {"op": "../../x", "dtype": ".."}], tmp_path / "a" / "out")
        assert [path.name for path in tmp_path.iterdir()] == ["a"]
        assert [path.name for path in (tmp_path / "a").iterdir()] == ["out"]


class TestImport:
    def test_fields(self, tmp_path):
        """Guards the meaning of each member of a trace."""
        assert imported(tmp_path) == {
            **{"op": "rmsnorm_h4096", "case": "batch_size=32 6120f144", "impl": "rmsnorm_triton"},
            **{"dtype": "unknown", "shape": {"batch_size": 32}, "uuid": TRACE["workload"]["uuid"]},
            **{"median_us": 10.0, "speedup": 3.0, "max_err": 2e-3, "max_abs_err": 1e-3},
            **{"failure": None, "device": "NVIDIA H100", "libs": {"cuda": "12.8"}},
            **{"torch": "2.9.0", "triton": None, "time": "2025-10-01T12:00:00", "schema": 1},
        }

    def test_dtype_of_the_definition(self, tmp_path):
        """Guards the dtype, which only definitions have."""
        inputs = {
            "eps": {"shape": None, "dtype": "float32"},
            "hidden_states": {"shape": ["batch_size"], "dtype": "bfloat16"},
            "table": {"shape": ["batch_size"], "dtype": "int32"},
        }
        for folder, name, member in (
            ("definitions", "a.json", {"name": "rmsnorm_h4096", "inputs": inputs}),
            ("traces", "a.jsonl", TRACE),
        ):
            (tmp_path / folder / "rmsnorm").mkdir(parents=True)
            (tmp_path / folder / "rmsnorm" / name).write_text(json.dumps(member))
        assert [row["dtype"] for row in flashinfer_bench.read(tmp_path)] == ["bfloat16"]

    def test_failures_keep_their_status(self, tmp_path):
        """Guards the reason, which a table shows on one line, on its way back too."""
        log = "ptxas\n error: x \n\n"
        row = imported(tmp_path, status="COMPILE_ERROR", log=log, performance=None)
        assert row["failure"] == "COMPILE_ERROR: error: x"
        assert row["median_us"] is row["max_err"] is None
        _, _, (trace,) = exported(tmp_path / "out", row)
        assert trace["evaluation"]["status"] == "COMPILE_ERROR"

    def test_the_log_of_a_wrong_result_is_no_reason(self, tmp_path):
        """Guards against "INCORRECT_NUMERICAL: ninja: no work to do.", as real logs end."""
        log = "ninja: no work to do.\n"
        row = imported(tmp_path, status="INCORRECT_NUMERICAL", log=log, performance=None)
        assert (row["failure"], row["max_err"]) == ("INCORRECT_NUMERICAL", 2e-3)
        _, _, (trace,) = exported(tmp_path / "out", row)
        assert trace["evaluation"]["correctness"] == EVALUATION["correctness"]

    def test_errors_that_are_no_numbers(self, tmp_path):
        """Guards against NaN and infinity in rows, which are no JSON."""
        nan = {"max_relative_error": "NaN", "max_absolute_error": float("inf")}
        row = imported(tmp_path, correctness=nan)
        assert row["max_err"] is row["max_abs_err"] is None

    def test_a_time_of_0_is_none(self, tmp_path):
        """Guards against the schema's default as a measurement."""
        row = imported(tmp_path, performance={"latency_ms": 0.0, "speedup_factor": 0.0})
        assert row["median_us"] is row["speedup"] is None

    def test_workloads_are_left_out_with_a_warning(self, tmp_path):
        """Guards against losing lines silently."""
        path = tmp_path / "traces.jsonl"
        workload = {k: TRACE[k] for k in ("definition", "workload")}
        path.write_text(f"{json.dumps(TRACE)}\n{json.dumps(workload | {'evaluation': None})}\n")
        with pytest.warns(UserWarning, match="without an evaluation left out: 1$"):
            assert len(flashinfer_bench.read(path)) == 1
        path.write_text(json.dumps(workload))
        with pytest.raises(InputError, match="has no traces with an evaluation"):
            flashinfer_bench.read(path)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"status": "FINE"}, "status is 'FINE'; it must be one of PASSED, "),
            ({"performance": None}, "no performance; it must be an object"),
            ({"correctness": None}, "no correctness; it must be an object"),
            ({"timestamp": 3}, "timestamp is 3; it must be a text"),
            ({"performance": {"latency_ms": "fast"}}, "latency_ms is 'fast'; it must be a number"),
            ({"performance": {"latency_ms": -1}}, "latency_ms is -1; it must be a number"),
            ({"environment": {"hardware": "x", "libs": []}}, None),
            ({"environment": {"hardware": "x", "libs": [1]}}, "libs is .1.; it must be an object"),
        ],
    )
    def test_one_line_names_the_member(self, tmp_path, changes, message):
        """Guards against tracebacks, and rows of what was not measured."""
        if message is None:
            assert imported(tmp_path, **changes)["libs"] == {}
            return
        with pytest.raises(InputError, match=rf"traces\.jsonl:1: {message}"):
            imported(tmp_path, **changes)
