"""The products of the Triton GEMM as operators, which have no other form.

`grids` are those of `sides_of`.
"""

from collections.abc import Sequence

from torch import Tensor

from kernels import gemm
from kernels.runtime.grids import grids_of, tokens_of
from kernels.torch_ops.registration import torch_op


def _product(x: Tensor, weight: Tensor, *_: object, **__: object) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _convolved(x: Tensor, grids: Sequence[int], weight: Tensor, *_: object, **__: object) -> Tensor:
    return x.new_empty(tokens_of(gemm.halved(grids_of(grids))), weight.shape[0])


@torch_op(_product)
def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, quick_gelu: bool = False
) -> Tensor:
    """`gemm.linear`: x [M, C] -> [M, N]."""
    return gemm.linear(x, weight, bias, quick_gelu=quick_gelu)


@torch_op(_convolved)
def convolution(
    x: Tensor, grids: Sequence[int], weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """`gemm.convolution`: x [T, C] -> [T', N]."""
    return gemm.convolution(x, grids_of(grids), weight, bias)
