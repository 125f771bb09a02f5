"""Rows as a dataset of flashinfer-bench, and its traces as rows.

The schema is that of flashinfer-bench 0.1.2 (PyPI; `flashinfer_bench/data/`: definition.py,
workload.py, trace.py, trace_set.py), which github.com/flashinfer-ai/flashinfer-bench at 06323a4
extends by `performance.profile`. A dataset is a folder with definitions/<op_type>/<name>.json and
JSON Lines of Traces in workloads/ and traces/; a Trace in workloads/ has no evaluation.

Export. An op in one dtype becomes a Definition, since a Definition fixes its dtypes; a case becomes
a Workload, whose uuid depends on op, case and dtype only; a row becomes a Trace. Integers of the
row's `shape` are the Workload's axes. A Trace has one member more than the schema, `row`: the row
itself, which flashinfer-bench ignores, and loses when it rewrites the file.

- Definitions have no inputs, outputs and reference code, and there are no Solutions: rows hold no
  code. flashinfer-bench reads and ranks such traces, but cannot run them.
- `latency_ms` is the row's median (flashinfer-bench measures a mean). `speedup_factor` and
  `reference_latency_ms` are over "eager", and 0, the schema's default, where there is no speed-up.
- `max_relative_error` is the row's `max_err`. The absolute error is NaN, which the schema allows:
  our rows have none. A limit on it, as in `get_best_trace`, therefore excludes their traces.
- A failed row that raised is a RUNTIME_ERROR, another one INCORRECT_NUMERICAL; times of a failed
  row are in `row` only. Skipped rows, and rows with neither time nor failure, are left out.

Import. A Trace with `row` is that row. Otherwise `op` is the definition, `impl` the solution,
`case` the axes and the start of the uuid, `shape` the axes, `device` the hardware, `median_us` the
mean latency, `max_err` their relative error (over the reference's magnitude), and `dtype` that of
the definition's first tensor, "unknown" without definitions/. `max_abs_err`, `libs` and `uuid`
become fields of the same names. Not imported: the inputs' data, solutions, kernel profiles, extra
metrics, reference code, and logs, but for the last line of one of an error. Traces without an
evaluation are left out with a warning.
"""

import re
import uuid
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.formats.members import (
    UNKNOWN,
    Written,
    case_of,
    check_new,
    complete,
    member,
    number,
    of_type,
    valid_row,
)
from bench.rows import jsonl
from bench.rows.schema import SCHEMA
from model.errors import InputError, shown
from model.text.files import read_json
from model.text.rows import FileRow, read_rows

PASSED, WRONG, RAISED = "PASSED", "INCORRECT_NUMERICAL", "RUNTIME_ERROR"
FAILED = (WRONG, "INCORRECT_SHAPE", "INCORRECT_DTYPE", RAISED, "COMPILE_ERROR", "TIMEOUT")
NO_CODE = 'def run(*inputs):\n    raise NotImplementedError("rows hold no reference code")\n'
ABSOLUTE = "max_abs_err"  # a field of imported rows only
LIBRARIES = ("torch", "triton")  # whose versions are fields of a row


def write(rows: Sequence[dict[str, Any]], out: Path) -> Written:
    """Write a dataset into the new folder `out`. Raises InputError if it exists or no row fits."""
    check_new(out)
    written = Written()
    definitions: dict[tuple[str, str], dict[str, Any]] = {}
    workloads: dict[tuple[str, str], dict[str, dict]] = {}
    traces: dict[tuple[str, str], list[dict]] = {}
    for row in complete(rows, written.left_out):
        trace = _trace(row)
        key = (_slug(row["op"]), trace["definition"])
        definition = definitions.setdefault(key, _definition(row))
        definition["axes"] |= dict.fromkeys(trace["workload"]["axes"], {"type": "var"})
        workload = trace["workload"]
        workloads.setdefault(key, {})[workload["uuid"]] = {
            "definition": trace["definition"],
            "workload": workload,
        }
        traces.setdefault(key, []).append(trace)
        written.rows += 1
    if not written.rows:
        raise InputError("none of the rows has op, case, impl, dtype and a time or a failure")
    for (op_type, name), definition in definitions.items():
        jsonl.write_json(out / "definitions" / op_type / f"{name}.json", definition)
        lines = workloads[op_type, name].values()
        jsonl.append(out / "workloads" / op_type / f"{name}.jsonl", lines)
        jsonl.append(out / "traces" / op_type / f"{name}.jsonl", traces[op_type, name])
    return written


def read(path: Path) -> list[dict[str, Any]]:
    """The traces of a dataset's folder or of one JSONL file as rows.

    Raises InputError for an unreadable or invalid file, and if there is no trace with a result.
    """
    dtypes = dict(_dtypes(path)) if path.is_dir() else {}
    files = sorted((path / "traces").rglob("*.jsonl")) if path.is_dir() else [path]
    traces = [trace for file in files for trace in read_rows(file)]
    rows = [_row(trace, dtypes) for trace in traces if trace.get("evaluation") is not None]
    if not rows:
        raise InputError(f"{path} has no traces with an evaluation")
    if empty := len(traces) - len(rows):
        warnings.warn(f"{path}: traces without an evaluation left out: {empty:,}", stacklevel=2)
    return rows


def _definition(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": _name(row),
        "op_type": _slug(row["op"]),
        "axes": {},
        "inputs": {},
        "outputs": {},
        "reference": NO_CODE,
        "description": f"{row['op']} in {row['dtype']}",
    }


