"""What prefix attention's kernels read of its schedule: columns of the records of tiles and pieces.

A tile is a block of a node's rows, for each KV head. A piece is what one program does of it.
"""

import triton.language as tl

# Columns of a tile's record. A row r of the tile sees the first min(end, edge + r) tokens.
ROW = tl.constexpr(0)  # the tile's first row
ROWS = tl.constexpr(1)
PAGE_START = tl.constexpr(2)  # the node's first entry in the page table
NODE_START = tl.constexpr(3)  # tokens before the node in its sequences
FLAGS = tl.constexpr(4)  # the sum of those below
GRAIN_START = tl.constexpr(5)  # first grain in sight; from here on set by `schedule_kernel`
END = tl.constexpr(6)
EDGE = tl.constexpr(7)
RECORD = tl.constexpr(8)
# Flags of a tile.
ALONE = tl.constexpr(1)  # the tile's rows see no other node
WRITES = tl.constexpr(2)  # the tile's rows are tokens of the node, written in this step

# Columns of a piece's record: the tile's, but for its tokens [low, high), and for flags, which hold
# if the piece has all of the tile (ALONE) or its end (WRITES). Half a line of L2: one trip for all.
LOW = tl.constexpr(5)
HIGH = tl.constexpr(6)
HEAD = tl.constexpr(8)  # KV head
VECTOR = tl.constexpr(9)  # where the partial result goes
NEXT = tl.constexpr(10)  # the program's next piece, -1 after its last
PIECE = tl.constexpr(16)
