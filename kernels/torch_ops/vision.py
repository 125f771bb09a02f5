"""The vision tower's ops and the projector as operators.

`grids` are those of `sides_of`: rows and columns of one view after the other.
"""

from collections.abc import Sequence

from torch import Tensor

from kernels import patchify as patches
from kernels import projector as downsample
from kernels import vision_attention as attention
from kernels.runtime.grids import grids_of
from kernels.torch_ops.registration import torch_op


def _patches(views: Sequence[Tensor], table: Tensor, size: int, *_: object) -> Tensor:
    values = sum(view.numel() for view in views)
    return table.new_empty(values // (3 * size * size), patches.row_width(size))


def _attended(qkv: Tensor, *_: object, **__: object) -> Tensor:
    return qkv.new_empty(qkv.shape[0], qkv.shape[1] // 3)


def _projected(
    x: Tensor,
    grids: Sequence[int],
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    w3: Tensor,
    *_: object,
    **__: object,
) -> Tensor:
    return x.new_empty(sum(map(downsample.output_tokens, grids_of(grids))), w3.shape[0])


def _nothing(*_: object, **__: object) -> None:
    pass


@torch_op(_patches)
def patchify(views: Sequence[Tensor], table: Tensor, size: int, impl: str | None = None) -> Tensor:
    """`patchify.patchify`: [T, row_width(size)]."""
    return patches.patchify(views, table, size=size, impl=impl)


@torch_op(_attended)
def vision_attention(
    qkv: Tensor, grids: Sequence[int], heads: int, theta: float = 1e4, impl: str | None = None
) -> Tensor:
    """`vision_attention.vision_attention`: qkv [T, 3 * H * D] -> [T, H * D]."""
    out = attention.vision_attention(qkv, grids_of(grids), heads=heads, theta=theta, impl=impl)
    return out if len(qkv) else out.clone()  # without rows, the definition returns part of qkv


@torch_op(_projected)
def projector(
    x: Tensor,
    grids: Sequence[int],
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    w3: Tensor,
    folded_weight: Tensor | None = None,
    folded_bias: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """`projector.projector`: x [T, C] -> [T', width]."""
    folded = _folded(folded_weight, folded_bias)
    return downsample.projector(x, grids_of(grids), w1, b1, w2, b2, w3, folded=folded, impl=impl)


@torch_op(_nothing, mutates=("out",))
def projector_into(
    out: Tensor,
    rows: Tensor,
    x: Tensor,
    grids: Sequence[int],
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    w3: Tensor,
    folded_weight: Tensor | None = None,
    folded_bias: Tensor | None = None,
    impl: str | None = None,
) -> None:
    """`projector`, whose result row i is written to out[rows[i]]."""
    folded = _folded(folded_weight, folded_bias)
    downsample.projector(
        x, grids_of(grids), w1, b1, w2, b2, w3, folded=folded, out=out, rows=rows, impl=impl
    )


def _folded(weight: Tensor | None, bias: Tensor | None) -> downsample.Folded | None:
    return None if weight is None or bias is None else (weight, bias)
