"""The projector against a convolution tap by tap in fp64, and folded against unfolded."""

from itertools import product

import pytest
import torch
from torch import Tensor

from kernels.projector import fold, output_tokens, projector
from kernels.runtime.configs import Gpu, assume_gpu, use_config
from tests.support.errors import max_error

FORMS = ("eager", "portable", "triton")
FOLDED = pytest.mark.parametrize("folded", [False, True], ids=["unfolded", "folded"])
BF16 = pytest.param(torch.bfloat16, id="bf16")
RAGGED = [(8, 8), (5, 7), (5, 7), (1, 1), (2, 9), (6, 6)]  # even, odd and one-token sides
SMALL_TILES = {"block_m": 16, "block_n": 16, "block_k": 16, "overhead": 0, "programs": 1}


@pytest.fixture(autouse=True)
def small_tiles():
    """Small tiles for the Triton form, split among five SMs; unwritten elements are NaN."""
    torch.use_deterministic_algorithms(True)
    with assume_gpu(Gpu("toy", 90, 5, 227 * 1024)), use_config("gemm", **SMALL_TILES):
        yield
    torch.use_deterministic_algorithms(False)


def weights_of(
    channels: tuple[int, int, int, int],
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 3,
) -> list[Tensor]:
    """w1, b1, w2, b2, w3 for `channels`: of x, after each convolution, and of the result."""
    generator = torch.Generator().manual_seed(seed)
    c, c1, c2, width = channels

    def draw(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator)
        return (values / values[0].numel() ** 0.5).to(device, dtype)

    def kernel(*shape: int) -> Tensor:
        return draw(*shape, 3, 3).to(memory_format=torch.channels_last)

    return [kernel(c1, c), draw(c1), kernel(c2, c1), draw(c2), draw(width, c2)]


def tokens(grids: list, channels: int, device: str = "cpu") -> Tensor:
    count = sum(rows * columns for rows, columns in grids)
    return torch.randn(count, channels, generator=torch.Generator().manual_seed(7)).to(device)


def run(x: Tensor, grids: list, weights: list[Tensor], folded: bool, **options) -> Tensor:
    weight_and_bias = fold(*weights[2:]) if folded else None
    return projector(x, grids, *weights, folded=weight_and_bias, **options)


@FOLDED
@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("grid", [(8, 8), (6, 6), (5, 7), (1, 1), (2, 9)])
def test_projector_in_fp64(impl: str, folded: bool, grid: tuple[int, int], triton_device: str):
    """Guards the formula for even, odd and one-token sides, tap by tap in fp64."""
    weights = weights_of((4, 5, 6, 3), device=triton_device)
    x = tokens([grid] * 2, 4, triton_device)
    expected = []
    for view in x.double().view(2, *grid, 4):
        w1, b1, w2, b2, w3 = (weight.double() for weight in weights)
        y = convolution_by_taps(convolution_by_taps(view, w1, b1), w2, b2)
        expected.append((y @ w3.T).flatten(0, 1))
    out = run(x, [grid] * 2, weights, folded, impl=impl)
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


