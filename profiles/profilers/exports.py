"""Reader of the CSV that nsys and ncu print: tables between other text, their units and numbers.

A number is read as the whole export writes numbers: `117.344` is 117,344 in a German locale, and
only other cells tell. An export that does not tell, or writes both ways, is an InputError that says
how to export again. A row that has no number where it needs one is left out, and `Export.warn` says
how many were.
"""

import csv
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from io import StringIO
from pathlib import Path
from typing import NamedTuple

from model.errors import InputError, shown
from profiles.profilers.numbers import NOTATIONS, Kind, Notation, absent

HEADING = re.compile(r"(.*\S)\s*\(([^()]*)\)")  # nsys's "Start (ns)"
OTHER_HEADING = re.compile(r"\((%|[num]?s|[KMG]?B)\)$")  # some heading of every table of nsys


class Row(NamedTuple):
    line: int
    cells: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """One table of an export. `names`, `units` and the cells of a row are equally long."""

    export: "Export"
    names: list[str]
    units: list[str]
    rows: list[Row]
    cut: list[int]  # lines between the rows that have another length

    def has(self, *names: str) -> bool:
        """Whether there are columns with these names, in any unit."""
        return set(names) <= set(self.names)

    def present(self, row: Row, name: str) -> bool:
        """Whether there is a column with this name, and something in it."""
        return self.has(name) and not absent(row.cells[self.column(name)])

    def select(self, wanted: Callable[[Row], bool]) -> "Table":
        """This table with some of its rows."""
        return replace(self, rows=[row for row in self.rows if wanted(row)], cut=[])

    def column(self, name: str) -> int:
        """The index of a column. Raises InputError unless there is exactly one."""
        if self.names.count(name) == 1:
            return self.names.index(name)
        problem = f"two columns {name!r}" if self.has(name) else f"no column {name!r}"
        raise InputError(f"{self.export.source}: {problem}; there are: {', '.join(self.names)}")

    def number(self, row: Row, name: str, kind: Kind) -> float | None:
        """A cell in the kind's unit; None if it is absent, or left out because it is no number.

        Raises InputError if the column's unit is wrong, or the value impossible or ambiguous.
        """
        index = self.column(name)
        text, unit = row.cells[index], self.units[index]
        if absent(text):
            return None
        values = self.export.values(text)
        if not values:
            self.export.leave_out(row.line, f"column {name!r} has {shown(text)}, no number")
            return None
        factor = kind.factor(unit)
        where = f"{self.export.source}, line {row.line}, column {name!r}"
        if factor is None:
            raise InputError(f"{where}: the unit is {shown(unit)}; it must be {kind.units}")
        if len(values) > 1:
            either = " or ".join(f"{value:,}" for value in sorted(values))
            raise InputError(
                f"{where}: {shown(text)} may be {either}, and no other number of the export tells"
                f" which; {self.export.again}"
            )
        value = values.pop() * factor
        if not kind.least <= value <= kind.most or (kind.whole and value % 1):
            text = f"{where}: {shown(text)} is impossible here; if its marks are another locale's"
            raise InputError(f"{text}, {self.export.again}")
        return value

    def read(self, text: str, **columns: Kind) -> Iterator[tuple]:
        """Column `text` and columns of numbers (`_` for a space), of the rows that have them all.

        Raises InputError as `number` does, and if there are rows but none can be read.
        """
        texts, names = self.column(text), [key.replace("_", " ") for key in columns]
        found = False
        for row in self.rows:
            pairs = zip(names, columns.values(), strict=True)
            numbers = [self.number(row, name, kind) for name, kind in pairs]
            if None in numbers:
                name = names[numbers.index(None)]
                self.export.leave_out(row.line, f"column {name!r} has no number")
            else:
                found = True
                yield row.cells[texts], *numbers
        if not found and (self.rows or self.cut):
            raise InputError(
                f"{self.export.source}: no row can be read; {self.export.first_left_out}"
            )


