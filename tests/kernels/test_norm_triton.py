"""The Triton forms of rms_norm and layer_norm against their definitions."""

import pytest
import torch
from torch import Tensor

from kernels.norm import MAX_WIDTH, layer_norm, rms_norm
from kernels.runtime.configs import gpu_of, use_config
from tests.support.errors import max_error

BF16 = pytest.param(torch.bfloat16, id="bf16")
# fp32: sums of other order. 16 bits: a value on the edge between two becomes the other one, and
# rms_norm multiplies it with a weight and rounds again.
TOLERANCES = {torch.float32: 2e-6, torch.float16: 2**-9, torch.bfloat16: 2**-6}


def draw(*shapes, dtype=torch.float32, device="cpu", offset=0.5) -> list[Tensor]:
    return [(torch.randn(shape) + offset).to(device, dtype) for shape in shapes]


def forms(x: Tensor, residual: Tensor, vectors: list[Tensor], impl: str) -> list[Tensor]:
    """All that both ops compute, with and without what may be left out.

    Of one column LayerNorm leaves only what its division for the mean is off by, over sqrt(eps).
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
)  # and what the models have
def test_widths(width: int, dtype: torch.dtype, triton_device: str):
    """Columns beyond the width do not count, neither in the sums nor in what is written."""
    agree(3, width, dtype, triton_device)


@pytest.mark.parametrize("rows", [0, 1, 3, 4, 5, 13])
def test_rows(rows: int, triton_device: str):
    """Several rows to a program: none, one, a tile less one, whole, and one, a prime."""
    with use_config("rms_norm", rows=4), use_config("layer_norm", rows=4):
        agree(rows, 24, torch.float32, triton_device)


def test_widest(triton_device: str):
    """The widest row that is promised."""
    agree(2, MAX_WIDTH, torch.float32, triton_device)


@pytest.mark.parametrize("rows", [1, 4])
def test_all_outputs_and_only_they_are_written(rows: int, triton_device: str):
    """Inputs stay, and every element of every output is written."""
    x, residual = draw((5, 24), (5, 24), device=triton_device)
    vectors = draw(24, 24, 24, device=triton_device)
    kept = [tensor.clone() for tensor in (x, residual, *vectors)]
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills torch.empty with NaN
    try:
        with use_config("rms_norm", rows=rows), use_config("layer_norm", rows=rows):
            got = forms(x, residual, vectors, "triton")
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(result.isfinite().all() for result in got)
    assert all(map(torch.equal, kept, (x, residual, *vectors)))


@pytest.mark.parametrize("rows", [1, 4])
def test_rows_stand_alone(rows: int, triton_device: str):
    """A row's bits are the same alone, in any slot, and as part of wider tensors."""
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
    """The rounding before rms_norm's weight: without it a quarter of the values differ."""
    x, residual = draw((16, 256), (16, 256), dtype=dtype, device=triton_device)
    vectors = draw(256, 256, 256, dtype=dtype, device=triton_device)
    got, want = (forms(x, residual, vectors, impl) for impl in ("triton", "eager"))
    for result, expected in zip(got, want, strict=True):
        assert (result != expected).float().mean() < 0.01
    assert torch.equal(got[2], want[2])  # the sum


def test_early_start(triton_device: str):
    """With PDL the same bits. Interpreted, its wait is nothing; on a GPU each kernel of the chain
    starts while the one whose results it reads still runs."""
    if gpu_of(torch.device(triton_device)).arch < 90:
        pytest.skip("needs sm_90")
    x, residual = draw((16, 4096), (16, 4096), device=triton_device)
    weight, bias, gamma = draw(4096, 4096, 4096, device=triton_device)

    def chain() -> tuple[Tensor, Tensor]:
        given = x, residual
        options = {"eps": 1e-5, "impl": "triton"}
        for _ in range(4):
            given = rms_norm(given[0], weight, residual=given[1], **options)
            given = layer_norm(given[0], weight, bias, residual=given[1], gamma=gamma, **options)
        return given

    expected = chain()
    with use_config("rms_norm", pdl=1), use_config("layer_norm", pdl=1):
        assert all(map(torch.equal, chain(), expected))


def test_cancellation(triton_device: str):
    """Guards the variance as a mean of squares of differences, far from zero."""
    (x,) = draw((3, 100), offset=1000.0, device=triton_device)
    one, zero = torch.ones(100, device=triton_device), torch.zeros(100, device=triton_device)
    got, want = (layer_norm(x, one, zero, eps=1e-5, impl=impl) for impl in ("triton", "eager"))
    assert (got - want).abs().max() < 1e-3  # of an offset known to 6e-5


def test_bad_arguments_are_named(triton_device: str):
    """What the kernels could not read is refused before any launch."""
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
