"""The projector from vision tower to decoder: two stride-2 convolutions and a linear layer.

    out = W3 . (conv(conv(x, w1) + b1, w2) + b2)        3x3, stride 2, padding 1, no activation

Each view of rows x columns tokens, row-major, becomes ceil(rows / 4) x ceil(columns / 4) tokens,
again row-major: 16 times fewer. Views of different grids are packed in one batch.

As there is no activation between the last two layers, they can be folded into one: `fold`
multiplies W3 into w2 and b2. With the 10B's widths that leaves width x 9 C1 weights, 226 MB in
bf16, instead of C2 x 9 C1 + width x C2, 390 MB, and reduces the work in proportion. In 16 bits both
forms round three times, with about equal error: after the first convolution, at the end, and in
between, where either the second convolution's result or the folded weight is rounded.

The Triton form is two convolutions of `gemm/op.py`, straight from packed tokens, with all views in
one launch and each result row written where the caller wants it. Without `folded`, a linear layer
follows.
"""

from collections.abc import Callable, Sequence
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.gemm import check_output_rows, convolution, halved, linear
from kernels.runtime.arithmetic import cdiv
from kernels.runtime.dispatch import check, operators, pick
from kernels.runtime.grids import Grid, sides_of, tokens_of

Weights = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # w1, b1, w2, b2, w3
Folded = tuple[Tensor, Tensor]  # a weight in channels-last and a bias


