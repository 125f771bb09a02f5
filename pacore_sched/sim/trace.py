"""Readers of public request traces, whose requests become problems for the simulator.

Azure LLM inference trace: CSV with TIMESTAMP, ContextTokens, GeneratedTokens. Mooncake trace:
JSONL with timestamp (milliseconds), input_length, output_length and hash_ids (one per block of 512
prompt tokens; the simulator does not share common prefixes of requests).
Times are relative to a trace's first request.
"""

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from math import isfinite
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from model.errors import InputError
from pacore_sched.answers.rounds import round_widths
from pacore_sched.sim.workload import MAX_TOKENS, SimProblem

T = TypeVar("T")
AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


@dataclass(frozen=True)
class Request:
    """One line of a trace."""

    arrival_s: float
    input_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...] = ()


def read_trace(path: str | Path) -> list[Request]:
    """The requests of a `.csv` (Azure) or `.jsonl` (Mooncake) file, in order of arrival.

    Raises InputError with the file and line of an invalid entry.
    """
    path = Path(path)
    readers = {".csv": _azure, ".jsonl": _mooncake}
    if path.suffix not in readers:
        raise InputError(f"trace {path}: the file name must end with {' or '.join(readers)}")
    try:
        with path.open(encoding="utf-8", newline="") as file:
            requests = list(readers[path.suffix](path, file))
    except OSError as error:
        raise InputError(f"trace {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"trace {path}: not UTF-8 text") from None
    if not requests:
        raise InputError(f"trace {path} has no requests")
    first = min(request.arrival_s for request in requests)
    shifted = [
        Request(r.arrival_s - first, r.input_tokens, r.output_tokens, r.hash_ids) for r in requests
    ]
    return sorted(shifted, key=lambda request: request.arrival_s)


def trace_problems(
    requests: Sequence[Request],
    widths: Sequence[int] = (),
    sigma_w: float = 0.0,
    seed: int = 0,
    max_tokens: int = MAX_TOKENS,
) -> list[SimProblem]:
    """Every request as a problem with one rollout, or with the rounds of `widths`.

    A rollout's length is the request's output length times exp(N(-sigma_w^2 / 2, sigma_w)), at most
    `max_tokens`.
    """
    problems = []
    for number, request in enumerate(requests):
        rng = np.random.default_rng([seed, number])
        lengths = []
        for width in round_widths(widths):
            noise = np.exp(rng.normal(-(sigma_w**2) / 2, sigma_w, width))
            round_lengths = np.clip(np.rint(request.output_tokens * noise), 1, max_tokens)
            lengths.append(tuple(round_lengths.astype(int).tolist()))
        problems.append(SimProblem(request.arrival_s, 0, request.input_tokens, tuple(lengths)))
    return problems


def _azure(path: Path, lines: Iterator[str]) -> Iterator[Request]:
    rows = csv.DictReader(lines)
    missing = [name for name in AZURE_COLUMNS if name not in (rows.fieldnames or ())]
    if missing:
        raise InputError(
            f"trace {path}, line 1: no column {', '.join(missing)};"
            f" the columns must include {', '.join(AZURE_COLUMNS)}"
        )
    for row in rows:
        where = f"trace {path}, line {rows.line_num}"
        time = _field(where, row, "TIMESTAMP", _seconds)
        inputs, outputs = (_field(where, row, name, _positive) for name in AZURE_COLUMNS[1:])
        yield Request(time, inputs, outputs)


def _mooncake(path: Path, lines: Iterator[str]) -> Iterator[Request]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"trace {path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if not isinstance(row, dict):
            raise InputError(f"{where}: not a JSON object")
        yield Request(
            _field(where, row, "timestamp", _finite) / 1e3,
            _field(where, row, "input_length", _positive),
            _field(where, row, "output_length", _positive),
            _field(where, row, "hash_ids", tuple) if "hash_ids" in row else (),
        )


def _field(where: str, row: dict[str, Any], name: str, convert: Callable[[Any], T]) -> T:
    """A row's field, converted. `convert` raises ValueError or TypeError for an invalid value."""
    if row.get(name) is None:
        raise InputError(f"{where}: no {name}; it must be {_VALID[convert]}")
    try:
        return convert(row[name])
    except (ValueError, TypeError):
        message = f"{where}: {name} is {row[name]!r}; it must be {_VALID[convert]}"
        raise InputError(message) from None


def _positive(value: str | float) -> int:
    """A positive integer. Raises ValueError or TypeError for anything else."""
    number = int(value)
    if number != float(value) or number < 1:
        raise ValueError(value)
    return number


def _finite(value: str | float) -> float:
    number = float(value)
    if not isfinite(number):
        raise ValueError(value)
    return number


def _seconds(text: str) -> float:
    """Seconds since 1970 of an ISO time, which is in UTC if it has no time zone."""
    time = datetime.fromisoformat(text)
    return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()


# What each conversion of `_field` accepts.
_VALID: dict[Callable[[Any], Any], str] = {
    _seconds: "an ISO time",
    _positive: "a positive integer",
    _finite: "a finite number",
    tuple: "a list",
}
