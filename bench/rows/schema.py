"""The fields of rows, and the version of their meaning.

A row is a JSON object. `Measured` and `Origin` are what every row of a timed or judged form has;
`Sometimes` are fields that some kinds of rows have. Rows may have further fields, and rows of older
commits may lack any.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Annotated, get_args

from model.errors import shown

SCHEMA = 1  # incremented whenever a field changes its meaning; new fields leave it as it is

Microseconds = Annotated[float, "microseconds"]
Number = Annotated[float, "at least 0"]
OPTIONAL = ("shape", "mfu", "mbu", "peak_fraction", "sm_mhz")  # only in rows that have a value


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where and when a row was measured."""

    device: str
    commit: str
    torch: str
    triton: str | None
    driver: str | None
    time: str  # UTC, ISO 8601
    schema: int = SCHEMA


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One form of an op, of a step or of a whole run.

    shape: the case's sizes by name; None in kinds of rows that have none
    roofline_pct: the floor by the measured rates, as a percentage of the median
    mfu, mbu: achieved FLOP/s and bytes/s as fractions of the data sheet's; None for a device
        without one here
    peak_fraction: the larger of both: the floor by the data sheet over the median
    max_err, rms_err: relative to max(rms(reference), |reference|)
    speedup: over the form "eager" of the same run
    failure: what is wrong with the results, or why there are no times; None if nothing is
    timer: "graph", "events" or "clock"
    copy_gb_s, gemm_tflop_s: the measured ceilings, copies and matrix products
    sm_mhz: the lowest and highest clock of a GPU's SMs while it was timed
    """

    op: str
    case: str
    impl: str
    dtype: str
    shape: Mapping[str, object] | None = None
    p20_us: Microseconds | None = None
    median_us: Microseconds | None = None
    p80_us: Microseconds | None = None
    bytes: Number = 0
    flops: Number = 0
    roofline_pct: Number | None = None
    mfu: Number | None = None
    mbu: Number | None = None
    peak_fraction: Number | None = None
    max_err: Number | None = None
    rms_err: Number | None = None
    speedup: Number | None = None
    failure: str | None = None
    timer: str | None = None
    repeats: int | None = None
    copy_gb_s: Number | None = None
    gemm_tflop_s: Number | None = None
    sm_mhz: tuple[int, int] | None = None

    def row(self, origin: dict) -> dict:
        """The row, its origin included; without the fields in OPTIONAL that are None."""
        row = asdict(self) | origin
        for name in OPTIONAL:
            if row[name] is None:
                del row[name]
        return row


@dataclass(frozen=True, kw_only=True)
class Sometimes:
    """Fields of some kinds of rows."""

    policy: str | None = None  # of the scheduler
    part: str | None = None  # of a decode step, or of an op's kernel configs
    skipped: str | None = None  # why a form was not measured
    version: str | None = None  # of a peer's library
    section: str | None = None  # of `profiles record`
    pair: str | None = None  # a switch and its value
    settings: str | None = None  # of a model peer
    tokens_per_second: Number | None = None


def _names(kind: object) -> tuple[str, ...]:
    """The fields of this type, or of this type or None."""
    everything = (field for row in (Measured, Sometimes, Origin) for field in fields(row))
    return tuple(f.name for f in everything if kind == f.type or kind in get_args(f.type))


TEXTS, TIMES, NUMBERS = _names(str), _names(Microseconds), _names(Number)


def invalid_field(row: Mapping[str, object]) -> str | None:
    """What is wrong with the first field of an invalid value; None if all are valid. Any field may
    be missing or None."""
    for names, valid, kind in (
        (TEXTS, lambda value: isinstance(value, str), "a text"),
        (TIMES, lambda value: is_number(value) and 1e-6 <= value <= 1e15, "from 1e-6 to 1e15"),
        (NUMBERS, is_number, "a number, at least 0"),
        (("shape",), lambda value: isinstance(value, dict), "an object"),
    ):
        for name in names:
            value = row.get(name)
            if value is not None and not valid(value):
                return f"{name} is {shown(value)}; it must be {kind}"
    return None


def is_number(value: object) -> bool:
    """Whether the value is a number from 0 to 1e30, beyond which floats overflow; not NaN."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return 0 <= value < 1e30
