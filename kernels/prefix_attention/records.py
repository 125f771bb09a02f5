"""Columns of the schedule's int32 tables: one record per row tile, and one per piece.

A row tile is some rows of a node, for one KV head; its record holds for all KV heads. A piece is
the part of a row tile that one CTA processes.
"""

import triton.language as tl

# Columns of a tile's record. Row r of the step sees the node's first min(end, edge + r) tokens.
ROW = tl.constexpr(0)  # the tile's first row
ROWS = tl.constexpr(1)
PAGE_START = tl.constexpr(2)  # the node's first entry in the page table
NODE_START = tl.constexpr(3)  # tokens that precede the node in its sequences
FLAGS = tl.constexpr(4)  # the sum of the flags below
# These three are computed by `schedule_kernel`.
GRAIN_START = tl.constexpr(5)  # first visible grain
END = tl.constexpr(6)
EDGE = tl.constexpr(7)
RECORD = tl.constexpr(8)  # columns of a tile's record
# Flags of a tile.
ALONE = tl.constexpr(1)  # the tile's rows see no other node
WRITES = tl.constexpr(2)  # the tile's rows are tokens of the node, written in this step

# Columns of a piece's record: as a tile's, except for the piece's tokens [low, high) and the flags.
# ALONE is kept only if the piece is the whole tile, WRITES only if it includes the tile's end.
# A record is half an L2 line, so one access fetches all of it.
LOW = tl.constexpr(5)
HIGH = tl.constexpr(6)
HEAD = tl.constexpr(8)  # KV head
VECTOR = tl.constexpr(9)  # index of the partial's first query vector
NEXT = tl.constexpr(10)  # the CTA's next piece, -1 after its last
PIECE = tl.constexpr(16)  # columns of a piece's record
