"""rms_norm and layer_norm against fp64, transformers' Qwen3RMSNorm and torch.nn.LayerNorm."""

import pytest
import torch

from kernels.norm import layer_norm, rms_norm

IMPLS = ["eager", "portable"]
# Largest error relative to max(rms(ref), |ref|) against fp64: half a unit in the last place for
# each rounding (layer_norm one, rms_norm two), and a few units for fp32 sums.
TOLERANCES = {
    "rms_norm": {torch.float32: 5e-7, torch.bfloat16: 2**-7, torch.float16: 2**-10},
    "layer_norm": {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11},
}
DTYPES = list(TOLERANCES["rms_norm"])
# No rows, one row, a prime number of them; one channel, a prime, the widths of the models.
SHAPES = [(0, 64), (1, 1), (1, 576), (7, 97), (17, 1536), (3, 4096)]


def draw(*shape, dtype, device="cpu", scale=1.0, offset=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(shape, generator=generator) * scale + offset).to(device, dtype)


def assert_close(op, got, want):
    assert got.shape == want.shape
    if want.numel():
        scale = want.abs().clamp_min(want.square().mean().sqrt())
        error = ((got.double() - want).abs() / scale).max().item()
        assert error <= TOLERANCES[op][got.dtype]


def rms_fp64(x, weight, eps):
    wide = x.double()
    return wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def layer_fp64(x, weight, bias, eps):
    wide = x.double()
    centred = wide - wide.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return normed * weight.double() + bias.double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("impl", IMPLS)
