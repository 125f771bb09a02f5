"""silu_mul and quick_gelu against fp64 and transformers' own modules."""

import pytest
import torch

from kernels.activation import quick_gelu, silu_mul

IMPLS = ["eager", "portable"]
# Largest error relative to max(rms(ref), |ref|) against fp64: half a unit in the last place for
# each rounding (quick_gelu one, silu_mul two), and a few units for fp32 exponentials.
TOLERANCES = {
    "silu_mul": {torch.float32: 5e-7, torch.bfloat16: 2**-7, torch.float16: 2**-10},
    "quick_gelu": {torch.float32: 5e-7, torch.bfloat16: 2**-8, torch.float16: 2**-11},
}
DTYPES = list(TOLERANCES["silu_mul"])
# No rows, one row, a prime number of them; one column, a prime, the widths of the models.
SHAPES = [(0, 64), (1, 1), (5, 97), (17, 1536), (2, 12288)]


def draw(*shape, dtype, device="cpu"):
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(shape, generator=generator) * 4).to(device, dtype)


def assert_close(op, got, want):
    assert got.shape == want.shape
    if want.numel():
        scale = want.abs().clamp_min(want.square().mean().sqrt())
        error = ((got.double() - want).abs() / scale).max().item()
        assert error <= TOLERANCES[op][got.dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("impl", IMPLS)
def test_matches_fp64(impl, dtype, device):
    """Guards the formulas, and that the gate is the first half."""
    for rows, width in SHAPES:
        gate_up = draw(rows, 2 * width, dtype=dtype, device=device)
        gate, up = gate_up[:, :width].double(), gate_up[:, width:].double()
        want = gate / (1 + torch.exp(-gate)) * up
        assert_close("silu_mul", silu_mul(gate_up, impl=impl), want)
        x = draw(rows, width, dtype=dtype, device=device)
        want = x.double() / (1 + torch.exp(-1.702 * x.double()))
        assert_close("quick_gelu", quick_gelu(x, impl=impl), want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("impl", IMPLS)
def test_interleaved_pairs(impl, dtype, device):
    """Guards that the first of a pair is the gate, and that the layout changes no bits."""
    for rows, width in (*SHAPES, (3, 0)):
        halves = draw(rows, 2 * width, dtype=dtype, device=device)
        pairs = torch.empty_like(halves)
        pairs[:, ::2], pairs[:, 1::2] = halves[:, :width], halves[:, width:]
        got = silu_mul(pairs, interleaved=True, impl=impl)
        assert got.shape == (rows, width) and got.is_contiguous()
        if dtype == torch.float32:  # PyTorch's exp may round strided tensors differently
            assert_close("silu_mul", got, silu_mul(halves, impl=impl).double())
        else:
            assert (got != silu_mul(halves, impl=impl)).sum() <= 0.001 * got.numel()


@pytest.mark.judge
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("impl", IMPLS)
def test_silu_mul_rounds_like_transformers(impl, dtype):
    """Guards the rounding between silu and product: without it a quarter of the values differ."""
    from transformers import Qwen3Config
    from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

    gate_up = draw(16, 128, dtype=dtype)
    judge = Qwen3MLP(Qwen3Config(hidden_size=128, intermediate_size=64, hidden_act="silu"))
    gate, up = gate_up.chunk(2, dim=-1)
    want = judge.act_fn(gate) * up
    got = silu_mul(gate_up, impl=impl)
    if dtype == torch.float32:
        assert_close("silu_mul", got, want.double())
    else:
        assert (got != want).float().mean().item() < 0.01


@pytest.mark.judge
@pytest.mark.parametrize("impl", IMPLS)
def test_quick_gelu_matches_transformers(impl):
    """Guards the constant 1.702, and against using the exact GELU."""
    from transformers.activations import QuickGELUActivation

    x = draw(16, 97, dtype=torch.float32)
    assert_close("quick_gelu", quick_gelu(x, impl=impl), QuickGELUActivation()(x.double()))


@pytest.mark.parametrize("impl", IMPLS)
def test_extremes_stay_finite(impl):
    """Guards against NaN from an overflow of exp where the sigmoid saturates."""
    x = torch.tensor([[-1e4, -100.0, -0.0, 0.0, 100.0, 1e4]])
    relu = torch.tensor([[0.0, 0.0, 0.0, 0.0, 100.0, 1e4]])
    assert torch.equal(quick_gelu(x, impl=impl), relu)
    assert torch.equal(silu_mul(torch.cat((x, torch.ones_like(x)), 1), impl=impl), relu)


@pytest.mark.parametrize("impl", IMPLS)
def test_strides_and_inputs(impl):
    """Guards against assumed contiguity and against writing into the input."""
    wide = draw(6, 4 * 32, dtype=torch.float32)
    before = wide.clone()
    for op in (silu_mul, quick_gelu):
        for view in (wide[:, ::2], wide[:, 16:80], wide.t()[:, :4], wide[::2]):
            got, want = op(view, impl=impl), op(view.contiguous(), impl=impl)
            assert torch.allclose(got, want, rtol=1e-6, atol=1e-7)
    assert torch.equal(wide, before)


def test_bad_arguments_are_named():
    """Guards the launchers' checks: each mistake raises a ValueError that names the argument."""
    cases = [
        ("gate_up must have two axes", lambda: silu_mul(torch.zeros(8))),
        ("gate_up must be .*equal width", lambda: silu_mul(torch.zeros(2, 7))),
        ("gate_up must be fp32", lambda: silu_mul(torch.zeros(2, 8, dtype=torch.float64))),
        ("x must have two axes", lambda: quick_gelu(torch.zeros(2, 3, 4))),
        ("x must be fp32", lambda: quick_gelu(torch.zeros(2, 8, dtype=torch.int64))),
        ("choose one of", lambda: silu_mul(torch.zeros(2, 8), impl="fast")),
    ]
    for message, call in cases:
        with pytest.raises(ValueError, match=message):
            call()