def test_fold_is_exact_in_fp64():
    """Guards `fold`: folded and unfolded are the same sum in another order."""
    weights = weights_of((5, 7, 11, 6), torch.float64)
    x = tokens(RAGGED, 5).double()
    folded = fold(*weights[2:])
    out = projector(x, RAGGED, *weights, folded=folded, impl="portable")
    assert max_error(out, projector(x, RAGGED, *weights, impl="eager")) < 1e-12
    assert folded[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fold_rounds_once(dtype: torch.dtype):
    """Guards `fold`'s precision: sums are fp32 and rounded once, to the weights' dtype."""
    weights = weights_of((5, 7, 400, 6), dtype)[2:]
    wide = fold(*(weight.double() for weight in weights))
    for got, exact in zip(fold(*weights), wide, strict=True):
        assert got.dtype == dtype and got.shape == exact.shape
        assert ((got - exact).abs() <= torch.finfo(dtype).eps / 2 * exact.abs() + 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_folding_costs_no_accuracy(dtype: torch.dtype):
    """Guards folding in 16 bits: it rounds as often, so its errors are as large over several
    draws."""
    rms = {True: 0.0, False: 0.0}
    for seed in range(8):
        weights = weights_of((32, 64, 128, 64), dtype, seed=seed)
        x = torch.randn(144, 32, generator=torch.Generator().manual_seed(seed)).to(dtype)
        exact = projector(
            x.double(), [(12, 12)], *(weight.double() for weight in weights), impl="eager"
        )
        for folded in rms:
            out = run(x, [(12, 12)], weights, folded, impl="portable")
            rms[folded] += (out - exact).square().mean().item()
    assert 0.9 < (rms[True] / rms[False]) ** 0.5 < 1.1


@FOLDED
@pytest.mark.parametrize("impl", FORMS)
def test_ragged_views(impl: str, folded: bool, triton_device: str):
    """Guards views of many grids in one call, each as alone, and channels that fill no tile."""
    weights = weights_of((20, 24, 40, 19), device=triton_device)
    x = tokens(RAGGED, 20, triton_device)
    alone = [
        run(view, [grid], [weight.double() for weight in weights], False, impl="eager")
        for view, grid in zip(
            x.double().split([rows * columns for rows, columns in RAGGED]), RAGGED, strict=True
        )
    ]
    out = run(x, RAGGED, weights, folded, impl=impl)
    assert max_error(out, torch.cat(alone)) < 1e-5
    assert torch.equal(out, run(x, RAGGED, weights, folded, impl=impl))


@FOLDED
@pytest.mark.parametrize("dtype", [torch.float16, BF16])
def test_16_bits(dtype: torch.dtype, folded: bool, triton_device: str):
    """Guards the Triton form's rounding points: those of the definition, so with the same error."""
    weights = weights_of((32, 64, 128, 48), dtype, triton_device)
    x = tokens(RAGGED, 32, triton_device).to(dtype)
    exact = projector(x.double(), RAGGED, *(weight.double() for weight in weights), impl="eager")
    errors = {
        impl: (run(x, RAGGED, weights, folded, impl=impl) - exact).square().mean().item() ** 0.5
        for impl in ("eager", "triton")
    }
    assert errors["triton"] < 1.1 * errors["eager"]


@FOLDED
@pytest.mark.parametrize("impl", FORMS)
def test_rows_of_out(impl: str, folded: bool, triton_device: str):
    """Guards the scatter to `rows`, in any order; other rows of `out` keep their values."""
    weights = weights_of((4, 5, 6, 19), device=triton_device)
    x = tokens(RAGGED, 4, triton_device)
    plain = run(x, RAGGED, weights, folded, impl=impl)
    out = torch.full((40, 19), 7.0, device=triton_device)
    rows = torch.randperm(40)[: len(plain)].to(triton_device)
    assert run(x, RAGGED, weights, folded, impl=impl, out=out, rows=rows) is out
    assert torch.equal(out[rows], plain)
    others = torch.ones(40, dtype=torch.bool, device=triton_device)
    others[rows] = False
    assert (out[others] == 7).all()


@FOLDED
@pytest.mark.parametrize("impl", FORMS)
def test_no_views(impl: str, folded: bool, triton_device: str):
    """Guards an empty batch, with and without `out`."""
    weights = weights_of((4, 5, 6, 3), device=triton_device)
    x, rows = (tokens([], 4, triton_device), torch.arange(0, device=triton_device))
    assert run(x, [], weights, folded, impl=impl).shape == (0, 3)
    out = torch.ones(2, 3, device=triton_device)
    assert run(x, [], weights, folded, impl=impl, out=out, rows=rows) is out
    assert (out == 1).all()


def test_mistakes_are_named(triton_device: str):
    """Guards the checks in every form: each mistake raises a ValueError that names the argument."""
    weights = weights_of((4, 5, 6, 3), device=triton_device)
    x, grids = tokens([(5, 7)], 4, triton_device), [(5, 7)]
    folded = fold(*weights[2:])
    out = torch.zeros(9, 3, device=triton_device)
    rows = torch.arange(4, device=triton_device)
    w1, b1, w2, b2, w3 = weights

    def replaced(index: int, weight: Tensor) -> list[Tensor]:
        return [*weights[:index], weight, *weights[index + 1 :]]

    cases = [
        (r"x must be \[35, C\]", x[1:], weights, {}),
        (r"w1 must be \[C1, 4, 3, 3\]", x, replaced(0, w1[:, 1:]), {}),
        (r"w2 must be \[C2, 5, 3, 3\]", x, replaced(2, w2[:, 1:]), {}),
        (r"b1 must be \[5\] and b2 \[6\]", x, replaced(1, b1[1:]), {}),
        (r"b1 must be \[5\] and b2 \[6\]", x, replaced(3, b2[1:]), {}),
        (r"w3 must be \[width, 6\]", x, replaced(4, w3[:, 1:]), {}),
        ("weights must be torch.float16", x.half(), weights, {}),
        ("weights must be torch.float32", x, replaced(4, w3.half()), {}),
        ("weights must be", x, replaced(0, w1.to("meta")), {}),
        ("folded must have shapes", x, weights, {"folded": (folded[0][1:], folded[1])}),
        ("folded must have shapes", x, weights, {"folded": (w2, b2)}),
        ("weights must be", x, weights, {"folded": (folded[0].half(), folded[1])}),
        ("give both out and rows", x, weights, {"out": out}),
        ("give both out and rows", x, weights, {"rows": rows}),
        (r"out must be \[R, 3\]", x, weights, {"out": out[:, 1:], "rows": rows}),
        ("out must be torch.float32", x, weights, {"out": out.half(), "rows": rows}),
        ("neighbouring columns", x, weights, {"out": out.T.contiguous().T, "rows": rows}),
        (r"rows must be int64 \[4\]", x, weights, {"out": out, "rows": rows[1:]}),
        (r"rows must be int64 \[4\]", x, weights, {"out": out, "rows": rows.int()}),
    ]
    for (message, tokens_, args, options), impl in product(cases, FORMS):
        with pytest.raises(ValueError, match=message):
            projector(tokens_, grids, *args, impl=impl, **options)
    with pytest.raises(ValueError, match="channels_last"):
        projector(x, grids, *replaced(0, w1.contiguous()), impl="triton")
    with pytest.raises(ValueError, match=r"w3 must be \[width, 6\]"):
        fold(w2, b2, w3[:, 1:])
