"""Columns of tables: what they show of a row, and in which format. A kind of row has one list of
columns, for the terminal and for reports."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

Row = Mapping[str, Any]
Format = Callable[[Any], str]
Field = str | Callable[[Row], Any]  # a row's key, or a function of the row


class Column(NamedTuple):
    """One column of a table. A cell is empty where the row has no value, or None.

    heading: begins with a space if the cells align right
    optional: the column is left out if all its cells are empty
    """

    heading: str
    field: Field
    format: Format = str
    optional: bool = False

    def cell(self, row: Row) -> str:
        """The row's value as text."""
        value = row.get(self.field) if isinstance(self.field, str) else self.field(row)
        return "" if value is None else self.format(value)


class Table(NamedTuple):
    """Text cells; a column whose heading begins with a space is right-aligned."""

    title: str
    header: Sequence[str]
    lines: Sequence[Sequence[str]]


class Kind(NamedTuple):
    """How a table shows rows of one kind.

    title: may name fields of the first row in braces
    lines: from the rows of a table to those that become its lines, if they are grouped or compared
    """

    title: str
    columns: Sequence[Column]
    lines: Callable[[Sequence[Row]], Iterable[Row]] = iter

    def table(self, rows: Sequence[Row]) -> Table:
        """The table of at least one row."""
        return make_table(self.title.format_map(rows[0]), self.columns, self.lines(rows))


def make_table(title: str, columns: Iterable[Column], rows: Iterable[Row]) -> Table:
    """A line per row, without the optional columns that would be empty."""
    shown = list(rows)
    cells = [(column, [column.cell(row) for row in shown]) for column in columns]
    used = [(column, texts) for column, texts in cells if any(texts) or not column.optional]
    lines = list(zip(*(texts for _, texts in used), strict=True))
    return Table(title, [column.heading for column, _ in used], lines)


def markdown(table: Table) -> str:
    """A table in Markdown, without its title."""
    ruler = ["---:" if name.startswith(" ") else "---" for name in table.header]
    text = [_line(map(str.strip, table.header)), f"|{'|'.join(ruler)}|", *map(_line, table.lines)]
    return "\n".join(text)


def _line(cells: Iterable[str]) -> str:
    escaped = (cell.replace("|", r"\|") for cell in cells)
    return f"| {' | '.join(escaped)} |".replace("|  |", "| |")


def columns_of(rows: Sequence[Row], write: Format = str, omit: Iterable[str] = ()) -> list[Column]:
    """A column for every field that has a value in rows of an unknown kind; floats align right."""
    values = {name: value for row in reversed(rows) for name, value in row.items()}
    names = dict.fromkeys(name for row in rows for name in row if row[name] is not None)
    return [
        Column(f" {name}" if isinstance(values[name], float) else name, name, write)
        for name in names
        if name not in omit
    ]
