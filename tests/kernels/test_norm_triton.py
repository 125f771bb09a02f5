"""The Triton forms of rms_norm and layer_norm against their definitions."""

import pytest
import torch
from torch import Tensor

from kernels.norm import MAX_WIDTH, layer_norm, rms_norm
from kernels.runtime.configs import gpu_of, use_config
from tests.support.errors import max_error

BF16 = pytest.param(torch.bfloat16, id="bf16")
# fp32: the order of sums differs. 16 bits: a value halfway between two may round to the other one,
# and rms_norm multiplies it by a weight and rounds again.
TOLERANCES = {torch.float32: 2e-6, torch.float16: 2**-9, torch.bfloat16: 2**-6}


def draw(*shapes, dtype=torch.float32, device="cpu", offset=0.5) -> list[Tensor]:
    return [(torch.randn(shape) + offset).to(device, dtype) for shape in shapes]


def forms(x: Tensor, residual: Tensor, vectors: list[Tensor], impl: str) -> list[Tensor]:
    """All results of both ops, with and without the optional arguments.

    With one column, LayerNorm's result is only the rounding error of the mean, over sqrt(eps).
    """
    weight, bias, gamma = vectors
    eps, added = {"eps": 1e-5 if x.shape[1] > 1 else 1.0, "impl": impl}, {"residual": residual}
    return [
        rms_norm(x, weight, **eps),
        *rms_norm(x, weight, **eps, **added),
        layer_norm(x, weight, bias, **eps),
        *layer_norm(x, weight, bias, **eps, **added),
        *layer_norm(x, weight, bias, **eps, **added, gamma=gamma),
    ]


def agree(rows: int, width: int, dtype: torch.dtype, device: str) -> None:
    x, residual = draw((rows, width), (rows, width), dtype=dtype, device=device)
    vectors = draw(width, width, width, dtype=dtype, device=device)
    got, want = (forms(x, residual, vectors, impl) for impl in ("triton", "eager"))
    for result, expected in zip(got, want, strict=True):
        assert result.dtype == dtype
        assert max_error(result, expected) <= TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16])
@pytest.mark.parametrize(
    "width",
    [1, 2, 31, 32, 33, 97, 576, 1536, 4096],  # one, a power of two and its neighbours, a prime,
)  # and the models' widths
def test_widths(width: int, dtype: torch.dtype, triton_device: str):
    """Guards the column mask: columns beyond the width are neither summed nor written."""
    agree(3, width, dtype, triton_device)


@pytest.mark.parametrize("rows", [0, 1, 3, 4, 5, 13])
def test_rows(rows: int, triton_device: str):
    """Guards the row mask with several rows per program: no rows, one, a tile minus one, a tile, a
    tile plus one, a prime."""
    with use_config("rms_norm", rows=4), use_config("layer_norm", rows=4):
        agree(rows, 24, torch.float32, triton_device)


def test_widest(triton_device: str):
    """Guards the documented limit: the widest row still works."""
    agree(2, MAX_WIDTH, torch.float32, triton_device)


@pytest.mark.parametrize("rows", [1, 4])
def test_only_outputs_are_written(rows: int, triton_device: str):
    """Guards against unwritten output elements and against writes into the inputs."""
    x, residual = draw((5, 24), (5, 24), device=triton_device)
    vectors = draw(24, 24, 24, device=triton_device)
    before = [tensor.clone() for tensor in (x, residual, *vectors)]
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills torch.empty with NaN
    try:
        with use_config("rms_norm", rows=rows), use_config("layer_norm", rows=rows):
            got = forms(x, residual, vectors, "triton")
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(result.isfinite().all() for result in got)
    assert all(map(torch.equal, before, (x, residual, *vectors)))


