"""How nsys and ncu write numbers, units and absent values, in any version and locale.

Names of units are from real exports of 2022 and public excerpts of later ones; what has another
source says so.
"""

import math
import re
from collections.abc import Callable
from typing import NamedTuple

# nsys prints "" (up to 2022 "None"); ncu "n/a", in text "(!) n/a" and "(!) nan". C prints "-nan"
# and "inf", C on Windows "-nan(ind)". The rest are usual spellings.
ABSENT = re.compile(
    r"(\(!\))?[-+<(\s]*(n/?a|nan(\(\w*\))?|none|null|inf(inity)?|no data)?[)>\s]*", re.IGNORECASE
)
LARGEST = 1e30  # a larger number is none, so that sums stay finite

# nsys prints "ns" and "us"; ncu up to 2022 "usecond" and "Gbyte/second", later "us" and "Gbyte/s".
# The other spellings were seen in none of them.
TIME_UNIT = re.compile(r"([num\u00b5\u03bc]?)(s|secs?|seconds?)")
RATE_UNIT = re.compile(r"([kKMGTP]?i?)(B|[bB]ytes?)/(s|sec|second)")
SCALE = {"n": 1e-9, "u": 1e-6, "\u00b5": 1e-6, "\u03bc": 1e-6, "m": 1e-3, "": 1.0, "k": 1e3}
SCALE |= {"K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
SCALE |= {f"{letter}i": 1024.0**power for power, letter in enumerate("KMGTP", 1)}


class Kind(NamedTuple):
    """What a column holds: by its unit the factor to ours, None for a wrong unit; its limits."""

    factor: Callable[[str], float | None]
    units: str = "any"  # of error messages
    least: float = -math.inf
    most: float = math.inf
    whole: bool = False


def _time(unit: str) -> float | None:
    match = TIME_UNIT.fullmatch(unit)
    return SCALE[match[1]] * 1e6 if match else None


def _rate(unit: str) -> float | None:
    match = RATE_UNIT.fullmatch(unit)
    return SCALE[match[1]] / 1e9 if match and match[1] in SCALE else None


def _percent(unit: str) -> float | None:
    return 1.0 if unit == "%" else None


def _any(unit: str) -> float:
    return 1.0


TIME = Kind(_time, "ns, us, ms or s")  # read as microseconds
DURATION = TIME._replace(least=0.0)
RATE = Kind(_rate, "byte/s, Kbyte/s, Mbyte/s, Gbyte/s or Tbyte/s", least=0.0)  # read as GB/s
PERCENT = Kind(_percent, "%", least=0.0)
PLAIN = Kind(_any, least=0.0)
COUNT = PLAIN._replace(whole=True)


class Notation:
    """One way to write numbers: the decimal mark, and the marks that may separate thousands."""

    def __init__(self, decimal: str, groups: str) -> None:
        grouped = rf"[1-9]\d{{0,2}}([{groups}]\d{{2,3}})*[{groups}]\d{{3}}"  # in India also of two
        self.fits = re.compile(
            rf"[-+]?({grouped}|\d+)([{decimal}]\d*)?(e[-+]?\d+)?", re.ASCII | re.IGNORECASE
        ).fullmatch
        self._plain = {ord(mark): None for mark in groups} | {ord(decimal): "."}

    def value(self, text: str) -> float | None:
        """The number, None for a text in another notation."""
        value = float(text.translate(self._plain)) if self.fits(text) else LARGEST
        return value if abs(value) < LARGEST else None


_SILENT = " \u00a0\u2009\u202f'\u2019"  # spaces (France), apostrophes (Switzerland)
NOTATIONS = [Notation(*marks) for marks in (".,", (".", _SILENT), ",.", (",", _SILENT))]


def absent(text: str) -> bool:
    """Whether a cell says that there is no value."""
    return ABSENT.fullmatch(text) is not None
