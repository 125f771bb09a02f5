"""Ops on batches of more than 2^31 elements, of which only the last row exists.

Of a large grid only the last program runs, in Triton's interpreter. The same op on the last row
alone is the judge.
"""

import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter as triton_interpreter

from kernels.activation import quick_gelu, silu_mul
from kernels.kv_pages import KVPages
from kernels.norm import layer_norm, rms_norm
from kernels.plan_node import PlanNode
from kernels.prefix_attention import prefix_attention
from kernels.prefix_plan import PrefixPlan
from kernels.qk_norm_rope import qk_norm_rope
from kernels.runtime.configs import Gpu, assume_gpu, use_config
from kernels.sampling import sample
from tests.kernels.limits.reserved import reserved

LARGE = 1000  # programs, from which only the last runs
HALF = torch.float16


@pytest.fixture(autouse=True)
def last_program(interpreter, monkeypatch):
    def last_of_many(*bounds: int) -> range:
        return range(bounds[0] - 1, bounds[0]) if bounds[0] > LARGE else range(*bounds)

    monkeypatch.setattr(triton_interpreter, "range", last_of_many, raising=False)


def rows_of(width: int, dtype: torch.dtype = HALF) -> Tensor:
    """[T, width] with 2^31 elements before the last row, which is random."""
    x = reserved((2**31 // width + 1, width), dtype)
    x[-1] = torch.randn(width)
    return x


@pytest.mark.parametrize("norm", ["rms_norm", "layer_norm"])
def test_norm(norm):
    """Guards offsets of rows in x, residual, result and sum."""
    x, residual, weight = rows_of(16384), rows_of(16384), torch.randn(16384).to(HALF)

    def run(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        options = {"eps": 1e-6, "residual": residual, "impl": "triton"}
        if norm == "rms_norm":
            return rms_norm(x, weight, **options)
        return layer_norm(x, weight, weight, **options)

    for large, expected in zip(run(x, residual), run(x[-1:], residual[-1:]), strict=True):
        assert torch.equal(large[-1], expected[0])


@pytest.mark.parametrize("op", [silu_mul, quick_gelu])
def test_activation(op):
    """Guards offsets of rows in both tensors."""
    x = rows_of(8192)
    with use_config(op.__name__, block=1024, num_warps=4):
        large, expected = op(x, impl="triton"), op(x[-1:], impl="triton")
    assert torch.equal(large[-1, -1024:], expected[0, -1024:])  # those of the last program


def test_projection():
    """Guards offsets of tokens in the QKV projection; the last program stores V."""
    dim, heads = 256, 128
    qkv = rows_of(heads * dim)

    def run(qkv: Tensor) -> Tensor:
        k, v = torch.zeros(2, 1, 1, 16, dim, dtype=HALF)
        slots = torch.full((len(qkv),), 5)
        qk_norm_rope(
            qkv,
            None,
            None,
            torch.zeros(dim // 2, dtype=int),
            slots,
            slots,
            KVPages(k, v),
            impl="triton",
        )
        return v

    assert torch.equal(run(qkv), run(qkv[-1:])) and run(qkv).any()


def test_attention():
    """Guards offsets of rows in Q, in the result, in the partials' merge and in its log-sum-exp."""
    dim, heads, rows = 256, 16, 2**19 + 1
    q = rows_of(heads * dim).view(rows, heads, dim)
    pages = KVPages(*torch.randn(2, 4, 1, 16, dim).to(HALF))

    def run(q: Tensor) -> tuple[Tensor, Tensor]:
        last = len(q) - 1
        nodes = [PlanNode([2, 0], 21, last, last + 1), PlanNode([1], 7, last, last + 1, 1)]
        plan = PrefixPlan.build(nodes, num_rows=len(q), num_pages=4, page_size=16)
        return prefix_attention(q, pages, plan, scale=0.1, return_lse=True, impl="triton")

    gpu = Gpu("toy", arch=90, sms=2, shared_bytes=227 * 1024)
    with assume_gpu(gpu), use_config("prefix_attention", programs=1, grain=16):
        large, expected = run(q), run(q[-1:])
    for x, y in zip(large, expected, strict=True):
        assert torch.equal(x[-1], y[0])


@pytest.mark.parametrize("top_p", [1.0, 0.5])
def test_sample(top_p):
    """Guards offsets of rows in logits; each row is one block."""
    logits = rows_of(4096, torch.float32)
    seeds, positions = torch.arange(len(logits)), torch.arange(len(logits))
    options = {"temperature": 0.7, "top_p": top_p, "impl": "triton"}
    for x, y in zip(
        sample(logits, seeds, positions, **options),
        sample(logits[-1:], seeds[-1:], positions[-1:], **options),
        strict=True,
    ):
        assert torch.equal(x[-1], y[0])
