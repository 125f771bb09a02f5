"""From the vision tower's tokens to the decoder's: two stride-2 convolutions and a linear layer.

    out = W3 . conv(conv(x, w1) + b1, w2) + b2        3x3, stride 2, padding 1, nothing in between

Each view of rows x columns tokens, row-major, becomes ceil(rows / 4) x ceil(columns / 4) tokens,
again row-major: 16 times fewer. Views of different grids stand packed in one batch.
"""

from collections.abc import Callable, Sequence
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels._launch import check, pick

Grid = tuple[int, int]  # rows, columns of a view's tokens


def projector(
    x: Tensor,
    grids: Sequence[Grid],
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    w3: Tensor,
    *,
    impl: str | None = None,
) -> Tensor:
    """Downsample and project packed views: x [T, C] -> [T', out], T' as `output_tokens` counts.

    w1: [C1, C, 3, 3], b1: [C1]; w2: [C2, C1, 3, 3], b2: [C2]; w3: [out, C2]
    Raises ValueError for shapes that do not fit together.
    """
    tokens = sum(rows * columns for rows, columns in grids)
    check(x.ndim == 2 and x.shape[0] == tokens, f"x must be [{tokens}, C], as the grids say")
    check(w1.shape[1:] == (x.shape[1], 3, 3), f"w1 must be [C1, {x.shape[1]}, 3, 3]")
    check(w2.shape[1:] == (w1.shape[0], 3, 3), f"w2 must be [C2, {w1.shape[0]}, 3, 3]")
    check(b1.shape == w1.shape[:1] and b2.shape == w2.shape[:1], "b1, b2 must fit w1, w2")
    check(w3.ndim == 2 and w3.shape[1] == w2.shape[0], f"w3 must be [out, {w2.shape[0]}]")
    form = pick("projector", impl, x.device, {"eager": projector_ref})
    return form(x, grids, w1, b1, w2, b2, w3)


def output_tokens(grid: Grid) -> int:
    """Tokens that a view of this grid becomes."""
    rows, columns = grid
    return -(-rows // 4) * -(-columns // 4)


def projector_ref(
    x: Tensor, grids: Sequence[Grid], w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, w3: Tensor
) -> Tensor:
    """The definition: neighbouring views of one grid as a batch of images.

    Fastest with w1 and w2 in channels-last, the layout that the tokens already have.
    """

    def images_to_tokens(images: Tensor) -> Tensor:
        y = F.conv2d(images, w1, b1, stride=2, padding=1)
        y = F.conv2d(y, w2, b2, stride=2, padding=1)
        return F.linear(y.flatten(2).transpose(1, 2), w3)

    return _by_grid(x, grids, w3.shape[0], images_to_tokens)


def _by_grid(
    x: Tensor, grids: Sequence[Grid], width: int, images_to_tokens: Callable[[Tensor], Tensor]
) -> Tensor:
    """Apply [n, C, rows, columns] -> [n, tokens, width] to each run of views with one grid."""
    outs, start = [x.new_empty(0, width)], 0
    for (rows, columns), same in groupby(grids):
        n = len(list(same))
        end = start + n * rows * columns
        images = x[start:end].view(n, rows, columns, -1).permute(0, 3, 1, 2)
        outs.append(images_to_tokens(images).flatten(0, 1))
        start = end
    return torch.cat(outs)
