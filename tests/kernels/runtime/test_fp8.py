"""FP8 pages: the quantiser's definition, and integer conversions against torch's casts."""

import pytest
import torch
import triton
import triton.language as tl

from kernels.runtime.fp8 import from_e4m3_bits, quantise_e4m3, to_e4m3_bits

BLOCK = 1 << 12


@triton.jit
def encode_kernel(x, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, to_e4m3_bits(tl.load(x + at, mask=at < n)), mask=at < n)


@triton.jit
def decode_kernel(code, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, from_e4m3_bits(tl.load(code + at)))


def encode(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    encode_kernel[(triton.cdiv(x.numel(), BLOCK),)](x, out, x.numel(), BLOCK=BLOCK)
    return out


def expected_code(x: torch.Tensor) -> torch.Tensor:
    """torch's cast of clamped values: releases differ for values beyond 464."""
    return x.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)


@pytest.mark.filterwarnings("ignore:invalid value")  # from NumPy: NaN in the interpreter
def test_encode_matches_torch(triton_device: str):
    """Guards every rounding decision, which depends on the last bit kept (2^20), the first bit
    dropped (2^19) and whether any lower bit is set: all upper 13 bits, with lower bits of each
    kind, represent all fp32 values, signs, subnormals, infinities and NaN included."""
    upper = torch.arange(1 << 13, dtype=torch.int64)[:, None] << 19
    lower = torch.tensor([0, 1, 2, 0x2AAAA, 0x40000, 0x7FFFE, 0x7FFFF])
    x = (upper | lower).to(torch.int32).view(torch.float32).flatten().to(triton_device)
    assert torch.equal(encode(x), expected_code(x))


@pytest.mark.gpu
def test_encode_every_fp32():
    """Guards the argument of the test above: all 2^32 values."""
    for upper in range(1 << 8):
        low = torch.arange(1 << 24, dtype=torch.int64, device="cuda")
        x = ((upper << 24) | low).to(torch.int32).view(torch.float32)
        assert torch.equal(encode(x), expected_code(x))


def test_decode_matches_torch(triton_device: str):
    """Guards all 256 codes; NaN is in the scale, and its code becomes 480."""
    code = torch.arange(256, dtype=torch.uint8, device=triton_device)
    out = torch.empty(256, dtype=torch.float16, device=triton_device)
    decode_kernel[(1,)](code, out, BLOCK=256)
    want = code.view(torch.float8_e4m3fn).half()
    assert want.isnan().nonzero().flatten().tolist() == [0x7F, 0xFF]
    want[0x7F], want[0xFF] = 480, -480
    assert torch.equal(out, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_quantiser(dtype: torch.dtype):
    """Guards the scale, which makes the largest element 448, and errors of at most half a step:
    2^-4 of a value, 2^-10 below 2^-6."""
    x = torch.randn(37, 3, 96).mul(torch.logspace(-5, 3, 37)[:, None, None]).to(dtype)
    pages, scale = quantise_e4m3(x)
    assert pages.dtype == torch.float8_e4m3fn and pages.shape == x.shape
    assert scale.dtype == torch.float32 and scale.shape == x.shape[:-1]
    assert (pages.float().abs().amax(-1) == 448).all()
    scaled = x.double() / scale[..., None].double()
    step = torch.maximum(scaled.abs() * 2**-4, torch.tensor(2.0**-10).double())
    assert ((pages.double() - scaled).abs() <= step * (1 + 2e-7)).all()


def test_quantiser_extremes():
    """Guards zeros, tiny rows (the reciprocal must not overflow), NaN and inf, which poison a
    row."""
    x = torch.tensor([[0.0, -0.0], [2.0**-61, 0.0], [1e-30, 1.0], [3e38, 1.0]])
    pages, scale = quantise_e4m3(x)
    value = pages.float() * scale[:, None]
    assert value[0].tolist() == [0, 0] and value[2].tolist() == [0, 1]
    assert value.isfinite().all() and scale.isfinite().all()
    for bad in (float("nan"), float("inf")):
        pages, scale = quantise_e4m3(torch.tensor([[1.0, bad], [1.0, 2.0]]))
        value = pages.float() * scale[:, None]
        assert value[0].isnan().all() and value[1].tolist() == [1, 2]