def _trace(row: dict[str, Any]) -> dict[str, Any]:
    status = _status(row)
    evaluation: dict[str, Any] = {
        "status": status,
        "environment": {
            "hardware": row.get("device") or UNKNOWN,
            "libs": {name: row[name] for name in LIBRARIES if row.get(name)},
        },
        "timestamp": row.get("time") or UNKNOWN,
        "log": row.get("failure") or "",
    }
    if status in (PASSED, WRONG):
        errors = {"max_relative_error": row.get("max_err"), "max_absolute_error": row.get(ABSOLUTE)}
        evaluation["correctness"] = {
            name: "NaN" if error is None else error for name, error in errors.items()
        }
    if status == PASSED:
        latency, speedup = row["median_us"] / 1e3, row.get("speedup") or 0.0
        evaluation["performance"] = {
            "latency_ms": latency,
            "reference_latency_ms": latency * speedup,
            "speedup_factor": speedup,
        }
    return {
        "definition": _name(row),
        "workload": _workload(row),
        "solution": _slug(f"{_name(row)}_{row['impl']}"),
        "evaluation": evaluation,
        "row": dict(row),
    }


def _workload(row: dict[str, Any]) -> dict[str, Any]:
    shape = row.get("shape")
    axes = {name: n for name, n in shape.items() if _is_axis(n)} if isinstance(shape, dict) else {}
    identity = "\n".join((row["op"], case_of(row), row["dtype"]))
    return {"axes": axes, "inputs": {}, "uuid": str(uuid.uuid5(uuid.NAMESPACE_OID, identity))}


def _status(row: dict[str, Any]) -> str:
    failure = row.get("failure")
    if not failure:
        return PASSED
    imported = (status for status in FAILED if failure.startswith(status))
    return next(imported, RAISED if row.get("trace") else WRONG)


def _row(trace: FileRow, dtypes: dict[str, str]) -> dict[str, Any]:
    where = trace.where
    if "row" in trace:
        return valid_row(member(trace, "row", dict, where), where)
    definition = member(trace, "definition", str, where)
    workload = member(trace, "workload", dict, where)
    evaluation = member(trace, "evaluation", dict, where)
    axes, identity = member(workload, "axes", dict, where), member(workload, "uuid", str, where)
    for name, value in axes.items():
        if not _is_axis(value):
            raise InputError(
                f"{where}: axis {name} is {shown(value)}; it must be an integer, at least 0"
            )
    row = {
        "op": definition,
        "case": " ".join([*(f"{name}={axes[name]}" for name in axes), identity[:8]]),
        "impl": member(trace, "solution", str, where),
        "dtype": dtypes.get(definition, UNKNOWN),
        "shape": axes,
        "uuid": identity,
        **_result(evaluation, where),
        **_origin(evaluation, where),
    }
    return valid_row(row, where)


def _result(evaluation: dict[str, Any], where: str) -> dict[str, Any]:
    status = member(evaluation, "status", str, where)
    if status not in (PASSED, *FAILED):
        known = ", ".join((PASSED, *FAILED))
        raise InputError(f"{where}: status is {shown(status)}; it must be one of {known}")
    failure, performance, correctness = None, {}, {}
    if status == PASSED:
        performance = member(evaluation, "performance", dict, where)
    elif status == WRONG:  # its log is that of the build
        failure = status
    else:
        log = of_type(evaluation.get("log") or "", "log", str, where).strip()
        failure = ": ".join(filter(None, (status, log and log.splitlines()[-1].strip()[:200])))
    if status in (PASSED, WRONG):
        correctness = member(evaluation, "correctness", dict, where)
    latency, speedup = (
        number(performance.get(name), name, where) for name in ("latency_ms", "speedup_factor")
    )
    relative, absolute = (
        number(correctness.get(name), name, where)
        for name in ("max_relative_error", "max_absolute_error")
    )
    return {
        "median_us": latency * 1e3 if latency else None,  # 0 is the schema's default
        "speedup": speedup or None,
        "max_err": relative,
        ABSOLUTE: absolute,
        "failure": failure,
    }


def _origin(evaluation: dict[str, Any], where: str) -> dict[str, Any]:
    environment = member(evaluation, "environment", dict, where)
    libs = dict(of_type(environment.get("libs") or {}, "libs", dict, where))
    return {
        "device": member(environment, "hardware", str, where),
        **{name: libs.pop(name, None) for name in LIBRARIES},
        "libs": libs,
        "time": member(evaluation, "timestamp", str, where),
        "schema": SCHEMA,
    }


def _dtypes(dataset: Path) -> Iterator[tuple[str, str]]:
    """The name of each definition, and the dtype of its first tensor."""
    for path in sorted((dataset / "definitions").rglob("*.json")):
        where = str(path)
        definition = read_json(path) or {}
        for name, spec in member(definition, "inputs", dict, where).items():
            spec = of_type(spec, name, dict, where)
            if spec.get("shape") is not None:
                yield member(definition, "name", str, where), member(spec, "dtype", str, where)
                break


def _is_axis(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _name(row: dict[str, Any]) -> str:
    return _slug(f"{row['op']}_{row['dtype']}")


def _slug(text: str) -> str:
    """`text` as the name of a file or folder in any directory."""
    return re.sub("[^A-Za-z0-9_-]+", "_", text)
