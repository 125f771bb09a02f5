"""Members of foreign JSON, checked as they are read, and what all formats do with rows."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from bench.rows.schema import invalid_field, is_number
from model.errors import InputError, shown

T = TypeVar("T")
UNKNOWN = "unknown"  # a text that a row or format requires and its source does not tell
TYPES: dict[type, str] = {dict: "an object", list: "a list", str: "a text"}
NOT_FINITE = ("NaN", "Infinity", "-Infinity")  # as pydantic writes them in texts


@dataclass
class Written:
    """How many rows were written; `left_out` counts those that the format has no place for."""

    rows: int = 0
    left_out: Counter[str] = field(default_factory=Counter)


def member(parent: dict[str, Any], name: str, kind: type[T], where: str) -> T:
    """`parent[name]`. Raises InputError if it is missing or not of type `kind`, a key of TYPES."""
    if name not in parent:
        raise InputError(f"{where}: no {name}; it must be {TYPES[kind]}")
    return of_type(parent[name], name, kind, where)


def of_type(value: object, name: str, kind: type[T], where: str) -> T:
    """`value`. Raises InputError if it is not of type `kind`, a key of TYPES."""
    if not isinstance(value, kind):
        raise InputError(f"{where}: {name} is {shown(value)}; it must be {TYPES[kind]}")
    return value


def number(value: object, name: str, where: str) -> float | None:
    """A number, None if it is missing, not finite, or too large for a row.

    Raises InputError for anything else, and for negative numbers.
    """
    if value is None or value in NOT_FINITE or value != value:  # NaN
        return None
    if not isinstance(value, int | float) or isinstance(value, bool) or value < 0:
        raise InputError(f"{where}: {name} is {shown(value)}; it must be a number, at least 0")
    return value if is_number(value) else None


def valid_row(row: dict[str, Any], where: str) -> dict[str, Any]:
    """`row`. Raises InputError if it has no op, or a field of an invalid value."""
    if problem := invalid_field(row) or ("" if row.get("op") else "op is missing"):
        raise InputError(f"{where}: {problem}")
    return row


def complete(rows: Iterable[dict[str, Any]], left_out: Counter[str]) -> list[dict[str, Any]]:
    """The rows that measured something: those with op, case, impl, dtype, and a time or failure.

    The others are counted in `left_out`.
    """
    kept = []
    for row in rows:
        missing = [name for name in ("op", "case", "impl", "dtype") if not row.get(name)]
        if row.get("skipped"):
            left_out["skipped"] += 1
        elif missing:
            left_out[f"without {' and '.join(missing)}"] += 1
        elif not row.get("median_us") and not row.get("failure"):
            left_out["without a time or a failure"] += 1
        else:
            kept.append(row)
    return kept


def case_of(row: dict[str, Any]) -> str:
    """The case of a complete row, with the policy or part of a whole run that it is about."""
    return ", ".join(str(row[name]) for name in ("case", "policy", "part") if row.get(name))


def check_new(path: Path) -> None:
    """Raise InputError unless `path` does not exist, or is an empty folder."""
    if path.is_dir() and not path.is_symlink():
        try:
            empty = not any(path.iterdir())
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}") from None
        if empty:
            return
    if path.exists() or path.is_symlink():
        raise InputError(f"{path} exists: choose another path for --out")
