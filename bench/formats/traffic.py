"""Shapes of a user's traffic: percentiles of the requests of a trace.

A trace is JSON Lines, or CSV with a header. Each request has two numbers of tokens, under one pair
of the names in NAMES; other fields are ignored, but for these:

- `n`, in JSON Lines: the number of completions of the prompt, whose tokens the second number counts
  together, as OpenAI's `usage` does. `usage` may also hold the two numbers.
- `hash_ids` (Mooncake): requests whose lists are equal and not empty have the same prompt, and
  count as rollouts of one problem, whenever they arrive.

pacore_sched/sim/trace.py reads the same files of Azure and Mooncake, for the times of arrival.
"""

import csv
import io
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from pathlib import Path
from typing import Any

from model.errors import InputError, shown
from model.text.files import read_text
from model.text.rows import parse_row

PERCENTILES = (10, 50, 90, 99)
NAMES = (  # of the tokens of a prompt and of what was generated
    ("input_length", "output_length"),  # Mooncake
    ("input_tokens", "output_tokens"),  # other names for these in NVIDIA Dynamo
    ("ContextTokens", "GeneratedTokens"),  # Azure's LLM inference traces
    ("Request tokens", "Response tokens"),  # BurstGPT
    ("prompt_tokens", "completion_tokens"),  # OpenAI's `usage`
)
COLUMNS = {name for pair in NAMES for name in pair}
MAX_BYTES = 2**28  # some 6 million requests
MAX_COUNT = 10**9  # tokens of a request


@dataclass(frozen=True)
class Point:
    """A shape of the traffic: `batch` rollouts that share a prompt of `prefix` tokens, each with
    `suffix` tokens of its own. Also the length of a prefill, `prefix`."""

    percentiles: tuple[float, ...]  # those that have this shape
    batch: int
    prefix: int
    suffix: int

    @property
    def name(self) -> str:
        """The name of a case, such as "p50 B16 P1822 S640"."""
        labels = "/".join(f"p{percentile:g}" for percentile in self.percentiles)
        return f"{labels} B{self.batch} P{self.prefix} S{self.suffix}"


@dataclass(frozen=True)
class Traffic:
    """A trace's number of requests and of different prompts, and its shapes."""

    requests: int
    problems: int
    points: tuple[Point, ...]


def read_traffic(
    path: Path, percentiles: Sequence[float] = PERCENTILES, width: int | None = None
) -> Traffic:
    """The shapes of a trace at `percentiles`, which are above 0 and at most 100.

    Each of the three lengths has its own percentile, the smallest value that at least that many
    percent do not exceed: a prompt's tokens and its number of rollouts over the problems, and the
    tokens of a rollout halfway through its generation over the requests. `width` replaces the
    numbers of rollouts: public traces have one completion per prompt, PaCoRe many. Percentiles with
    the same shape are one point.

    Requests without tokens, as of failed calls, are left out with a warning. Raises InputError for
    a file that cannot be read or has no other requests, and with the line of an invalid one.
    """
    if wrong := [value for value in percentiles if not 0 < value <= 100]:
        raise InputError(f"percentile {shown(wrong[0])}: it must be above 0 and at most 100")
    text = read_text(path, MAX_BYTES)
    if text is None:
        raise InputError(f"trace {path}: no such file")
    problems: Counter[tuple] = Counter()
    suffixes, empty = [], 0
    for number, (prompt, generated, rollouts, blocks) in enumerate(_requests(path, text)):
        if not prompt or generated < rollouts:
            empty += 1
            continue
        problems[prompt, blocks or number] += rollouts
        suffixes.append(ceil(generated / rollouts / 2))
    if not suffixes:
        raise InputError(f"trace {path} has no requests{' with tokens' * bool(empty)}")
    if empty:
        warnings.warn(
            f"trace {path}: requests without input or output tokens are left out: {empty:,}",
            stacklevel=2,
        )
    lengths = sorted(prompt for prompt, _ in problems)
    widths = sorted(problems.values()) if width is None else [width]
    suffixes.sort()
    shapes: dict[tuple[int, int, int], list[float]] = {}
    for percentile in percentiles:
        batch, prefix, suffix = (_at(values, percentile) for values in (widths, lengths, suffixes))
        shapes.setdefault((batch, prefix, suffix), []).append(percentile)
    points = tuple(Point(tuple(labels), *shape) for shape, labels in shapes.items())
    return Traffic(len(suffixes), len(problems), points)


def _at(ascending: Sequence[int], percentile: float) -> int:
    """The smallest of the values that at least `percentile` percent of them do not exceed."""
    rank = ceil(Fraction(str(percentile)) * len(ascending) / 100)
    return ascending[rank - 1]


def _requests(path: Path, text: str) -> Iterator[tuple[int, int, int, tuple[str, ...]]]:
    """Of each request: prompt tokens, generated tokens, rollouts, and the prompt's blocks, if it
    names any."""
    lines = _json_lines if text.lstrip().startswith("{") else _csv_lines
    names: tuple[str, str] | None = None
    for where, row in lines(path, text):
        names = names or next((pair for pair in NAMES if row.keys() >= set(pair)), None)
        if names is None:
            pairs = "; or ".join(" and ".join(pair) for pair in NAMES)
            raise InputError(f"{where}: no numbers of tokens; it must have {pairs}")
        prompt, generated = (_count(where, row, name) for name in names)
        rollouts = 1 if row.get("n") is None else _count(where, row, "n", low=1)
        blocks = row.get("hash_ids") or []
        if not isinstance(blocks, list):
            raise InputError(f"{where}: hash_ids is {shown(blocks)}; it must be a list")
        yield prompt, generated, rollouts, tuple(map(str, blocks))


def _json_lines(path: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(io.StringIO(text), start=1):
        if not line.strip():
            continue
        where = f"trace {path}, line {number}"
        if (row := parse_row(line)) is None:
            raise InputError(f"{where}: not a JSON object")
        usage = row.get("usage")
        yield where, row | usage if isinstance(usage, dict) else row


def _csv_lines(path: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    rows = csv.DictReader(io.StringIO(text))
    try:
        for row in rows:
            # Without columns called `n` or `hash_ids`, which have another meaning in CSV.
            fields = {name: value for name, value in row.items() if name in COLUMNS}
            yield f"trace {path}, line {rows.line_num}", fields
    except csv.Error as error:  # a NUL, or a field of more than 128 KiB
        raise InputError(f"trace {path}, line {rows.line_num + 1}: {error}") from None


def _count(where: str, row: dict[str, Any], name: str, low: int = 0) -> int:
    value = row.get(name)
    try:
        count = int(value)  # type: ignore[arg-type]  # None: a TypeError
        valid = count == float(value) and low <= count <= MAX_COUNT  # type: ignore[arg-type]
    except (ValueError, TypeError, OverflowError):
        valid = False
    if not valid or isinstance(value, bool):
        limits = f"an integer from {low} to {MAX_COUNT:,}"
        raise InputError(f"{where}: {name} is {shown(value)}; it must be {limits}")
    return count