@dataclass
class Export:
    """The tables of a text that are of the given kinds, in order, by kind.

    kinds: the names of columns that only the headers of a kind have
    again: what to do if numbers cannot be read
    units_below: the units are in the row below the header (ncu), not in it (nsys)
    identity: the column without which equal rows are different things
    c_locale: the tool ran with LC_ALL=C, so that the notation of its numbers is known
    """

    text: str
    source: str
    kinds: Mapping[str, Sequence[str]]
    again: str
    units_below: bool = False
    identity: str = ""
    c_locale: bool = False
    tables: dict[str, list[Table]] = field(init=False)
    left_out: dict[int, str] = field(init=False, default_factory=dict)  # by line, the reason
    repeated: int = field(init=False, default=0)
    open: bool = field(init=False, default=False)  # the last row may be cut in its last cell
    _notations: list[Notation] = field(init=False)

    def __post_init__(self) -> None:
        self.tables = {kind: [] for kind in self.kinds}
        self._notations = NOTATIONS[:1] if self.c_locale else NOTATIONS
        self._parse()
        self._drop_repeated()
        self._learn()

    @property
    def first_left_out(self) -> str:
        line = min(self.left_out)
        return f"line {line}: {self.left_out[line]}"

    def leave_out(self, line: int, reason: str) -> None:
        """Note that a row, or a figure of it, is left out."""
        self.left_out.setdefault(line, reason)

    def warn(self) -> None:
        """Warn of what was left out."""
        if self.left_out:
            text = f"{self.source}: rows left out, in whole or in part: {len(self.left_out)};"
            warnings.warn(f"{text} {self.first_left_out}", stacklevel=2)
        if self.open:
            text = f"{self.source} ends without a line break: its last row may be cut"
            warnings.warn(text, stacklevel=2)
        if self.repeated:
            text = f"{self.source}: repeated rows, which count once: {self.repeated}"
            warnings.warn(text, stacklevel=2)

    def values(self, text: str) -> set[float]:
        """The numbers that a text may be, as the export writes numbers."""
        found = (notation.value(text) for notation in self._notations)
        return {value for value in found if value is not None}

    def _parse(self) -> None:
        lines = list(StringIO(self.text, newline=None))  # at \r, \n or both, and at nothing else
        cut = 0 if self.text.endswith(("\n", "\r")) else len(lines)  # the line that may be cut
        table: Table | None = None
        other = 0  # the length of a header of another kind, whose rows may follow
        for number, line in enumerate(lines, 1):
            cells = _cells(line)
            if headed := self._headed(line, cells):
                table, other = headed, 0
            elif table is None or line.startswith("=="):  # ncu's messages
                continue
            elif not table.units:
                is_units = len(cells) == len(table.names) and not _numeric(cells)
                table.units.extend(cells if is_units else [])
            elif not _numeric(cells) and any(OTHER_HEADING.search(cell) for cell in cells):
                other = len(cells)
            elif len(cells) == len(table.names) != other and _closed(line):
                table.rows.append(Row(number, tuple(cells)))
                other = 0
                self.open = number == cut and not line.endswith('"')
            elif not other and (number == cut or len(cells) > 2 or _numeric(cells[:1])):
                text = f"{len(cells)} cells, where the header has {len(table.names)}: is it cut?"
                self.leave_out(number, text)
                table.cut.append(number)

    def _headed(self, line: str, cells: list[str]) -> Table | None:
        """A new table if a line is the header of one."""
        if not any(all(name in line for name in only) for only in self.kinds.values()):
            return None  # most lines, quickly
        matches = [None if self.units_below else HEADING.fullmatch(cell) for cell in cells]
        names = [match[1] if match else cell for match, cell in zip(matches, cells, strict=True)]
        units = [match[2].strip() if match else "" for match in matches]
        for kind, only in self.kinds.items():
            if set(only) <= set(names):
                table = Table(self, names, [] if self.units_below else units, [], [])
                self.tables[kind].append(table)
                return table
        return None

    def _drop_repeated(self) -> None:
        """Drop rows that repeat others entirely, and tables left empty: exports appended twice."""
        seen: dict[tuple, set] = defaultdict(set)
        for tables in self.tables.values():
            for table in list(tables):
                if self.identity and not table.has(self.identity):
                    continue
                known = seen[tuple(table.names)]
                new = [row for row in table.rows if _added(row.cells, known)]
                self.repeated += len(table.rows) - len(new)
                if table.rows and not new:
                    tables.remove(table)
                table.rows[:] = new

    def _learn(self) -> None:
        """Find the notations in which every cell of a column with a unit is a number.

        Columns without a unit can hold texts that look like numbers of another locale, such as
        ncu's compute capability, or its list of enabled TPCs ("0,1").
        """
        seen: set[str] = set()
        decisive = ""
        for table in (table for tables in self.tables.values() for table in tables):
            measured = [index for index, unit in enumerate(table.units) if unit]
            for row, index in ((row, index) for row in table.rows for index in measured):
                text = row.cells[index]
                if text.isdigit() or not _added(text, seen):
                    continue
                fitting = [notation for notation in self._notations if notation.fits(text)]
                if fitting and len(fitting) < len(self._notations):
                    self._notations, decisive = fitting, text
                elif not fitting and _numeric([text]):
                    raise InputError(
                        f"{self.source}, line {row.line}, column {table.names[index]!r}:"
                        f" {shown(text)} and {shown(decisive)} are numbers of different locales;"
                        f" {self.again}"
                    )


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, or in UTF-16, in which PowerShell redirects output.

    Raises InputError if it cannot be read.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    wide = content.startswith((b"\xff\xfe", b"\xfe\xff"))
    return content.decode("utf-16" if wide else "utf-8", errors="replace").removeprefix("\ufeff")


def _cells(line: str) -> list[str]:
    try:
        return [cell.strip() for cell in next(csv.reader([line.lstrip("\ufeff")]), [])]
    except csv.Error:  # a cell of more than 128 KiB
        return [""] * 3  # no row, and no message


def _closed(line: str) -> bool:
    """Whether no quoted cell is cut."""
    return line.count('"') % 2 == 0


def _numeric(cells: Sequence[str]) -> bool:
    """Whether some cell is a number, which no cell of a header is."""
    return any(notation.fits(cell) for cell in cells for notation in NOTATIONS)


def _added(item: Hashable, seen: set) -> bool:
    """Add an item to a set; whether it is new there."""
    known = item in seen
    seen.add(item)
    return not known
