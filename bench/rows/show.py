"""Rows as tables in the terminal, with the lines that follow them."""

from collections.abc import Sequence
from functools import partial

from bench.rows import cost_tables, op_tables, repro, run_tables
from bench.rows.columns import Kind, Row, Table
from bench.rows.serve_tables import SERVE
from model import terminal


def show(kind: Kind, rows: Sequence[Row]) -> None:
    """Print rows of one kind as a table."""
    print_table(kind.table(rows))


def print_table(table: Table) -> None:
    terminal.table(*table)


def times(rows: Sequence[Row]) -> None:
    """The op table, the rooflines and peers that it refers to, and what was skipped."""
    show(op_tables.OPS, rows)
    for row in {row["dtype"]: row for row in rows if row["copy_gb_s"]}.values():
        print(
            f"roofline of {row['dtype']}: copy {row['copy_gb_s']:,.1f} GB/s,"
            f" matrix product {row['gemm_tflop_s']:,.3f} TFLOP/s"
        )
    versions = {row["version"]: None for row in rows if row.get("version")}
    if versions:
        print(f"peers: {', '.join(versions)}")
    _print_reproductions(rows, "ops")
    _print_skipped(rows)


def errors(rows: Sequence[Row]) -> None:
    """The largest errors of every op's forms, and every row that failed."""
    show(op_tables.errors(rows), rows)
    _print_failures(rows, ("op", "case", "impl", "dtype"))
    _print_reproductions(rows, "numerics")
    _print_skipped(rows)


def validation(rows: Sequence[Row]) -> None:
    """The worst case of each op, form, dtype and reference; what failed, and what was skipped."""
    show(op_tables.VALIDATION, rows)
    _print_failures(rows, ("op", "case", "impl", "dtype", "reference"))
    cases: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        if row["skipped"]:
            cases.setdefault((row["impl"], row["skipped"]), set()).add(row["case"])
    for (impl, reason), names in cases.items():
        print(f"skipped: {reason} ({impl}: {len(names)} {'case' if len(names) == 1 else 'cases'})")


def decode(rows: Sequence[Row]) -> None:
    """The steps and prompts as a table, and each form's time by part."""
    times([row for row in rows if row["op"] != "decode_part"])
    if parts := [row for row in rows if row["op"] == "decode_part"]:
        show(op_tables.DECODE_PARTS, parts)


def whole_runs(rows: Sequence[Row]) -> None:
    """Seconds and tokens per second of answers and photos; or the tables of images."""
    if "views" not in rows[0]:
        show(run_tables.WHOLE_RUNS, rows)
        return
    for op in dict.fromkeys(row["op"] for row in rows):
        show(run_tables.RUNS[op], [row for row in rows if row["op"] == op])
    print(f"GEMM: {rows[0]['gemm_tflop_s']:,.3f} TFLOP/s in the same run")


def replay(rows: Sequence[Row]) -> None:
    """The simulator's errors, and how well its cost model fits."""
    show(run_tables.REPLAY, rows)
    _print_fit(rows[0])


def replicas(rows: Sequence[Row]) -> None:
    """One study of replicas, and what went wrong."""
    show(run_tables.RUNS[rows[0]["op"]], rows)
    if "ray_s" in (row := rows[-1]):
        print(
            f"not counted: Ray started in {row['ray_s']:.1f} s, replicas in {row['load_s']:.1f} s"
        )
    if "fit_residual" in row:
        _print_fit(row)


def serve(rows: Sequence[Row]) -> None:
    """One study of a server: a table per kind of row, and warnings of what limits their worth."""
    for op, kind in SERVE.items():
        if rows_of_kind := [row for row in rows if row["op"] == op]:
            show(kind, rows_of_kind)
    for warning in (text for row in rows for text in row.get("warnings", ())):
        print(f"warning: {warning}")


def _print_fit(row: Row) -> None:
    print(
        f"cost model fitted to {row['fitted_steps']} steps of other runs;"
        f" median error {100 * row['fit_residual']:.1f} %"
    )


def tuning(rows: Sequence[Row]) -> None:
    """What was measured; or, of a dry run, what would be."""
    show(op_tables.CANDIDATES if "candidates" in rows[0] else op_tables.TUNED, rows)


def costs(rows: Sequence[Row]) -> None:
    """Floors and balance of prefix attention, or of vision ops."""
    if "padding" in rows[0]:
        show(cost_tables.VISION, rows)
        return
    tables: dict[str, list[Row]] = {}
    for row in rows:
        tables.setdefault(row["table"], []).append(row)
    for name, table_rows in tables.items():
        show(cost_tables.ROTARY if name == "rotary" else cost_tables.ATTENTION, table_rows)
        if name == "rotary":
            print(f"assumed: {table_rows[0]['assumed']}")
    source = rows[0]["copy_source"].replace("datasheet", "data sheet")
    copy = f"{rows[0]['copy_gb_s']:,.0f} GB/s ({source})"
    product = f"{rows[0]['gemm_tflop_s']:,.0f} TFLOP/s (data sheet)"
    print(f"floors: copy {copy}, matrix product {product}")


ceilings = partial(show, op_tables.CEILINGS)
engine_steps = partial(show, run_tables.ENGINE_STEPS)
packing = partial(show, run_tables.PACKING)
scheduler = partial(show, run_tables.SCHEDULER)
dispatch = partial(show, run_tables.DISPATCH)
memory = partial(show, run_tables.PREFILL_MEMORY)
fold = partial(show, run_tables.FOLD)
fp8_kv = partial(show, run_tables.FP8_KV)
needle = partial(show, run_tables.NEEDLE)
generate = partial(show, run_tables.GENERATE)
gate = partial(show, op_tables.GATE)


def skipped(rows: Sequence[Row]) -> list[str]:
    """One line per form and reason, with the cases' names unless all of the form's cases were
    skipped."""
    cases_by_reason: dict[tuple[str, str], dict[tuple[str, str], None]] = {}
    for row in rows:
        if row.get("skipped"):
            cases = cases_by_reason.setdefault((row["impl"], row["skipped"]), {})
            cases[row["op"], row["case"]] = None
    lines = []
    for (impl, reason), cases in cases_by_reason.items():
        everywhere = {(row["op"], row["case"]) for row in rows if row["impl"] == impl} == {*cases}
        names = dict.fromkeys(case for _, case in cases)
        where = "" if everywhere and impl != "all" else f" ({'; '.join(names)})"
        lines.append(f"{impl}: {reason}{where}")
    return lines


def _print_failures(rows: Sequence[Row], names: Sequence[str]) -> None:
    """Print a line for each row that failed, which `names` identify."""
    for row in rows:
        if row["failure"]:
            print(f"FAILED: {', '.join(row[name] for name in names)}: {row['failure']}")


def _print_reproductions(rows: Sequence[Row], kind: str) -> None:
    """Print the commands that reproduce the failed rows of ops."""
    for row in rows:
        if row["failure"]:
            arguments = (row["op"], row["case"], row["impl"], row["dtype"])
            print(f"to reproduce: {repro.command(*arguments, kind, row.get('options', ()))}")


def _print_skipped(rows: Sequence[Row]) -> None:
    for line in skipped(rows):
        print(f"skipped: {line}")
