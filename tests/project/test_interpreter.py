"""Tests of the corrected Triton interpreter: bf16 against PyTorch's on the CPU, bit by bit."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from tests.support.interpreter import CORRECTED, MOVES

pytestmark = pytest.mark.usefixtures("interpreter")

ALL = 1 << 16  # patterns of bf16
BF16 = torch.bfloat16
# 2^-126 and its neighbours, the largest and smallest numbers, ties of sums and products, NaN.
EDGES = [0x0000, 0x0001, 0x007F, 0x0080, 0x0081, 0x3F80, 0x3F81, 0x3FFF, 0x4049, 0x7F7F, 0x7F80]
EDGES += [0x7F81, 0x7FC0, 0x7FFF, 0x1A35, 0x2B7E]


def every_bf16() -> Tensor:
    return torch.arange(ALL, dtype=torch.int32).to(torch.int16).view(BF16)


def pairs() -> list[Tensor]:
    """Random patterns, then numbers of similar size, then all pairs of edge cases."""
    some = torch.randint(-(1 << 15), 1 << 15, (2, ALL // 2)).to(torch.int16).view(BF16)
    near = torch.randn(2, ALL // 2 - 1024).to(BF16)
    bits = torch.tensor([sign | bits for sign in (0, 1 << 15) for bits in EDGES])
    edges = bits.to(torch.int16).view(BF16)
    crossed = torch.cartesian_prod(torch.arange(32), torch.arange(32)).T
    return list(torch.cat((some, near, edges[crossed]), 1))


def same_bits(result: Tensor, expected: Tensor) -> bool:
    """Whether there is NaN (of any bits) where it is expected, and equal bits elsewhere: -0 is not
    0."""
    if result.dtype != expected.dtype or result.shape != expected.shape:
        return False
    nan = expected.isnan()
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[result.element_size()]
    bits = (x.masked_fill(nan, 0).view(integers) for x in (result, expected))
    return torch.equal(result.isnan(), nan) and torch.equal(*bits)


@triton.jit
def convert_kernel(x, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, tl.load(x + at).to(out.dtype.element_ty))


def converted(x: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty_like(x, dtype=dtype)
    convert_kernel[(1,)](x, out, x.numel())
    return out


def test_bf16_from_fp32():
    """Guards rounding: every upper half, with lower halves 0, below, at and above a tie, and all
    ones."""
    lower = torch.tensor([0, 1, 0x1234, 0x7FFF, 0x8000, 0x8001, 0xEDCB, 0xFFFF])
    x = ((torch.arange(ALL)[:, None] << 16) | lower).to(torch.int32).view(torch.float32).flatten()
    assert same_bits(converted(x, BF16), x.to(BF16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_bf16_to_other_floats(dtype: torch.dtype):
    x = every_bf16()
    assert same_bits(converted(x, dtype), x.to(dtype))


def test_bf16_from_fp16_and_integers():
    """Guards rounding from fp16, whose mantissa is longer, and from integers through fp32, as on a
    GPU."""
    half = torch.arange(ALL, dtype=torch.int32).to(torch.int16).view(torch.float16)
    assert same_bits(converted(half, BF16), half.to(BF16))
    whole = torch.randint(-(1 << 31), 1 << 31, (1 << 12,)) >> torch.randint(32, (1 << 12,))
    for dtype in (torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool):
        assert same_bits(converted(whole.to(dtype), BF16), whole.to(dtype).to(BF16))


def test_bf16_to_integers():
    x = (torch.randn(1 << 12) * 300).to(BF16)
    assert torch.equal(converted(x, torch.int32), x.int())
    assert torch.equal(converted(x / 256, torch.bool), x != 0)


@triton.jit
def arithmetic_kernel(x, y, out, N: tl.constexpr):
    at = tl.arange(0, N)
    a, b = tl.load(x + at), tl.load(y + at)
    tl.store(out + at, a + b)
    tl.store(out + N + at, a - b)
    tl.store(out + 2 * N + at, a * b)
    tl.store(out + 3 * N + at, tl.abs(a))
    tl.store(out + 4 * N + at, a * 1.7 + 1)
    tl.store(out + 5 * N + at, (a / b).to(a.dtype))


def test_bf16_arithmetic():
    """Guards against double rounding, also of subnormal numbers and overflow."""
    a, b = pairs()
    out = torch.empty(6, ALL, dtype=BF16)
    arithmetic_kernel[(1,)](a, b, out, ALL)
    factor = torch.tensor(1.7, dtype=BF16)
    expected = [a + b, a - b, a * b, a.abs(), a * factor + 1, a / b]
    for result, rounded in zip(out, expected, strict=True):
        assert same_bits(result, rounded)


@triton.jit
def negation_kernel(x, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, -tl.load(x + at))


def test_bf16_negation():
    """Guards negation; some versions of Triton compute 0 - x, so the sign of zero may differ."""
    x = every_bf16()
    out = torch.empty_like(x)
    negation_kernel[(1,)](x, out, ALL)
    assert same_bits(out + 0.0, -x + 0.0)


@triton.jit
def comparison_kernel(x, y, flags, selected, N: tl.constexpr):
    at = tl.arange(0, N)
    a, b = tl.load(x + at), tl.load(y + at)
    tl.store(flags + at, a < b)
    tl.store(flags + N + at, a <= b)
    tl.store(flags + 2 * N + at, a > b)
    tl.store(flags + 3 * N + at, a >= b)
    tl.store(flags + 4 * N + at, a == b)
    tl.store(flags + 5 * N + at, a != b)
    tl.store(flags + 6 * N + at, (a < b) & (b > 0))
    tl.store(selected + at, tl.where(a < b, a, b))
    tl.store(selected + N + at, (a < b).to(a.dtype))


def test_bf16_comparisons():
    """Guards against comparing bits instead of numbers: -1 would exceed 1, and NaN equal itself."""
    a, b = pairs()
    flags, selected = torch.empty(7, ALL, dtype=torch.bool), torch.empty(2, ALL, dtype=BF16)
    comparison_kernel[(1,)](a, b, flags, selected, ALL)
    expected = [a < b, a <= b, a > b, a >= b, a == b, a != b, (a < b) & (b > 0)]
    assert torch.equal(flags, torch.stack(expected))
    assert same_bits(selected, torch.stack((torch.where(a < b, a, b), (a < b).to(BF16))))


@triton.jit
def dot_kernel(a, b, c, out, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at).T, tl.load(c + at)))


def test_bf16_dot():
    """Guards products of bf16, summed in fp32 onto an accumulator."""
    a, b = torch.randn(2, 64, 64).to(BF16)
    c, out = torch.randn(64, 64), torch.empty(64, 64)
    dot_kernel[(1,)](a, b, c, out, 64)
    torch.testing.assert_close(out.double(), a.double() @ b.double().T + c, rtol=0, atol=2e-5)


@triton.jit
def promoted_kernel(x, out, HOW: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, N)
    a = tl.load(x + at)
    if HOW == "sort":
        result = tl.sort(a)
    elif HOW == "max":
        result = tl.max(a, 0)
    elif HOW == "cumsum":
        result = tl.cumsum(a, 0)
    elif HOW == "maximum":
        result = tl.maximum(a, 0.5)
    elif HOW == "clamp":
        result = tl.clamp(a, -0.5, 0.5)
    tl.store(out + at, result)


@pytest.mark.parametrize("how", ["sort", "max", "cumsum", "maximum", "clamp"])
def test_bf16_that_triton_may_promote(how: str):
    """Guards operations that some versions of Triton first convert to fp32, and that others must
    refuse."""
    x, out = torch.randn(64).to(BF16), torch.empty(64)
    expected = {
        "sort": x.sort().values,
        "max": x.max().expand(64),
        "cumsum": x.float().cumsum(0),
        "maximum": x.clamp_min(0.5),
        "clamp": x.clamp(-0.5, 0.5),
    }
    try:
        promoted_kernel[(1,)](x, out, how, 64)
    except InterpreterError as error:
        assert "of bf16 would be wrong" in str(error) and how != "sort"
    else:
        torch.testing.assert_close(out, expected[how].float(), rtol=1e-6, atol=1e-6)


@triton.jit
def movement_kernel(x, out, few, N: tl.constexpr):
    at = tl.arange(0, N)
    square = at[:, None] * N + at
    tile = tl.load(x + square)
    one, other = tl.split(tl.reshape(tile, (N, N // 2, 2)))
    joined = tl.reshape(tl.join(other, one), (N, N))
    tl.store(out + square, tl.trans(joined))
    spread = tl.broadcast_to(tl.load(x + at)[:, None], (N, N))
    tl.store(out + N * N + square, spread)
    padded = tl.load(x + square, mask=at < few, other=-1.5)
    tl.store(out + 2 * N * N + square, padded)
    tl.store(out + 3 * N * N + square, tl.full((N, N), 0.7, x.dtype.element_ty))
    bits = tile.to(tl.uint16, bitcast=True) ^ 0x8000
    tl.store(out + 4 * N * N + square, bits.to(x.dtype.element_ty, bitcast=True))
    copy = tl.make_tensor_descriptor(x, [few, N], [N, 1], [N, N])
    target = tl.make_tensor_descriptor(out + 5 * N * N, [N, N], [N, 1], [N, N])
    target.store([0, 0], copy.load([0, 0]))


def test_bf16_movement():
    """Guards against changed bits in shapes, masks, constants and tensor descriptors."""
    x = every_bf16()[0x3F00:0x4000].view(16, 16)
    out = torch.empty(6, 16, 16, dtype=BF16)
    movement_kernel[(1,)](x, out, 5, 16)
    columns, rows = (torch.arange(16) < 5), torch.arange(16)[:, None] < 5
    expected = [
        x.view(16, 8, 2).flip(2).reshape(16, 16).T,
        x[0][:, None].expand(16, 16),
        x.where(columns, -1.5),
        torch.full((16, 16), 0.7, dtype=BF16),
        -x,
        x.where(rows, 0),
    ]
    assert same_bits(out, torch.stack(expected))


@triton.jit
def add(a, b):
    return a + b


@triton.jit
def refused_kernel(x, wide, HOW: tl.constexpr):
    at = tl.arange(0, 16)
    a = tl.load(x + at)
    if HOW == "sum":
        tl.store(wide, tl.sum(a, 0))
    elif HOW == "reduce":
        tl.store(wide, tl.reduce(a, 0, add))
    elif HOW == "scan":
        tl.store(wide + at, tl.associative_scan(a, 0, add))
    elif HOW == "fma":
        tl.store(wide + at, tl.fma(a, a, a))
    elif HOW == "round to zero":
        tl.store(x + at, tl.load(wide + at).to(tl.bfloat16, fp_downcast_rounding="rtz"))
    elif HOW == "fp64":
        tl.store(x + at, tl.load(wide + at).to(tl.float64).to(tl.bfloat16))
    elif HOW == "to fp8":
        tl.store(wide + at, a.to(tl.float8e4nv).to(tl.float32))
    elif HOW == "from fp8":
        tl.store(x + at, tl.load(wide + at).to(tl.float8e4nv).to(tl.bfloat16))
    elif HOW == "atomic":
        tl.atomic_add(x + at, a)
    elif HOW == "print":
        tl.device_print("a", a)
    elif HOW == "NaN beyond the end":
        tile = tl.make_tensor_descriptor(x, [9], [1], [16], padding_option="nan")
        tl.store(wide + at, tile.load([0]).to(tl.float32))


REFUSED = ["sum", "reduce", "scan", "fma", "round to zero", "fp64", "to fp8", "from fp8", "atomic"]


@pytest.mark.parametrize("how", [*REFUSED, "print", "NaN beyond the end"])
def test_bf16_is_refused(how: str):
    """Guards against silently wrong results: these operations raise an error."""
    x, wide = torch.ones(16, dtype=BF16), torch.ones(16)
    with pytest.raises(InterpreterError, match="of bf16 would be wrong"):
        refused_kernel[(1,)](x, wide, how)


def test_bf16_is_refused_by_all_other_operations():
    """Guards against operations of this version of Triton that are neither known to move bits nor
    corrected."""
    handle = TensorHandle(np.zeros(4, np.uint16), tl.bfloat16)
    names = [name for name in vars(InterpreterBuilder) if name.startswith("create_")]
    rest = [name for name in names if name.removeprefix("create_") not in CORRECTED.keys() | MOVES]
    assert len(rest) > 50
    for name in [*rest, "get_all_ones_value"]:
        for args in ([handle], [None, handle], [[handle]], [None, tl.bfloat16]):
            with pytest.raises(NotImplementedError, match=name.removeprefix("create_")):
                getattr(InterpreterBuilder(), name)(*args)


def test_bf16_with_another_type_is_refused():
    """Guards against using the bits of one operand as numbers (handles that Triton never makes)."""
    half = TensorHandle(np.zeros((4, 4), np.uint16), tl.bfloat16)
    wide = TensorHandle(np.zeros((4, 4), np.float32), tl.float32)
    builder = InterpreterBuilder()
    calls = [
        lambda: builder.create_fadd(half, wide),
        lambda: builder.create_fcmpOLT(wide, half),
        lambda: builder.create_dot(half, wide, wide, None, 0),
        lambda: builder.create_dot(half, half, half, None, 0),
        lambda: builder.create_fp_ext(half, tl.float64),
        lambda: builder.create_fma(x=half, y=half, z=half),
    ]
    for call in calls:
        with pytest.raises(NotImplementedError, match="of bf16 would be wrong"):
            call()


@triton.jit
def condition_kernel(x, out):
    if tl.load(x):
        tl.store(out, 1)


@pytest.mark.parametrize(("x", "holds"), [(-0.0, 0), (0.0, 0), (1e-40, 1), (torch.nan, 1)])
def test_bf16_condition(x: float, holds: int):
    """Guards conditions: a number is true unless it is 0 or -0."""
    out = torch.zeros(1, dtype=torch.int32)
    condition_kernel[(1,)](torch.tensor([x], dtype=BF16), out)
    assert out.item() == holds


@triton.jit
def loop_kernel(out, bound):
    for i in range(0, bound, 2):
        tl.store(out + i, i)


def test_loops_to_a_bound_of_the_launch():
    """Guards loops to a kernel argument: Triton 3.6's interpreter fails there with NumPy >= 2.4."""
    out = torch.full((5,), -1)
    loop_kernel[(1,)](out, 5)
    assert out.tolist() == [0, -1, 2, -1, 4]


@triton.jit
def mask_kernel(x, out, bound):
    row = tl.load(x).to(tl.int64)
    mask = (tl.arange(0, 4) < bound) & (row >= 0)
    assert mask.handle.data.dtype == bool, mask.handle.data.dtype  # Triton 3.9 needs bool
    tl.store(out + tl.arange(0, 4), 1, mask=mask)


def test_a_condition_that_becomes_a_block_stays_one():
    """Guards masks with a scalar part, for any dtype of its operands."""
    for row, bound, expected in ((0, 2, [1, 1, 0, 0]), (-1, 4, [0, 0, 0, 0])):
        out = torch.zeros(4, dtype=torch.int32)
        mask_kernel[(1,)](torch.tensor([row], dtype=torch.int32), out, bound)
        assert out.tolist() == expected