@pytest.mark.parametrize("rows", [1, 4])
def test_rows_are_independent(rows: int, triton_device: str):
    """Guards bits: the same for a row alone, at any index, and in a view of a wider tensor."""
    x, residual = draw((5, 24), (5, 24), device=triton_device)
    vectors = draw(24, 24, 24, device=triton_device)
    with use_config("rms_norm", rows=rows), use_config("layer_norm", rows=rows):
        whole = forms(x, residual, vectors, "triton")
        wide, wider = torch.cat((x, x), 1)[:, 24:], torch.cat((residual, x, x), 1)[:, :24]
        assert all(map(torch.equal, whole, forms(wide, wider, vectors, "triton")))
        for i in range(5):
            alone = forms(x[i : i + 1], residual[i : i + 1], vectors, "triton")
            assert all(torch.equal(a[0], b[i]) for a, b in zip(alone, whole, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, BF16])
def test_16_bits_round_alike(dtype: torch.dtype, triton_device: str):
    """Guards the rounding before rms_norm's weight: without it a quarter of the values differ."""
    x, residual = draw((16, 256), (16, 256), dtype=dtype, device=triton_device)
    vectors = draw(256, 256, 256, dtype=dtype, device=triton_device)
    got, want = (forms(x, residual, vectors, impl) for impl in ("triton", "eager"))
    for result, expected in zip(got, want, strict=True):
        assert (result != expected).float().mean() < 0.01
    assert torch.equal(got[2], want[2])  # the sum


def test_early_start(triton_device: str):
    """Guards PDL: the bits are the same with it. The interpreter ignores its wait; on a GPU each
    kernel of the chain starts while the one whose results it reads is still running."""
    if gpu_of(torch.device(triton_device)).arch < 90:
        pytest.skip("needs sm_90")
    x, residual = draw((16, 4096), (16, 4096), device=triton_device)
    weight, bias, gamma = draw(4096, 4096, 4096, device=triton_device)

    def chain() -> tuple[Tensor, Tensor]:
        pair = x, residual
        options = {"eps": 1e-5, "impl": "triton"}
        for _ in range(4):
            pair = rms_norm(pair[0], weight, residual=pair[1], **options)
            pair = layer_norm(pair[0], weight, bias, residual=pair[1], gamma=gamma, **options)
        return pair

    expected = chain()
    with use_config("rms_norm", pdl=1), use_config("layer_norm", pdl=1):
        assert all(map(torch.equal, chain(), expected))


def test_cancellation(triton_device: str):
    """Guards the variance as a mean of squared differences, for a mean far from zero."""
    (x,) = draw((3, 100), offset=1000.0, device=triton_device)
    one, zero = torch.ones(100, device=triton_device), torch.zeros(100, device=triton_device)
    got, want = (layer_norm(x, one, zero, eps=1e-5, impl=impl) for impl in ("triton", "eager"))
    assert (got - want).abs().max() < 1e-3  # the offset itself is exact to 6e-5


def test_bad_arguments_are_named(triton_device: str):
    """Guards the checks before a launch: strides and widths that kernels cannot read."""
    x, weight = torch.zeros(3, 8, device=triton_device), torch.zeros(8, device=triton_device)
    every, wide = weight.repeat(2)[::2], torch.zeros(1, MAX_WIDTH + 1, device=triton_device)
    turned = x.t().contiguous().t()
    options = {"eps": 1e-6, "impl": "triton"}
    cases = [
        ("rms_norm: x must have neighbouring", lambda: rms_norm(turned, weight, **options)),
        ("weight must have neighbouring", lambda: rms_norm(x, every, **options)),
        ("residual must have", lambda: rms_norm(x, weight, residual=turned, **options)),
        ("bias must have", lambda: layer_norm(x, weight, every, **options)),
        (
            "gamma must have",
            lambda: layer_norm(x, weight, weight, residual=x, gamma=every, **options),
        ),
        ("x must be at most 16384 wide", lambda: rms_norm(wide, wide[0], **options)),
        ("residual must be", lambda: rms_norm(x, weight, residual=x.to("meta"), **options)),
    ]
    for message, call in cases:
        with pytest.raises(ValueError, match=message):
            call()
