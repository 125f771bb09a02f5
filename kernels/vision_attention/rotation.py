"""The rotation kernel of vision attention, and its device functions, which attention also uses.

The two elements of a pair are neighbours: they are in the same part of a head and in the 16 bytes
that one thread loads, so nothing is shuffled, and weights keep their published order.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tokens"])
def rotate_kernel(
    qkv,  # [T, row_stride]
    turned,  # output: [T, HEADS of Q unless TURN_Q, then of K, FIRST + REST]
    coords,  # int32 [T], row << 16 | column of each token
    cos,  # fp32 [side, D / 4]
    sin,
    tokens,
    row_stride,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    FIRST: tl.constexpr,
    REST: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    TURN_Q: tl.constexpr,  # vision_attention_kernel rotates Q; rotate only K here
):
    """Rotate ROWS tokens of GROUP heads of `turned`."""
    SKIPPED: tl.constexpr = HEADS if TURN_Q else 0
    COUNT: tl.constexpr = 2 * HEADS - SKIPPED
    PADDED: tl.constexpr = FIRST + REST
    groups: tl.constexpr = COUNT // GROUP
    row = tl.program_id(0) // groups * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(0) % groups * GROUP
    live = row < tokens
    coord = tl.load(coords + row, mask=live, other=0)
    x = qkv + row.to(tl.int64) * row_stride + (SKIPPED + head) * D
    y = turned + row.to(tl.int64) * (COUNT * PADDED) + head * PADDED
    _rotate_part(x, y, live, coord, cos, sin, 0, FIRST, D, PADDED, GROUP)
    if REST:
        _rotate_part(x, y, live, coord, cos, sin, FIRST, REST, D, PADDED, GROUP)


@triton.jit
def _rotate_part(
    x,  # pointers to each token's first head
    y,
    live,
    coord,
    cos,
    sin,
    START: tl.constexpr,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    PADDED: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Rotate elements [START, START + WIDTH) of GROUP heads; those past D become 0."""
    turn = load_turn(live, coord, cos, sin, START, WIDTH, D)
    element = START + tl.arange(0, WIDTH)
    for i in tl.static_range(GROUP):
        result = load_turned(x + i * D, live, turn, START, WIDTH, D)
        tl.store(y[:, None] + (i * PADDED + element)[None, :], result, mask=live[:, None])


@triton.jit
def load_turn(live, coord, cos, sin, START: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """cos and sin, fp32 [ROWS, WIDTH / 2], for the pairs of elements [START, START + WIDTH)."""
    pair = START // 2 + tl.arange(0, WIDTH // 2)
    by_row = pair >= D // 4  # a head's first half rotates with the column, its second with the row
    frequency = tl.where(by_row, pair - D // 4, pair)
    position = tl.where(by_row[None, :], coord[:, None] >> 16, coord[:, None] & 0xFFFF)
    angle = position * (D // 4) + frequency[None, :]
    inside = live[:, None] & (pair < D // 2)[None, :]
    c = tl.load(cos + angle, mask=inside, other=0.0)
    s = tl.load(sin + angle, mask=inside, other=0.0)
    return c, s


@triton.jit
def load_turned(
    x,  # pointers to each row's head
    live,
    turn,  # cos and sin of each row's pairs
    START: tl.constexpr,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
):
    """Load elements [START, START + WIDTH), rotate in fp32, round; 0 past D and where not live."""
    c, s = turn
    element = START + tl.arange(0, WIDTH)
    mask = live[:, None] & (element < D)[None, :]
    values = tl.load(x[:, None] + element[None, :], mask=mask, other=0.0)
    a, b = tl.split(tl.reshape(values, [x.shape[0], WIDTH // 2, 2]))
    a, b = a.to(tl.float32), b.to(tl.float32)
    both = tl.join(a * c - b * s, b * c + a * s)
    return tl.reshape(both, [x.shape[0], WIDTH]).to(values.dtype)
