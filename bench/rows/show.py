"""Rows as tables in the terminal."""

from collections.abc import Sequence

from bench.rows import repro
from model.terminal import table

Row = dict

TIMES = ("op", "case", "impl", "dtype", " median us", " p20..p80", " GB/s", " TFLOP/s")
TIMES += (" % roofline", " x eager", " max error", "note")


def times(rows: Sequence[Row]) -> None:
    """The op table: one line per form with its time, rates, roofline share and error."""
    titled("times", rows, TIMES, [time_line(row) for row in rows if not row.get("skipped")])
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


def time_line(row: Row) -> list[str]:
    """The cells of TIMES."""
    line = [row["op"], row["case"], row["impl"], row["dtype"]]
    us = row["median_us"]
    if us is None:
        return [*line, *[""] * 6, error(row["max_err"]), f"FAILED: {row['failure']}"]
    return [
        *line,
        _microseconds(us),
        f"{_microseconds(row['p20_us'])}..{_microseconds(row['p80_us'])}",
        f"{row['bytes'] / us / 1e3:,.1f}",
        f"{row['flops'] / us / 1e6:,.3f}",
        f"{row['roofline_pct']:.1f}",
        f"{row['speedup']:.2f}" if row["speedup"] else "",
        error(row["max_err"]),
        _note(row),
    ]


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


def _print_reproductions(rows: Sequence[Row], kind: str) -> None:
    """Print the commands that reproduce the failed rows of ops."""
    for row in rows:
        if row["failure"]:
            arguments = (row["op"], row["case"], row["impl"], row["dtype"])
            print(f"to reproduce: {repro.command(*arguments, kind)}")


def _print_skipped(rows: Sequence[Row]) -> None:
    for line in skipped(rows):
        print(f"skipped: {line}")


RATES = ("tokens_per_second", "decode_tokens_per_second")


def jobs(rows: Sequence[Row]) -> None:
    """The end-to-end table: seconds and tokens per second of whole runs; or the table of images."""
    if "views" in rows[0]:
        _images(rows)
        return
    header = ("job", "case", "impl", "dtype", " seconds", " tokens/s", " decoding")
    header += (" x eager", " max error", "")
    lines = [
        [
            row["op"],
            row["case"],
            row["impl"],
            row["dtype"],
            f"{row['median_us'] / 1e6:.2f}",
            *(f"{row[rate]:.1f}" if row.get(rate) else "" for rate in RATES),
            f"{row['speedup']:.2f}" if row["speedup"] else "",
            error(row["max_err"]),
            f"FAILED: {row['failure']}" if row["failure"] else row.get("settings") or "",
        ]
        for row in rows
    ]
    titled("end to end", rows, header, lines)


def _images(rows: Sequence[Row]) -> None:
    header = ("image", "impl", "dtype", " views", " tokens", " ms", " p20..p80", " TFLOP/s")
    header += (" % of GEMM", " x eager", " max error", "")
    lines = [
        [
            row["case"],
            row["impl"],
            row["dtype"],
            str(row["views"]),
            str(row["tokens"]),
            f"{row['median_us'] / 1e3:,.2f}",
            f"{row['p20_us'] / 1e3:,.2f}..{row['p80_us'] / 1e3:,.2f}",
            f"{row['tflop_s']:,.3f}",
            f"{row['gemm_pct']:.1f}",
            f"{row['speedup']:.2f}",
            error(row["max_err"]),
            f"FAILED: {row['failure']}" if row["failure"] else "",
        ]
        for row in rows
    ]
    titled("images to embeddings", rows, header, lines)
    print(f"GEMM: {rows[0]['gemm_tflop_s']:,.3f} TFLOP/s in the same run")


def errors(rows: Sequence[Row]) -> None:
    """The worst error of every op's forms in each dtype, and every row that failed."""
    titled("largest errors, relative to max(rms(reference), |reference|)", rows, *worst(rows))
    for row in rows:
        if row["failure"]:
            name = f"{row['op']}, {row['case']}, {row['impl']}, {row['dtype']}"
            print(f"FAILED: {name}: {row['failure']}")
    _print_reproductions(rows, "numerics")
    _print_skipped(rows)


def worst(rows: Sequence[Row]) -> tuple[tuple[str, ...], list[list[str]]]:
    """Header and lines: the largest error of every op's forms, one column per dtype."""
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    by_form: dict[tuple[str, str], dict[str, list[Row]]] = {}
    for row in rows:
        if not row.get("skipped"):
            form_rows = by_form.setdefault((row["op"], row["impl"]), {})
            form_rows.setdefault(row["dtype"], []).append(row)
    lines = [
        [*form, *(_worst(by_dtype.get(dtype, ())) for dtype in dtypes)]
        for form, by_dtype in by_form.items()
    ]
    return ("op", "impl", *(f" {dtype}" for dtype in dtypes)), lines


def ceilings(rows: Sequence[Row]) -> None:
    """The measured roofline of each dtype."""
    lines = [
        [row["dtype"], f"{row['copy_gb_s']:,.1f}", f"{row['gemm_tflop_s']:,.3f}"] for row in rows
    ]
    titled("roofline", rows, ("dtype", " copy GB/s", " GEMM TFLOP/s"), lines)


def _microseconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}"


def _note(row: Row) -> str:
    """What is unusual about a time."""
    notes = [f"WRONG: {row['failure']}"] if row["failure"] else []
    notes += [row["settings"]] if row.get("settings") else []
    notes += ["launches included"] if row["timer"] == "events" else []
    if row.get("tokens_per_second"):
        notes.append(f"{row['tokens_per_second']:,.1f} tokens/s")
    return ", ".join(notes)


def titled(
    what: str, rows: Sequence[Row], header: Sequence[str], lines: Sequence[Sequence[str]]
) -> None:
    """Print a table whose title says where its rows were measured."""
    origin = f"{rows[0]['device']}, torch {rows[0]['torch']}, commit {rows[0]['commit']}"
    table(f"{what} ({origin})", header, lines)


def _worst(rows: Sequence[Row]) -> str:
    if any(row["failure"] for row in rows):
        return "FAILED"
    errors = [row["max_err"] for row in rows if row["max_err"] is not None]
    return error(max(errors, default=None))


def error(value: float | None) -> str:
    """An error as text; empty for None."""
    return "" if value is None else f"{value:.1e}"
