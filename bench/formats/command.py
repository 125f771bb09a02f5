"""`python -m bench convert IN --to FORMAT --out PATH`: rows in other formats, and the reverse.

Formats are `rows` (JSONL, as all commands write), `flashinfer-bench` (a dataset's folder; read also
from one JSONL file of traces) and `pytest-benchmark` (JSON). What a format has no place for is
counted in a warning; docs/measuring.md lists it. PATH must be new.
"""

import argparse
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.formats import flashinfer_bench, pytest_benchmark
from bench.formats.members import Written, check_new, valid_row
from bench.rows import jsonl
from model.errors import InputError
from model.text.files import parse_json, read_text
from model.text.rows import parse_row

ROWS, FLASHINFER_BENCH, PYTEST_BENCHMARK = "rows", "flashinfer-bench", "pytest-benchmark"
FORMATS = (ROWS, FLASHINFER_BENCH, PYTEST_BENCHMARK)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("input", type=Path, metavar="IN", help="a file, or a dataset's folder")
    parser.add_argument("--to", required=True, choices=FORMATS, help="the format to write")
    parser.add_argument(
        "--from",
        dest="source",
        choices=FORMATS,
        help="the format of IN (default: told from its content)",
    )
    parser.add_argument(
        "--out", required=True, type=Path, metavar="PATH", help="a new file, or folder of a dataset"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(options: argparse.Namespace) -> int:
    """Convert and print what was written; return 0."""
    source = options.source or detect(options.input)
    check_new(options.out)
    written = WRITERS[options.to](READERS[source](options.input), options.out)
    for reason, count in written.left_out.items():
        warnings.warn(f"rows left out: {count:,} {reason}", stacklevel=2)
    if options.json:
        document = {"from": source, "to": options.to, "out": str(options.out)}
        print(json.dumps(document | {"rows": written.rows, "left_out": written.left_out}))
    else:
        print(f"{options.out}: {written.rows:,} rows of {options.input} ({source})")
    return 0


def detect(path: Path) -> str:
    """The format of a file or folder, told from its content. Raises InputError if it is none."""
    if path.is_dir():
        if not (path / "traces").is_dir():
            raise InputError(f"{path} has no folder traces/, as a flashinfer-bench dataset has")
        return FLASHINFER_BENCH
    text = read_text(path)
    if text is None:
        raise InputError(f"{path}: no such file")
    try:
        document = parse_json(text)
    except ValueError:
        document = None
    if isinstance(document, dict) and "benchmarks" in document:
        return PYTEST_BENCHMARK
    first = parse_row(text.lstrip().split("\n", 1)[0]) or {}
    if first.keys() >= {"definition", "workload"}:
        return FLASHINFER_BENCH
    if "op" in first:
        return ROWS
    raise InputError(
        f"{path} is in none of the formats: rows (JSONL with op), flashinfer-bench (JSONL with"
        " definition and workload, or a dataset's folder), pytest-benchmark (JSON with benchmarks)"
    )


def _read_rows(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        raise InputError(f"{path}: no such file")
    rows = [valid_row(row, row.where) for row in jsonl.read(path)]
    if not rows:
        raise InputError(f"{path} has no rows")
    return rows


def _write_rows(rows: Sequence[dict[str, Any]], out: Path) -> Written:
    check_new(out)
    jsonl.append(out, rows)
    return Written(len(rows))


READERS: dict[str, Callable[[Path], list[dict[str, Any]]]] = {
    ROWS: _read_rows,
    FLASHINFER_BENCH: flashinfer_bench.read,
    PYTEST_BENCHMARK: pytest_benchmark.read,
}
WRITERS: dict[str, Callable[[Sequence[dict[str, Any]], Path], Written]] = {
    ROWS: _write_rows,
    FLASHINFER_BENCH: flashinfer_bench.write,
    PYTEST_BENCHMARK: pytest_benchmark.write,
}