def test_rms_norm_matches_fp64(impl, dtype, device):
    """Guards the formula, the returned sum, and that the sum is what is normalised."""
    for shape in SHAPES:
        x = draw(*shape, dtype=dtype, device=device, scale=3.0)
        residual = draw(*shape, dtype=dtype, device=device, seed=1)
        weight = draw(shape[1], dtype=dtype, device=device, offset=1.0)
        got = rms_norm(x, weight, eps=1e-6, impl=impl)
        assert_close("rms_norm", got, rms_fp64(x, weight, 1e-6))
        y, total = rms_norm(x, weight, eps=1e-6, residual=residual, impl=impl)
        assert torch.equal(total, x + residual)
        assert_close("rms_norm", y, rms_fp64(total, weight, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("impl", IMPLS)
def test_layer_norm_matches_fp64(impl, dtype, device):
    """Guards the formula, and that gamma scales the update, not the residual."""
    for shape in SHAPES:
        x = draw(*shape, dtype=dtype, device=device, scale=3.0, offset=0.5)
        residual = draw(*shape, dtype=dtype, device=device, seed=1)
        weight, bias, gamma = (
            draw(shape[1], dtype=dtype, device=device, seed=i) for i in (2, 3, 4)
        )
        got = layer_norm(x, weight, bias, eps=1e-5, impl=impl)
        assert_close("layer_norm", got, layer_fp64(x, weight, bias, 1e-5))
        for scale in (gamma, None):
            y, total = layer_norm(
                x, weight, bias, eps=1e-5, residual=residual, gamma=scale, impl=impl
            )
            factor = 1.0 if scale is None else scale.double()
            assert_close("layer_norm", total, residual.double() + factor * x.double())
            assert_close("layer_norm", y, layer_fp64(total, weight, bias, 1e-5))


@pytest.mark.judge
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("impl", IMPLS)
def test_rms_norm_rounds_like_transformers(impl, dtype):
    """Guards the rounding before the weight: without it a quarter of the 16-bit values differ."""
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    x = draw(64, 512, dtype=dtype, scale=3.0)
    judge = Qwen3RMSNorm(512, eps=1e-6).to(dtype)
    judge.weight.data = draw(512, dtype=dtype, offset=1.0)
    with torch.no_grad():
        got = rms_norm(x, judge.weight, eps=1e-6, impl=impl)
        differing = (got != judge(x)).float().mean().item()
    assert differing < 0.01


@pytest.mark.parametrize("impl", IMPLS)
def test_layer_norm_matches_torch(impl):
    """Guards where eps is added and that the variance is the biased one; with channels of tiny
    variance both matter."""
    x = draw(9, 96, dtype=torch.float32, scale=1e-3)
    judge = torch.nn.LayerNorm(96, eps=1e-5)
    with torch.no_grad():
        judge.weight.copy_(draw(96, dtype=torch.float32))
        judge.bias.copy_(draw(96, dtype=torch.float32, seed=1))
        got = layer_norm(x, judge.weight, judge.bias, eps=1e-5, impl=impl)
        assert_close("layer_norm", got, judge.double()(x.double()))


@pytest.mark.parametrize("impl", IMPLS)
def test_large_values_do_not_overflow(impl):
    """Guards fp32 statistics: the squares of these fp16 values overflow fp16."""
    x = draw(4, 64, dtype=torch.float16, scale=1e4)
    one, zero = torch.ones(64, dtype=torch.float16), torch.zeros(64, dtype=torch.float16)
    assert_close("rms_norm", rms_norm(x, one, eps=1e-6, impl=impl), rms_fp64(x, one, 1e-6))
    got = layer_norm(x, one, zero, eps=1e-5, impl=impl)
    assert_close("layer_norm", got, layer_fp64(x, one, zero, 1e-5))


@pytest.mark.parametrize("impl", IMPLS)
def test_inputs_are_unchanged_and_rows_are_independent(impl):
    """Guards against writes into inputs, dependence on the row's index, and assumed strides."""
    x, residual = (draw(11, 96, dtype=torch.float32, seed=i) for i in (0, 1))
    weight, bias = (draw(96, dtype=torch.float32, seed=i) for i in (2, 3))
    inputs = (x, residual, weight, bias)
    before = [tensor.clone() for tensor in inputs]

    def run(rows, added):
        return [
            *rms_norm(rows, weight, eps=1e-6, residual=added, impl=impl),
            *layer_norm(rows, weight, bias, eps=1e-5, residual=added, gamma=weight, impl=impl),
        ]

    whole = torch.stack(run(x, residual))
    alone = [torch.cat(run(x[i : i + 1], residual[i : i + 1])) for i in range(11)]
    assert torch.equal(whole, torch.stack(alone, dim=1))
    transposed = torch.stack(run(x.t().contiguous().t(), residual.repeat(1, 2)[:, :96]))
    assert torch.allclose(whole, transposed, rtol=0, atol=2e-6)
    assert all(map(torch.equal, before, inputs))


def test_bad_arguments_are_named():
    """Guards the launchers' checks: each mistake raises a ValueError that names the argument."""
    x, weight = torch.zeros(3, 8), torch.zeros(8)
    cases = [
        ("x must be", lambda: rms_norm(x[0], weight, eps=1e-6)),
        ("x must be", lambda: rms_norm(x.long(), weight, eps=1e-6)),
        ("x must be", lambda: rms_norm(x[:, :0], weight[:0], eps=1e-6)),
        ("weight must be", lambda: rms_norm(x, weight[:4], eps=1e-6)),
        ("weight must be", lambda: rms_norm(x, weight.bfloat16(), eps=1e-6)),
        ("weight must be", lambda: rms_norm(x, weight.to("meta"), eps=1e-6)),
        ("residual must be", lambda: rms_norm(x, weight, eps=1e-6, residual=x[:2])),
        ("bias must be", lambda: layer_norm(x, weight, weight[:1], eps=1e-6)),
        ("residual must be", lambda: layer_norm(x, weight, weight, eps=1e-6, residual=x[:, :4])),
        ("gamma", lambda: layer_norm(x, weight, weight, eps=1e-6, gamma=weight)),
        (
            "gamma must be",
            lambda: layer_norm(x, weight, weight, eps=1e-6, residual=x, gamma=x),
        ),
        ("choose one of", lambda: layer_norm(x, weight, weight, eps=1e-6, impl="fast")),
    ]
    for message, call in cases:
        with pytest.raises(ValueError, match=message):
            call()
