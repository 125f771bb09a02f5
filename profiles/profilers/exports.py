"""Parser of the CSV that nsys and ncu print: several tables in one text, with messages between
them.

Versions of the tools differ in headings ("Start (ns)", "Start (us)"), in empty cells ("", "None",
"N/A") and in separators of thousands. A missing column is an InputError that names it.
"""

import csv
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from model.errors import InputError

IN_US = {"ns": 1e-3, "us": 1.0, "ms": 1e3, "s": 1e6}
UNIT = re.compile(r"\s*\((\w+)\)$")


@dataclass(frozen=True)
class Table:
    """One table of an export. Error messages name `source`."""

    source: str
    header: Sequence[str]
    rows: list[Sequence[str]]

    def has(self, *names: str) -> bool:
        """Whether there are columns with these names, in any unit."""
        return set(names) <= {UNIT.sub("", name) for name in self.header}

    def texts(self, name: str) -> list[str]:
        """A column as text."""
        index = self._index(name)
        return [row[index] for row in self.rows]

    def numbers(self, name: str) -> list[float]:
        """A column of numbers. Raises InputError if a row has none."""
        values = [number(text) for text in self.texts(name)]
        known = [value for value in values if value is not None]
        if len(known) < len(values):
            heading = self.header[self._index(name)]
            raise InputError(f"{self.source}: a row has no number in column {heading!r}")
        return known

    def microseconds(self, name: str) -> list[float]:
        """A column of times in microseconds; its heading has the unit."""
        heading = self.header[self._index(name)]
        unit = UNIT.search(heading)
        if not unit or unit[1] not in IN_US:
            units = ", ".join(IN_US)
            raise InputError(f"{self.source}: column {heading!r} has no unit of time ({units})")
        return [time * IN_US[unit[1]] for time in self.numbers(name)]

    def _index(self, name: str) -> int:
        for index, heading in enumerate(self.header):
            if UNIT.sub("", heading) == name:
                return index
        raise InputError(f"{self.source}: no column {name!r}; there are: {', '.join(self.header)}")


def tables(text: str, source: str) -> list[Table]:
    """The tables of a text. A table ends at a line with another number of cells than its header."""
    parsed: list[Table] = []
    for cells in _lines(text, source):
        rows = parsed[-1].rows if parsed else None
        if len(cells) < 3:
            parsed.append(Table(source, (), []))  # the next lines are another table
        elif rows is not None and len(cells) == len(parsed[-1].header):
            rows.append(cells)
        else:
            parsed.append(Table(source, cells, []))
    return [table for table in parsed if table.header]


def number(text: str) -> float | None:
    """A finite number, with or without separators of thousands; None if the text is none."""
    try:
        value = float(text.replace(",", ""))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _lines(text: str, source: str) -> Iterator[list[str]]:
    try:
        yield from csv.reader(text.splitlines())
    except csv.Error as error:  # a cell of more than 128 KiB
        raise InputError(f"{source} is not CSV: {error}") from None
