"""A debug check of prefix attention's persistent loop: a wrong schedule is an error, not a hang.

    PACORE_CHECK_SCHEDULE=1 python -m ...

Each program then checks, before it works on a tile, that the tile exists, spans as many places as
it has grains, and holds the program's place on the line. A program that finds otherwise writes down
its numbers and leaves the loop; the launcher waits for the kernel, reads them and raises. While a
CUDA graph is captured nothing is read. Off, the default, the check is not compiled.
"""

import os
from contextvars import ContextVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.prefix_attention.records import END, GRAIN_START, HIGH, LOW, NEXT, PIECE, RECORD, ROWS

VARIABLE = "PACORE_CHECK_SCHEDULE"
check_schedule: ContextVar[bool] = ContextVar(
    "check_schedule", default=os.environ.get(VARIABLE) == "1"
)
NUMBERS = tl.constexpr(9)  # that a fault leaves: 1 or 2, and what `raise_fault` unpacks


def faults_of(programs: int, device: torch.device) -> tuple[Tensor] | tuple[()]:
    """What the kernel takes as `faults`: a row of numbers for each program, or nothing."""
    if not check_schedule.get():
        return ()
    return (torch.zeros(programs, NUMBERS.value, dtype=torch.int32, device=device),)


def raise_fault(faults: tuple[Tensor] | tuple[()]) -> None:
    """Raise RuntimeError with the numbers of the first program that found a fault."""
    if not faults or (faults[0].is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    for program, (wrong, *numbers) in enumerate(faults[0].tolist()):
        if wrong == 2:
            at, count, rows, low, high, following, *_ = numbers
            raise RuntimeError(
                f"the schedule of prefix attention is wrong: program {program} was led to piece"
                f" {at} of {count}, which has {rows} rows, tokens {low} to {high}, and names"
                f" {following} as the next one"
            )
        if wrong:
            size, tile, count, place, stop, offset, places, needed = numbers
            raise RuntimeError(
                f"the schedule of prefix attention is wrong: program {program}, at place {place} of"
                f" a stretch that ends at {stop}, was led to tile {tile} of the"
                f" {('larger', 'smaller')[size]} size, which has {count} tiles;"
                f" the tile spans {places} places and needs {needed}, and the place is {offset}"
                " past its first"
            )


@triton.jit
def checked_stop(faults, program, line, place, stop, tile, grain, overhead):
    """`stop`, or if `tile` is not the one that holds `place`, `place`: there the walk ends.

    line: of the tiles of one size starts and records, the size, their number, the places before
        them, and those of one KV head
    """
    starts, tiles, size, count, begin, length = line
    exists = (tile >= 0) & (tile < count)
    live = (place < stop) & exists
    start = tl.load(starts + tile, mask=live, other=0)
    places = tl.load(starts + tile + 1, mask=live, other=0) - start
    first = tl.load(tiles + tile * RECORD + GRAIN_START, mask=live, other=0)
    end = tl.load(tiles + tile * RECORD + END, mask=live, other=0)
    grains = tl.maximum(tl.cdiv(end, grain) - first, 0)
    needed = tl.where(grains > 0, grains + overhead, 0)
    offset = place % tl.maximum(length, 1) - (start - begin)
    # An empty tile has no places and is skipped.
    holds = (offset >= 0) & ((offset < places) | (offset + places == 0))
    wrong = (place < stop) & ~(exists & holds & (places == needed))
    numbers = (1, size, tile, count, place, stop, offset, places, needed)
    for i in tl.static_range(NUMBERS):
        tl.store(faults + program * NUMBERS + i, numbers[i], mask=wrong)
    return tl.where(wrong, place, stop)


@triton.jit
def checked_piece(faults, pieces, at, most_rows):
    """`at`, or if that is no sound piece, -1: there the walk ends.

    Pieces stand in the order in which they are walked, so that a walk that only goes on ends.
    """
    reports, count = faults
    exists = (at >= 0) & (at < count)
    piece = pieces + at.to(tl.int64) * PIECE
    rows = tl.load(piece + ROWS, mask=exists, other=0)
    some = exists & (rows != 0)
    low = tl.load(piece + LOW, mask=some, other=0)
    high = tl.load(piece + HIGH, mask=some, other=1)
    following = tl.load(piece + NEXT, mask=exists, other=-1)
    sound = (rows >= 0) & (rows <= most_rows) & (low >= 0) & (low < high)
    sound = sound & ((following == -1) | (following > at))
    wrong = (at >= 0) & ~(exists & sound)
    numbers = (2, at, count, rows, low, high, following)
    for i in tl.static_range(7):
        tl.store(reports + tl.program_id(0) * NUMBERS + i, numbers[i], mask=wrong)
    return tl.where(wrong, -1, at)
