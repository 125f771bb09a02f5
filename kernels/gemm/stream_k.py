"""Stream-K division of a matrix product among persistent CTAs: whole waves, then the remainder.

The result has m_tiles x n_tiles tiles of `steps` K blocks each. Tiles are numbered by bands of at
most BAND rows of tiles, with m fastest within a band. As long as there is a whole tile for every
CTA, each takes one at a time: neighbouring CTAs work on the same panel of the weight, at the same
K. The remaining tiles, fewer than CTAs, are split across K:

    lane        remaining tile i belongs to lane i % lanes, and CTA p to lane p % lanes
    work line   a lane's tiles in the order of i // lanes, each of `steps` steps
    work range  CTA p takes the (p // lanes)-th range of `share` steps of its lane's line

With as many lanes as a band has rows, each lane stays in one row of tiles, and all lanes are at the
same K of the same panel of the weight, which is thus read from memory once. There are fewer lanes
where that many would leave CTAs idle.

A CTA sums its part of a tile in fp32 and writes it to the workspace as a partial. A second launch
sums the partials of each tile in the order of K.
"""

from dataclasses import dataclass
from functools import lru_cache

from kernels.runtime.arithmetic import cdiv

BAND = 16  # with tiles of 128 x 256, 132 CTAs then read equally much of both factors


@dataclass(frozen=True)
class StreamK:
    """The division of one product, in tiles, steps and programs (CTAs)."""

    steps: int  # K blocks of a tile
    programs: int
    band: int  # rows of tiles in a band
    whole: int  # tiles that one CTA computes whole
    rest: int  # the tiles after those, which are split; fewer than programs
    lanes: int
    share: int  # steps of a work range

    @property
    def partials(self) -> int:
        """Partials in the workspace: at most one per CTA and one per split tile."""
        if not self.rest:
            return 0
        longest = cdiv(self.rest, self.lanes)
        return self.lanes * (-(-longest * self.steps // self.share) + longest - 1)

    def work(self, program: int) -> int:
        """The number of steps of one CTA."""
        whole = len(range(program, self.whole, self.programs)) * self.steps
        line = len(range(program % self.lanes, self.rest, self.lanes)) * self.steps
        start = program // self.lanes * self.share
        return whole + max(min(self.share, line - start), 0)


@lru_cache(maxsize=256)
def stream_k(m_tiles: int, n_tiles: int, steps: int, programs: int, overhead: int) -> StreamK:
    """Divide a product among `programs` CTAs.

    overhead: cost of a work range's partials, in steps. No work range is shorter, and tiles are
        split only if that saves more.
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


def _lanes(rest: int, max_lanes: int, steps: int, programs: int) -> tuple[int, int]:
    """(lanes, share): the most lanes whose share is at most 2 % above the smallest."""

    def share(lanes: int) -> int:
        return cdiv(cdiv(rest, lanes) * steps, programs // lanes)

    shares = {lanes: share(lanes) for lanes in range(1, min(max_lanes, rest) + 1)}
    min_share = min(shares.values())
    return max((lanes, share) for lanes, share in shares.items() if 100 * share <= 102 * min_share)
