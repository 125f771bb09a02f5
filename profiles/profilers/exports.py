"""The CSV that nsys and ncu print, as tables: several in one text, between lines meant for people.

Versions of the tools differ in headings ("Start (ns)", "Start (us)"), in what an empty cell holds
("", "None", "N/A") and in whether thousands are separated. A column that nobody wrote is an
InputError that names it.
"""

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass

from model.errors import InputError

EMPTY = {"", "-", "None", "N/A", "n/a", "nan"}
IN_US = {"ns": 1e-3, "us": 1.0, "ms": 1e3, "s": 1e6}
UNIT = re.compile(r"\s*\((\w+)\)$")


@dataclass(frozen=True)
class Table:
    """One table of an export. `source` is named in complaints."""

    source: str
    header: Sequence[str]
    rows: list[Sequence[str]]

    def has(self, *names: str) -> bool:
        """Whether there are columns of these names, whatever their unit."""
        return set(names) <= {UNIT.sub("", name) for name in self.header}

    def texts(self, name: str) -> list[str]:
        """A column as it stands."""
        place = self._place(name)
        return [row[place] for row in self.rows]

    def numbers(self, name: str) -> list[float]:
        """A column of numbers. Raises InputError if a row has none."""
        found = [number(text) for text in self.texts(name)]
        known = [value for value in found if value is not None]
        if len(known) < len(found):
            heading = self.header[self._place(name)]
            raise InputError(f"{self.source}: a row has no number in column {heading!r}")
        return known

    def microseconds(self, name: str) -> list[float]:
        """A column of times, whose heading has the unit, in microseconds."""
        heading = self.header[self._place(name)]
        found = UNIT.search(heading)
        if not found or found[1] not in IN_US:
            units = ", ".join(IN_US)
            raise InputError(f"{self.source}: column {heading!r} has no unit of time ({units})")
        return [time * IN_US[found[1]] for time in self.numbers(name)]

    def _place(self, name: str) -> int:
        for place, heading in enumerate(self.header):
            if UNIT.sub("", heading) == name:
                return place
        raise InputError(f"{self.source}: no column {name!r} among {', '.join(self.header)}")


def tables(text: str, source: str) -> list[Table]:
    """The tables of a text. One ends at a line that has not as many cells as its header."""
    found: list[Table] = []
    for cells in csv.reader(text.splitlines()):
        rows = found[-1].rows if found else None
        if len(cells) < 3:
            found.append(Table(source, (), []))  # what follows is another table
        elif rows is not None and len(cells) == len(found[-1].header):
            rows.append(cells)
        else:
            found.append(Table(source, cells, []))
    return [table for table in found if table.header]


def number(text: str) -> float | None:
    """A number as the tools write it, with or without separated thousands; None for no number."""
    try:
        return None if text.strip() in EMPTY else float(text.replace(",", ""))
    except ValueError:
        return None
