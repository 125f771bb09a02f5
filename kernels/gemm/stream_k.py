"""How a matrix product is cut into work for persistent programs: whole tiles, then stretches.

A product has m_tiles x n_tiles tiles of the result, each of `steps` blocks of K. They are numbered
by bands of at most BAND rows of tiles, m fastest in each. While there is a whole tile for every
program, each takes one at a time: programs side by side work on the same panel of the weight, at
the same place in K. What remains, fewer tiles than programs, is cut across K:

    lane    remaining tile i belongs to lane i % lanes, and program p to lane p % lanes
    line    a lane's tiles one after the other, i // lanes, each of `steps` steps
    stretch the p // lanes-th `share` of that line is program p's

With as many lanes as a band has rows, each lane has the same row throughout, and all lanes are at
the same place in the same panel of the weight, which so comes from memory once. Where that many
lanes would leave programs idle there are fewer.

A program adds up its part of a tile in fp32 and leaves it in a partial of the workspace, which a
second launch sums tile by tile, in the order of K.
"""

from dataclasses import dataclass
from functools import lru_cache

from kernels.runtime.arithmetic import cdiv

BAND = 16  # with tiles of 128 x 256, 132 programs read as much of the weight as of the other factor


@dataclass(frozen=True)
class StreamK:
    """The cut of one product; everything in it counts tiles, steps or programs."""

    steps: int  # of a tile
    programs: int
    band: int  # rows of tiles
    whole: int  # tiles that one program does alone
    rest: int  # tiles that are cut, after those; fewer than programs
    lanes: int
    share: int  # steps

    @property
    def partials(self) -> int:
        """Partial tiles in the workspace: at most one per program and one per tile of the rest."""
        if not self.rest:
            return 0
        longest = cdiv(self.rest, self.lanes)
        return self.lanes * (-(-longest * self.steps // self.share) + longest - 1)

    def work(self, program: int) -> int:
        """Steps of one program."""
        whole = len(range(program, self.whole, self.programs)) * self.steps
        line = len(range(program % self.lanes, self.rest, self.lanes)) * self.steps
        start = program // self.lanes * self.share
        return whole + max(min(self.share, line - start), 0)


@lru_cache(maxsize=256)
def stream_k(m_tiles: int, n_tiles: int, steps: int, programs: int, overhead: int) -> StreamK:
    """The cut among so many programs.

    A stretch costs as much as `overhead` steps, for its partial tiles: none is shorter, and tiles
    are cut only if that gains more.
    """
    tiles = m_tiles * n_tiles
    band = cdiv(m_tiles, cdiv(m_tiles, BAND))
    whole = tiles // programs * programs
    rest = tiles - whole
    if rest:
        lanes, share = _lanes(rest, band, steps, programs)
        share = max(share, overhead)
        if share + overhead < steps:
            return StreamK(steps, programs, band, whole, rest, lanes, share)
    return StreamK(steps, programs, band, whole=tiles, rest=0, lanes=1, share=1)


def _lanes(rest: int, most: int, steps: int, programs: int) -> tuple[int, int]:
    """How many lanes and each program's share: the most lanes that lengthen it by at most 2 %."""

    def share(lanes: int) -> int:
        return cdiv(cdiv(rest, lanes) * steps, programs // lanes)

    shares = {lanes: share(lanes) for lanes in range(1, min(most, rest) + 1)}
    least = min(shares.values())
    return max((lanes, share) for lanes, share in shares.items() if 100 * share <= 102 * least)