def projector(
    x: Tensor,
    grids: Sequence[Grid],
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    w3: Tensor,
    *,
    folded: Folded | None = None,
    out: Tensor | None = None,
    rows: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """Downsample and project packed views: x [T, C] -> [T', width], T' as `output_tokens` counts.

    w1: [C1, C, 3, 3], b1: [C1]; w2: [C2, C1, 3, 3], b2: [C2]; w3: [width, C2]
    folded: `fold(w2, b2, w3)`; impl 'eager', the definition, ignores it
    out: [R, width], which is then returned; rows: int64 [T']. Both or neither: result row i is
    written to out[rows[i]]. The caller guarantees that rows are distinct and less than R; checking
    would wait for the GPU. Impl 'triton' needs w1 and w2, or folded, in channels-last.
    Raises ValueError for shapes, dtypes, devices or memory layouts that do not fit together.
    """
    if torch.compiler.is_compiling():
        check((out is None) == (rows is None), "give both out and rows, or neither")
        inputs = (x, sides_of(grids), w1, b1, w2, b2, w3, *(folded or (None, None)), impl)
        if out is None:
            return operators().projector(*inputs)
        operators().projector_into(out, rows, *inputs)
        return out
    weights = (w1, b1, w2, b2, w3)
    _check_weights(x, grids, weights, folded)
    check_output_rows(x, sum(map(output_tokens, grids)), w3.shape[0], out, rows)
    form = pick("projector", impl, x.device, _FORMS)
    return form(x, grids, weights, folded, out, rows)


def fold(w2: Tensor, b2: Tensor, w3: Tensor) -> Folded:
    """The second convolution and the linear layer as one: (w [width, C1, 3, 3], b [width]).

    w is channels-last; both have the weights' dtype, rounded once from fp32 sums. Computed one tap
    at a time to save memory. Raises ValueError for shapes that do not fit together.
    """
    check(w2.ndim == 4 and w2.shape[2:] == (3, 3), "w2 must be [C2, C1, 3, 3]")
    check(b2.shape == w2.shape[:1], f"b2 must be [{w2.shape[0]}]")
    check(w3.ndim == 2 and w3.shape[1] == w2.shape[0], f"w3 must be [width, {w2.shape[0]}]")
    wide = w3.to(torch.promote_types(w3.dtype, torch.float32))
    w = w2.new_empty(w3.shape[0], 3, 3, w2.shape[1]).permute(0, 3, 1, 2)
    for tap in range(9):
        a, b = divmod(tap, 3)
        w[:, :, a, b] = wide @ w2[:, :, a, b].to(wide.dtype)
    return w, (wide @ b2.to(wide.dtype)).to(b2.dtype)


def output_tokens(grid: Grid) -> int:
    """The number of output tokens of a view with this grid."""
    rows, columns = grid
    return cdiv(rows, 4) * cdiv(columns, 4)


def projector_ref(
    x: Tensor, grids: Sequence[Grid], w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, w3: Tensor
) -> Tensor:
    """The definition: neighbouring views with equal grids as a batch of images.

    Fastest with w1 and w2 in channels-last, which is also the layout of the tokens.
    """

    def images_to_tokens(images: Tensor) -> Tensor:
        y = F.conv2d(images, w1, b1, stride=2, padding=1)
        y = F.conv2d(y, w2, b2, stride=2, padding=1)
        return F.linear(y.flatten(2).transpose(1, 2), w3)

    return _by_grid(x, grids, w3.shape[0], images_to_tokens)


def _eager(
    x: Tensor,
    grids: Sequence[Grid],
    weights: Weights,
    folded: Folded | None,
    out: Tensor | None,
    rows: Tensor | None,
) -> Tensor:
    result = projector_ref(x, grids, *weights)
    return _placed(result, out, rows)


def _portable(
    x: Tensor,
    grids: Sequence[Grid],
    weights: Weights,
    folded: Folded | None,
    out: Tensor | None,
    rows: Tensor | None,
) -> Tensor:
    if folded is None:
        return _eager(x, grids, weights, None, out, rows)
    w1, b1, *_ = weights

    def images_to_tokens(images: Tensor) -> Tensor:
        y = F.conv2d(images, w1, b1, stride=2, padding=1)
        return F.conv2d(y, *folded, stride=2, padding=1).flatten(2).transpose(1, 2)

    result = _by_grid(x, grids, len(folded[0]), images_to_tokens)
    return _placed(result, out, rows)


def _triton(
    x: Tensor,
    grids: Sequence[Grid],
    weights: Weights,
    folded: Folded | None,
    out: Tensor | None,
    rows: Tensor | None,
) -> Tensor:
    w1, b1, w2, b2, w3 = weights
    y = convolution(x, grids, w1, b1)
    grids = halved(grids)
    if folded is not None:
        return convolution(y, grids, *folded, out=out, rows=rows)
    return linear(convolution(y, grids, w2, b2), w3, out=out, rows=rows)


def _placed(result: Tensor, out: Tensor | None, rows: Tensor | None) -> Tensor:
    """Write `result` to `rows` of `out` and return `out`; without out, return `result`."""
    return result if out is None or rows is None else out.index_copy_(0, rows, result)


_FORMS = {"eager": _eager, "portable": _portable, "triton": _triton}


def _by_grid(
    x: Tensor, grids: Sequence[Grid], width: int, images_to_tokens: Callable[[Tensor], Tensor]
) -> Tensor:
    """Apply [n, C, rows, columns] -> [n, tokens, width] to each run of views with equal grids."""
    outs, start = [x.new_empty(0, width)], 0
    for (rows, columns), same in groupby(grids):
        n = len(list(same))
        end = start + n * rows * columns
        images = x[start:end].view(n, rows, columns, -1).permute(0, 3, 1, 2)
        outs.append(images_to_tokens(images).flatten(0, 1))
        start = end
    return torch.cat(outs)


def _check_weights(
    x: Tensor, grids: Sequence[Grid], weights: Weights, folded: Folded | None
) -> None:
    w1, b1, w2, b2, w3 = weights
    tokens, width = tokens_of(grids), w3.shape[0]
    check(
        x.ndim == 2 and x.shape[0] == tokens,
        f"x must be [{tokens}, C], a row per token of the grids, not {list(x.shape)}",
    )
    check(w1.shape[1:] == (x.shape[1], 3, 3), f"w1 must be [C1, {x.shape[1]}, 3, 3]")
    check(w2.shape[1:] == (w1.shape[0], 3, 3), f"w2 must be [C2, {w1.shape[0]}, 3, 3]")
    check(
        b1.shape == w1.shape[:1] and b2.shape == w2.shape[:1],
        f"b1 must be [{w1.shape[0]}] and b2 [{w2.shape[0]}] like w1 and w2,"
        f" not {list(b1.shape)} and {list(b2.shape)}",
    )
    check(w3.ndim == 2 and w3.shape[1] == w2.shape[0], f"w3 must be [width, {w2.shape[0]}]")
    if folded is not None:
        shapes = [[width, w1.shape[0], 3, 3], [width]]
        check(
            [list(tensor.shape) for tensor in folded] == shapes,
            f"folded must have shapes {shapes}, as `fold` returns it",
        )
    for tensor in (*weights, *(folded or ())):
        check(
            tensor.dtype == x.dtype and tensor.device == x.device,
            f"weights must be {x.dtype} on {x.device} like x, not {tensor.dtype} on"
            f" {tensor.device}",
        )
