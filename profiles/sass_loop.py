"""The loop that a kernel spends its time in, as its SASS shows it, and what to look at there.

A branch back to an earlier label closes a loop. The hottest cannot be known from text: taken is,
of the loops without a loop inside, the one with most wgmma, else mma, else bytes loaded. Loops that
the compiler unrolled are straight lines.
"""

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from profiles.sass import BULK_SHARE, WIDE, count_mix

INSTRUCTION = re.compile(
    r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@\S+\s+)?([A-Z][\w.]*)[^;]*?(?:`\((\.L\w+)\))?\s*;", re.MULTILINE
)
LABEL = re.compile(r"^(\.L\w+):", re.MULTILINE)
PRODUCTS = ("wgmma", "mma")
BYTES = {"load 16": 16, "copy 16": 16, "load 8": 8, "copy 8": 8, "load 4": 4, "copy 4": 4}
BYTES |= {"load 1, 2": 2}  # that a thread loads by an instruction of a class; TMA's are its own


@dataclass(frozen=True)
class Anatomy:
    """What a kernel's text holds, by the classes of `profiles.sass.MIX`."""

    instructions: int
    mix: dict[str, int]
    loop: dict[str, int] | None  # of the hottest loop; None without one

    @property
    def look_at(self) -> str:
        """The first thing that a reader of the SASS should look at."""
        where, mix = ("the loop", self.loop) if self.loop else ("straight text", self.mix)
        loads, products = _loads(mix), sum(mix.get(name, 0) for name in PRODUCTS)
        narrow = sum(BYTES[name] * count for name, count in loads.items() if BYTES[name] < WIDE)
        size = sum(mix.values())
        if self.mix.get("spill"):
            return f"{mix.get('spill', 0)} of {self.mix['spill']} spills are in {where}"
        if narrow > BULK_SHARE * _bytes(mix):
            found = ", ".join(f"{count} {name}" for name, count in loads.items())
            return f"narrow loads in {where}: {found}"
        if products:
            rest = f"{(size - products) / products:.0f} other instructions per product in {where}"
            return f"{rest}, {mix.get('MUFU', 0)} MUFU, {mix.get('barrier', 0)} barriers"
        return f"{sum(loads.values())} loads among {size} instructions of {where}: all in flight?"


def anatomy(sass: str) -> Anatomy:
    """Of one kernel's SASS, as `nvdisasm -c` prints it."""
    found = list(INSTRUCTION.finditer(sass))
    names = [match[1] for match in found]
    loops = _loops(sass, found)
    inner = [loop for loop in loops if not any(_inside(other, loop) for other in loops)]
    mixes = [count_mix(names[first : last + 1]) for first, last in inner]
    hottest = max(mixes, key=_heat, default=None)
    return Anatomy(len(names), count_mix(names), hottest)


def _loops(sass: str, instructions: Sequence[re.Match]) -> set[tuple[int, int]]:
    """First and last instruction of every loop; the trap behind a kernel's end is none."""
    starts = [match.start() for match in instructions]
    labels = {label[1]: bisect_left(starts, label.start()) for label in LABEL.finditer(sass)}
    branches = [
        (labels[match[2]], at)
        for at, match in enumerate(instructions)
        if match[1].startswith("BRA") and match[2] in labels
    ]
    return {(first, last) for first, last in branches if first < last}


def _inside(inner: tuple[int, int], outer: tuple[int, int]) -> bool:
    return inner != outer and outer[0] <= inner[0] and inner[1] <= outer[1]


def _heat(mix: dict[str, int]) -> tuple[int, ...]:
    return (*(mix.get(name, 0) for name in PRODUCTS), _bytes(mix))


def _loads(mix: dict[str, int]) -> dict[str, int]:
    return {name: count for name, count in mix.items() if name in BYTES}


def _bytes(mix: dict[str, int]) -> int:
    return sum(BYTES[name] * count for name, count in _loads(mix).items())
