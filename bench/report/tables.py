"""The tables of a report: those of the terminal, without the columns that would be empty."""

from collections.abc import Sequence

from bench.report.rows import Measurements, group_by, kind_of
from bench.rows.columns import Column, Kind, Table, columns_of, make_table
from bench.rows.op_tables import DECODE_PARTS, OPS, errors
from bench.rows.run_tables import RUNS
from bench.rows.show import skipped

ORIGIN = ("device", "driver", "torch", "triton", "commit", "time", "schema")
MAX_ROWS, MAX_LENGTH = 40, 200  # rows of an unknown kind; characters of a value
# A terminal shows the rows of one run; a report those of many, which these fields tell apart.
NAMES = tuple(Column(name, name) for name in ("case", "policy", "impl", "dtype"))


def op_tables(measurements: Measurements) -> list[Table]:
    """A table per op with the rows that were timed or failed."""
    rows = [row for row in measurements.of("op") if row["failure"] or row["median_us"]]
    return [_table(op, OPS, op_rows) for (op,), op_rows in group_by(rows, "op").items()]


def error_table(measurements: Measurements) -> Table | None:
    """The worst error of each op's forms over the cases that were checked but not timed."""
    checked = [row for row in measurements.of("op") if not row["median_us"]]
    if not checked:
        return None
    kind = errors(checked)
    return make_table("errors", kind.columns, kind.lines(checked))


def run_tables(measurements: Measurements) -> list[Table]:
    """A table per kind of end-to-end, engine and scheduler rows."""
    return [
        _table(op, kind, measurements.of(op)) for op, kind in RUNS.items() if measurements.of(op)
    ]


def skipped_lines(measurements: Measurements) -> list[str]:
    """A line for each skipped form and reason."""
    kinds = ("op", "no numbers")
    return skipped([row for row in measurements.latest if kind_of(row) in kinds and row["case"]])


def part_table(parts: Sequence[dict]) -> Table:
    """The time of decode steps by part."""
    return _table("Parts of decode steps", DECODE_PARTS, parts)


def other_tables(measurements: Measurements) -> list[Table]:
    """A table per kind with the values of rows that no other section shows."""
    kinds: dict[str, list[dict]] = {}
    for row in measurements.latest:
        if kind_of(row) == "other":
            kinds.setdefault(str(row.get("op", "no op")), []).append(row)
    return [_values(kind, rows) for kind, rows in kinds.items()]


def _values(kind: str, rows: Sequence[dict]) -> Table:
    """The first rows of a kind, with all fields except their origin."""
    note = f": the first {MAX_ROWS} of {len(rows)} rows" if len(rows) > MAX_ROWS else ""
    return make_table(kind + note, columns_of(rows, _text, ("op", *ORIGIN)), rows[:MAX_ROWS])


def _text(value: object) -> str:
    """A value of unknown meaning as text, cut to MAX_LENGTH characters."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= MAX_LENGTH else text[: MAX_LENGTH - 1] + "…"


def _table(title: str, kind: Kind, rows: Sequence[dict]) -> Table:
    """Rows of one op, which the title names, with NAMES unless the kind has these columns."""
    fields = {column.field for column in kind.columns}
    columns = [column for column in NAMES if column.field not in fields]
    columns += [column for column in kind.columns if column.field != "op"]
    filled = [column._replace(optional=True) for column in columns]
    return make_table(title, filled, kind.lines(rows))
