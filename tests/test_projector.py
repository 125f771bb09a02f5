"""The projector against sums written out tap by tap in fp64."""

import pytest
import torch
from torch import Tensor

from kernels.projector import output_tokens, projector
from tests.errors import max_error

FORMS = ("eager", "portable")


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("grid", [(8, 8), (6, 6), (5, 7), (1, 1), (2, 9)])
def test_projector_in_fp64(impl: str, grid: tuple[int, int]):
    """Even, odd and one-token sides, against the sum written out tap by tap."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    weights = random(5, 4, 3, 3), random(5), random(6, 5, 3, 3), random(6), random(3, 6)
    x = random(2 * grid[0] * grid[1], 4)
    expected = []
    for view in x.double().view(2, *grid, 4):
        y = convolution_by_taps(view, weights[0].double(), weights[1].double())
        y = convolution_by_taps(y, weights[2].double(), weights[3].double())
        expected.append((y @ weights[4].double().T).flatten(0, 1))
    out = projector(x, [grid] * 2, *weights, impl=impl)
    assert out.shape == (2 * output_tokens(grid), 3)
    assert max_error(out, torch.cat(expected)) < 1e-5


def convolution_by_taps(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """3x3, stride 2, padding 1 on [rows, columns, C]: one matrix product per tap and output."""
    rows, columns, _ = x.shape
    out = bias.repeat(-(-rows // 2), -(-columns // 2), 1)
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            for a in range(3):
                for b in range(3):
                    row, column = 2 * i + a - 1, 2 * j + b - 1
                    if 0 <= row < rows and 0 <= column < columns:
                        out[i, j] += weight[:, :, a, b] @ x[row, column]
    return out
