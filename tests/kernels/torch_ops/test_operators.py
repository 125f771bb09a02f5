"""Every op as an operator of PyTorch: its registration, and its results next to a direct call."""

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

from kernels import torch_ops
from kernels.prefix_attention import prefix_attention
from kernels.qk_norm_rope import qk_norm_rope
from tests.kernels.torch_ops.operator_calls import (
    TRITON_ONLY,
    calls,
    copied,
    direct,
    impls,
    operator,
    tree,
)

CALLS = calls()
INTERPRETED = pytest.mark.interpreter


def named(*impls: str | None, triton: Iterable[str] = TRITON_ONLY) -> pytest.MarkDecorator:
    """These forms of every operator that has them, and Triton's of those in `triton`."""
    pairs = [(name, impl) for name in CALLS if name not in TRITON_ONLY for impl in impls]
    triton = [pytest.param(name, "triton", marks=INTERPRETED) for name in triton]
    return pytest.mark.parametrize(("name", "impl"), pairs + triton)


def test_every_operator_is_tested():
    """Guards against an operator that no test here sees."""
    assert set(torch_ops.names()) == CALLS.keys()


@named("eager", "portable", triton=CALLS)
def test_opcheck(name: str, impl: str):
    """Guards the declared schema and mutations, and the fake form's shapes, dtypes and strides; in
    PyTorch's forms also tracing with dynamic shapes, which is the same for all."""
    tests = ["test_schema", "test_faketensor"]
    if impl != "triton":
        tests.append("test_aot_dispatch_dynamic")
    with torch.no_grad():
        op, arguments = operator(name).default, copied(CALLS[name])
        torch.library.opcheck(op, arguments, impls(name, impl), test_utils=tests)


@named(None, "eager")
@torch.inference_mode()
def test_same_as_the_direct_call(name: str, impl: str | None):
    """Guards the order of arguments: results and what is written in place have the same bits."""
    ours, theirs = copied(CALLS[name]), copied(CALLS[name])
    operator(name)(*ours, **impls(name, impl))
    direct(name, theirs, impl)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)  # in place
    ours, theirs = copied(CALLS[name]), copied(CALLS[name])
    got, expected = operator(name)(*ours, **impls(name, impl)), direct(name, theirs, impl)
    if got is not None:  # what is not in place
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("impl", ["eager", "portable"])
def test_results_are_contiguous(impl: str):
    """Guards results of inputs that are dense but transposed: the compiler relies on the fake
    form's strides."""
    x, residual = torch.randn(32, 5).T, torch.randn(32, 5).T
    row, q = torch.randn(32), CALLS["prefix_attention"][0]
    for name, arguments in {
        "rms_norm": (x, row, 1e-6),
        "add_rms_norm": (x, residual, row, 1e-6),
        "add_layer_norm": (x, residual, row, row, row, 1e-6),
        "silu_mul": (x,),
        "quick_gelu": (x,),
        "prefix_attention": (q.transpose(0, 1).contiguous().transpose(0, 1),)
        + CALLS["prefix_attention"][1:],
    }.items():
        with torch.no_grad():
            torch.library.opcheck(operator(name).default, arguments, impls(name, impl))


@torch.inference_mode()
def test_fp8_pages():
    """Guards the scales of FP8 pages: opcheck cannot compare e4m3 values."""
    ours, theirs = tree(fp8=True), tree(fp8=True)
    _, *rotated = CALLS["qk_norm_rope"][:6]
    options = {"scale": 0.25, "impl": "portable"}
    torch.ops.pacore.qk_norm_rope(ours.qkv, *rotated, *ours.pages, impl="portable")
    qk_norm_rope(theirs.qkv, *rotated, theirs.pages, impl="portable")
    for a, b in zip(ours.pages.as_bytes(), theirs.pages.as_bytes(), strict=True):
        assert torch.equal(a, b)
    q = CALLS["prefix_attention"][0]
    got, _ = torch.ops.pacore.prefix_attention(q, *ours.pages, ours.plan.tensors, **options)
    assert torch.equal(got, prefix_attention(q, theirs.pages, theirs.plan, **options))


@named("eager", "portable")
def test_gradients_are_refused(name: str, impl: str):
    """Guards against results that are silently constants, in direct calls and operators."""
    arguments = copied(CALLS[name])
    floats = [x for x in flattened(arguments) if x.is_floating_point()]
    for x in floats[-2:] if name == "projector_into" else floats:
        x.requires_grad_()
        with pytest.raises(ValueError, match="has no backward, but an input .* requires grad"):
            direct(name, arguments, impl)
        with pytest.raises(ValueError, match="has no backward, but an input .* requires grad"):
            operator(name)(*arguments, **impls(name, impl))
        x.requires_grad_(False)
    floats[0].requires_grad_()
    with torch.no_grad():
        direct(name, arguments, impl)


def flattened(arguments: Iterable[object]) -> list[Tensor]:
    nested = (x if isinstance(x, list | tuple) else (x,) for x in arguments)
    return [x for each in nested for x in each if isinstance(x, Tensor)]
