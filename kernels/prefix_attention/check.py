"""A debug check of prefix attention's persistent loop: a wrong schedule is an error, not a hang.

    PACORE_CHECK_SCHEDULE=1 python -m ...

Before each tile, every CTA then checks that the tile exists, is as long on the work line as its
grains and overhead require, and contains the CTA's position on the line. If not, the CTA records
its numbers and leaves the loop; the launcher waits for the kernel, reads the record and raises.
With `pieces` it checks each piece's record instead. During CUDA graph capture nothing is read. By
default the check is off and not compiled in.
"""

from contextvars import ContextVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.prefix_attention.records import END, GRAIN_START, HIGH, LOW, NEXT, PIECE, RECORD, ROWS
from kernels.runtime.environment import variable

VARIABLE = "PACORE_CHECK_SCHEDULE"
check_schedule: ContextVar[bool] = ContextVar("check_schedule", default=variable(VARIABLE) == "1")
NUMBERS = tl.constexpr(9)  # int32 values per fault: its type (1 or 2), then its numbers


def faults_of(programs: int, device: torch.device) -> tuple[Tensor] | tuple[()]:
    """The kernel's `faults` argument: one zeroed row per program, or () while the check is off."""
    if not check_schedule.get():
        return ()
    return (torch.zeros(programs, NUMBERS.value, dtype=torch.int32, device=device),)


def raise_fault(faults: tuple[Tensor] | tuple[()]) -> None:
    """Raise RuntimeError with the numbers of the first program that found a fault."""
    if not faults or (faults[0].is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    for program, (fault, *numbers) in enumerate(faults[0].tolist()):
        if fault == 2:
            at, count, rows, low, high, following, *_ = numbers
            raise RuntimeError(
                f"the schedule of prefix attention is wrong: program {program} was sent to piece"
                f" {at} of {count}, which has {rows} rows, tokens {low} to {high}, and next piece"
                f" {following}"
            )
        if fault:
            size, tile, count, place, stop, offset, places, needed = numbers
            raise RuntimeError(
                f"the schedule of prefix attention is wrong: program {program}, at position {place}"
                f" of a work range that ends at {stop}, was sent to tile {tile} of the"
                f" {('larger', 'smaller')[size]} size, which has {count} tiles;"
                f" the tile's length is {places} and should be {needed}, and the position is"
                f" {offset} past its start"
            )


@triton.jit
def checked_stop(faults, program, line, place, stop, tile, grain, overhead):
    """`stop`, or `place`, which ends the walk, if `tile` does not contain `place`.

    line: for the tiles of one size: their starts, their records, the size, their number, the
        position where they begin, and their length per KV head
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
    # An empty tile has length 0 and is skipped.
    holds = (offset >= 0) & ((offset < places) | (offset + places == 0))
    wrong = (place < stop) & ~(exists & holds & (places == needed))
    numbers = (1, size, tile, count, place, stop, offset, places, needed)
    for i in tl.static_range(NUMBERS):
        tl.store(faults + program * NUMBERS + i, numbers[i], mask=wrong)
    return tl.where(wrong, place, stop)


@triton.jit
def checked_piece(faults, pieces, at, max_node_rows):
    """`at`, or -1, which ends the walk, if that is not a valid piece.

    Pieces are stored in the order of the walk, so a valid NEXT is larger than `at`, and the walk
    ends.
    """
    reports, count = faults
    exists = (at >= 0) & (at < count)
    piece = pieces + at.to(tl.int64) * PIECE
    rows = tl.load(piece + ROWS, mask=exists, other=0)
    nonempty = exists & (rows != 0)
    low = tl.load(piece + LOW, mask=nonempty, other=0)
    high = tl.load(piece + HIGH, mask=nonempty, other=1)
    following = tl.load(piece + NEXT, mask=exists, other=-1)
    valid = (rows >= 0) & (rows <= max_node_rows) & (low >= 0) & (low < high)
    valid = valid & ((following == -1) | (following > at))
    wrong = (at >= 0) & ~(exists & valid)
    numbers = (2, at, count, rows, low, high, following)
    for i in tl.static_range(7):
        tl.store(reports + tl.program_id(0) * NUMBERS + i, numbers[i], mask=wrong)
    return tl.where(wrong, -1, at)
