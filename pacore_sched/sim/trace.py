"""Readers of public request traces, whose requests become problems for the simulator.

Azure LLM inference trace: CSV with TIMESTAMP, ContextTokens, GeneratedTokens. Mooncake trace:
JSONL with timestamp (milliseconds), input_length, output_length and hash_ids (one per block of 512
prompt tokens; the simulator does not share common prefixes of requests).
Times are relative to a trace's first request.
"""

import csv
import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from model.errors import InputError, shown
from model.text.files import parse_json, read_text
from pacore_sched.answers.rounds import round_widths
from pacore_sched.sim.workload import MAX_TOKENS, SimProblem

T = TypeVar("T")
MAX_TRACE_BYTES = 2**28  # some 6 million requests, which take 2 GB
MAX_COUNT = 10**9  # tokens of a request
MAX_MS = 1e15  # of a time stamp: those since 1970 are below 2e12 until 2033
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

    Requests without input or output tokens, which real traces have, are left out with one warning.
    Raises InputError for a file that cannot be read, has more than MAX_TRACE_BYTES or no request
    with tokens, and with the line of an invalid entry.
    """
    path = Path(path)
    readers = {".csv": _azure, ".jsonl": _mooncake}
    if path.suffix not in readers:
        raise InputError(f"trace {path}: the file name must end with {' or '.join(readers)}")
    text = read_text(path, MAX_TRACE_BYTES)
    if text is None:
        raise InputError(f"trace {path}: No such file")
    requests, empty = [], 0
    for request in readers[path.suffix](path, io.StringIO(text)):
        if request.input_tokens and request.output_tokens:
            requests.append(request)
        else:
            empty += 1
    if not requests:
        raise InputError(f"trace {path} has no requests{' with tokens' * bool(empty)}")
    if empty:
        warnings.warn(
            f"trace {path}: requests without input or output tokens are left out: {empty:,}",
            stacklevel=2,
        )
    first = min(request.arrival_s for request in requests)
    shifted = [replace(request, arrival_s=request.arrival_s - first) for request in requests]
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
    try:
        names = list(rows.fieldnames or ())
        if any(names.count(name) != 1 for name in AZURE_COLUMNS):
            raise InputError(
                f"trace {path}, line 1: the columns are {', '.join(names)};"
                f" they must include {', '.join(AZURE_COLUMNS)}, each once"
            )
        for row in rows:
            where = f"trace {path}, line {rows.line_num}"
            time = _field(where, row, "TIMESTAMP", _seconds)
            inputs, outputs = (_field(where, row, name, _tokens) for name in AZURE_COLUMNS[1:])
            yield Request(time, inputs, outputs)
    except csv.Error as error:  # a NUL, or a field of more than 128 KiB
        raise InputError(f"trace {path}, line {rows.line_num + 1}: {error}") from None


def _mooncake(path: Path, lines: Iterator[str]) -> Iterator[Request]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"trace {path}, line {number}"
        try:
            row = parse_json(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise InputError(f"{where}: not a JSON object")
        yield Request(
            _field(where, row, "timestamp", _milliseconds) / 1e3,
            _field(where, row, "input_length", _tokens),
            _field(where, row, "output_length", _tokens),
            _field(where, row, "hash_ids", tuple) if "hash_ids" in row else (),
        )


def _field(where: str, row: dict[str, Any], name: str, convert: Callable[[Any], T]) -> T:
    """A row's field, converted; `convert` is a key of _VALID. Raises InputError if it is missing or
    invalid."""
    if row.get(name) is None:
        raise InputError(f"{where}: no {name}; it must be {_VALID[convert]}")
    try:
        return convert(row[name])
    except (ValueError, TypeError, OverflowError):
        message = f"{where}: {name} is {shown(row[name])}; it must be {_VALID[convert]}"
        raise InputError(message) from None


def _tokens(value: str | float) -> int:
    """A number of tokens. Raises ValueError, TypeError or OverflowError for anything else."""
    number = int(value)
    if number != float(value) or not 0 <= number <= MAX_COUNT:
        raise ValueError(value)
    return number


def _milliseconds(value: str | float) -> float:
    number = float(value)
    if not abs(number) <= MAX_MS:  # also for NaN
        raise ValueError(value)
    return number


def _seconds(text: str) -> float:
    """Seconds since 1970 of an ISO time, which is in UTC if it has no time zone."""
    time = datetime.fromisoformat(text)
    return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()


# What each conversion of `_field` accepts.
_VALID: dict[Callable[[Any], Any], str] = {
    _seconds: "an ISO time",
    _tokens: f"an integer from 0 to {MAX_COUNT:,}",
    _milliseconds: f"a number from {-MAX_MS:g} to {MAX_MS:g}",
    tuple: "a list",
}
