"""The hot loops of a kernel's SASS: instructions by class, and what to look at first.

A branch back to an earlier label closes a loop. (Barrier waits spin after the kernel's end and
branch back from there; those are not loops.) Code does not show which loops are hot, so we take the
innermost loops with matrix products, or else the loop that loads most. The hottest has the most
wgmma, then mma, then bytes. Loops that the compiler unrolled are straight-line code.
"""

import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from profiles.static.sass import BULK_SHARE, MIX, WIDE, count_mix

# Instruction name (for a wgmma wait, with its operands) and branch target.
INSTRUCTION = re.compile(
    r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@\S+\s+)?"
    r"([A-Z][\w.]*(?: gsb0, \w+)?)[^;]*?(?:`\((\.L\w+)\))?\s*;",
    re.MULTILINE,
)
LABEL = re.compile(r"^(\.L\w+):", re.MULTILINE)
PRODUCTS = ("wgmma", "mma")
PRODUCT = re.compile("|".join(MIX[name] for name in PRODUCTS))
BYTES = {"load 16": 16, "copy 16": 16, "load 8": 8, "copy 8": 8, "load 4": 4, "copy 4": 4}
BYTES |= {"load 1, 2": 2}  # per thread and instruction of a class; without TMA
Span = tuple[int, int]  # first and last line or instruction


@dataclass(frozen=True)
class SassSummary:
    """A kernel's instructions, by the classes of `profiles.static.sass.MIX`."""

    instructions: int
    mix: dict[str, int]
    loops: list[dict[str, int]]  # the hot loops, in the order of the code

    @property
    def loop(self) -> dict[str, int] | None:
        """The hottest loop; None without loops."""
        return max(self.loops, key=_heat, default=None)

    @property
    def look_at(self) -> str:
        """The first thing to look at in the SASS."""
        where, mix = ("the loop", self.loop) if self.loop else ("straight-line code", self.mix)
        loads, products = _loads(mix), sum(mix.get(name, 0) for name in PRODUCTS)
        narrow = sum(BYTES[name] * count for name, count in loads.items() if BYTES[name] < WIDE)
        size = sum(mix.values())
        if self.mix.get("spill"):
            return f"{mix.get('spill', 0)} of {self.mix['spill']} spills are in {where}"
        if narrow > BULK_SHARE * _bytes(mix):
            text = ", ".join(f"{count} {name}" for name, count in loads.items())
            return f"narrow loads in {where}: {text}"
        if products:
            others = f"{(size - products) / products:.0f} other instructions per product in {where}"
            return f"{others}, {mix.get('MUFU', 0)} MUFU, {mix.get('barrier', 0)} barriers"
        return f"{sum(loads.values())} loads among {size} instructions of {where}: all in flight?"


def summarise_sass(sass: str) -> SassSummary:
    """The summary of one kernel's SASS, as `nvdisasm -c` prints it."""
    matches = list(INSTRUCTION.finditer(sass))
    names = [match[1] for match in matches]
    products = [index for index, name in enumerate(names) if PRODUCT.match(name)]

    def mix(loop: Span) -> dict[str, int]:
        return count_mix(names[loop[0] : loop[1] + 1])

    hot = hot_loops(_loops(sass, matches), products, lambda loop: _bytes(mix(loop)))
    return SassSummary(len(names), count_mix(names), [mix(loop) for loop in hot])


def hot_loops(
    loops: Sequence[Span], products: Sequence[int], loaded: Callable[[Span], int]
) -> list[Span]:
    """The innermost of `loops` that contain `products` (lines), in the order of the code.

    If no loop contains one: the innermost loop with the most bytes `loaded` (the first, if equal).
    """
    with_products = [loop for loop in loops if any(loop[0] <= line <= loop[1] for line in products)]
    candidates = with_products or loops
    inner = sorted(
        loop for loop in candidates if not any(_inside(other, loop) for other in candidates)
    )
    return inner if with_products else sorted(inner, key=loaded, reverse=True)[:1]


def _loops(sass: str, instructions: Sequence[re.Match]) -> list[Span]:
    """First and last instruction of every loop, without the trap after a kernel's end."""
    starts = [match.start() for match in instructions]
    labels = {label[1]: bisect_left(starts, label.start()) for label in LABEL.finditer(sass)}
    back = {
        at: labels[match[2]]
        for at, match in enumerate(instructions)
        if match[1].startswith("BRA") and labels.get(match[2], at) < at
    }

    def follows_barrier_wait(at: int) -> bool:
        """Whether the loop right before the branch is a barrier's wait."""
        names = (match[1] for match in instructions[back.get(at - 1, at) : at])
        return any(name.startswith("SYNCS") for name in names)

    return sorted((first, at) for at, first in back.items() if not follows_barrier_wait(at))


def _inside(inner: Span, outer: Span) -> bool:
    return inner != outer and outer[0] <= inner[0] and inner[1] <= outer[1]


def _heat(mix: dict[str, int]) -> tuple[int, ...]:
    return (*(mix.get(name, 0) for name in PRODUCTS), _bytes(mix))


def _loads(mix: dict[str, int]) -> dict[str, int]:
    return {name: count for name, count in mix.items() if name in BYTES}


def _bytes(mix: dict[str, int]) -> int:
    return sum(BYTES[name] * count for name, count in _loads(mix).items())
