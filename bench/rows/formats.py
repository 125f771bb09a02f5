"""Formats of values, and the fields and columns that several kinds of rows share."""

from collections.abc import Callable, Mapping

from bench.rows.columns import Column, Field, Format, Row
from bench.rows.schema import is_number


def numbers(write: Callable[[float], str]) -> Format:
    """The format that writes numbers with `write`, and other values as they are: rows of reports
    may come from anywhere."""

    def text(value: object) -> str:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return str(value)
        return write(value) if is_number(abs(value)) else str(value)

    return text


def number(spec: str, per: float = 1, unit: str = "") -> Format:
    """Numbers in units of `per` by a format specification, such as ",.1f"."""
    return numbers(lambda value: f"{value / per:{spec}}{unit}")


def percent(spec: str, unit: str = " %") -> Format:
    """Shares as percentages: 0.125 by ".1f" is "12.5 %"."""
    return numbers(lambda value: f"{100 * value:{spec}}{unit}")


microseconds = numbers(lambda value: f"{value:,.0f}" if value >= 1000 else f"{value:.1f}")
seconds = numbers(lambda us: f"{us / 1e6:.2f}" if us >= 1e6 else f"{us / 1e6:.3g}")
error = number(".1e")
whole = number(",.0f")
megabytes = number(",.2f", per=1e6)


def yes_no(value: object) -> str:
    return "yes" if value else "no"


def config_text(config: Mapping[str, object]) -> str:
    """A kernel config as text, such as "block=1024 num_warps=4"."""
    return " ".join(f"{name}={value}" for name, value in config.items())


def spread(write: Format = microseconds) -> Field:
    """The field "p20..p80": the percentiles of a time."""

    def text(row: Row) -> str | None:
        low, high = row.get("p20_us"), row.get("p80_us")
        return None if low is None or high is None else f"{write(low)}..{write(high)}"

    return text


def rate(name: str, per: float) -> Field:
    """The field `name` over the median time: bytes per 1e3 are GB/s, FLOPs per 1e6 TFLOP/s."""

    def value(row: Row) -> float | None:
        amount, us = row.get(name), row.get("median_us")
        return None if amount is None or us is None else amount / us / per

    return value


def verdict(passed: Callable[[Row], str | None] = lambda row: None) -> Field:
    """The field that says why a row failed; `passed` is the text of a row that did not."""

    def text(row: Row) -> str | None:
        return f"FAILED: {row['failure']}" if row.get("failure") else passed(row)

    return text


MEASURED = " ({device}, torch {torch}, commit {commit})"  # of titles: where the rows come from

OP, CASE, IMPL, DTYPE = (Column(name, name) for name in ("op", "case", "impl", "dtype"))
FORM = Column("form", "impl")
POLICY = Column("policy", "impl")
ROOFLINE = Column(" % roofline", "roofline_pct", number(".1f"))
SPEEDUP = Column(" x eager", "speedup", number(".2f"))
ERROR = Column(" max error", "max_err", error)
FAILURE = Column("", verdict(), optional=True)
