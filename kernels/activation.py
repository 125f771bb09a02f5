"""The activations between the matrix products of feed-forward blocks: silu_mul and quick_gelu.

    silu_mul: silu(gate) * up, silu(g) = g / (1 + e^-g)        quick_gelu: x / (1 + e^(-1.702 x))

Each reads and writes every element once: in 16 bits, 6 bytes per result element for silu_mul and 4
for quick_gelu.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.runtime.arithmetic import cdiv
from kernels.runtime.configs import Gpu, KernelConfig, Tunable
from kernels.runtime.dispatch import check, operators, pick
from kernels.runtime.dtypes import DTYPES


def silu_mul(gate_up: Tensor, *, interleaved: bool = False, impl: str | None = None) -> Tensor:
    """silu(gate) * up, where silu(g) = g * sigmoid(g).

    gate_up: [T, 2F], the halves [gate | up], or if `interleaved` the pairs gate 0, up 0, gate 1,
    up 1 and so on. Returns [T, F] of the same dtype. silu(gate) is computed in fp32 and rounded to
    that dtype before the product, as in transformers' Qwen3MLP. Raises ValueError for other shapes
    and dtypes.
    """
    if torch.compiler.is_compiling():
        return operators().silu_mul(gate_up, interleaved, impl)
    _check_rows("silu_mul", "gate_up", gate_up)
    if gate_up.shape[1] % 2:
        raise ValueError(
            f"silu_mul: gate_up must be [T, 2F] with gate and up of equal width,"
            f" not {list(gate_up.shape)}"
        )
    return pick("silu_mul", impl, gate_up.device, _SILU_MUL)(gate_up, interleaved)


def quick_gelu(x: Tensor, *, impl: str | None = None) -> Tensor:
    """x * sigmoid(1.702 x), computed in fp32 and rounded once.

    x: [T, F]; returns [T, F] of the same dtype. Raises ValueError for other shapes and dtypes.
    """
    if torch.compiler.is_compiling():
        return operators().quick_gelu(x, impl)
    _check_rows("quick_gelu", "x", x)
    return pick("quick_gelu", impl, x.device, _QUICK_GELU)(x)


def gate_and_up(gate_up: Tensor, interleaved: bool, axis: int = 1) -> tuple[Tensor, Tensor]:
    """Views of gate and up, which are halves or pairs along `axis`.

    axis: 1 for activations, 0 for the weights that produce them
    """
    if interleaved:
        pairs = gate_up.shape[axis] // 2
        gate, up = gate_up.unflatten(axis, (pairs, 2)).unbind(axis + 1)
    else:
        gate, up = gate_up.chunk(2, axis)
    return gate, up


def silu_mul_ref(gate_up: Tensor, interleaved: bool = False) -> Tensor:
    """The definition of `silu_mul`."""
    gate, up = gate_and_up(gate_up, interleaved)
    wide = gate.float()
    return (wide * torch.sigmoid(wide)).to(gate.dtype) * up


def quick_gelu_ref(x: Tensor) -> Tensor:
    """The definition of `quick_gelu`."""
    wide = x.float()
    return (wide * torch.sigmoid(1.702 * wide)).to(x.dtype)


def _silu_mul_portable(gate_up: Tensor, interleaved: bool) -> Tensor:
    gate, up = gate_and_up(gate_up, interleaved)
    return F.silu(gate).mul_(up)


def _quick_gelu_portable(x: Tensor) -> Tensor:
    # In place: on a CPU, large fresh buffers cost more than the arithmetic.
    return (x.float() * 1.702).sigmoid_().mul_(x).to(x.dtype)


@triton.jit
def silu_mul_kernel(
    gate_up: tl.tensor,
    y: tl.tensor,
    width: tl.tensor,
    row_stride: tl.tensor,
    INTERLEAVED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """BLOCK columns of one row."""
    blocks = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    first = tl.program_id(0) % blocks * BLOCK
    column = first + tl.arange(0, BLOCK)
    mask = column < width
    gate_up += row * row_stride
    if INTERLEAVED:
        both = 2 * first + tl.arange(0, 2 * BLOCK)
        pairs = tl.load(gate_up + both, mask=both < 2 * width)
        gate, up = tl.split(tl.reshape(pairs, [BLOCK, 2]))
        # A thread's 16 bytes of pairs become 8 bytes of results, which it stores itself. Stores of
        # 16 bytes would exchange results between threads through shared memory.
        column = tl.max_contiguous(column, 64 // gate_up.dtype.element_ty.primitive_bitwidth)
    else:
        gate = tl.load(gate_up + column, mask=mask)
        up = tl.load(gate_up + width + column, mask=mask)
    gate = gate.to(tl.float32)
    tl.store(y + row * width + column, (gate * tl.sigmoid(gate)).to(up.dtype) * up, mask=mask)


@triton.jit
def quick_gelu_kernel(
    x: tl.tensor,
    y: tl.tensor,
    width: tl.tensor,
    row_stride: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """BLOCK columns of one row."""
    blocks = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    wide = tl.load(x + row * row_stride + column, mask=mask).to(tl.float32)
    gelu = wide * tl.sigmoid(1.702 * wide)
    tl.store(y + row * width + column, gelu.to(y.dtype.element_ty), mask=mask)


def _silu_mul_triton(gate_up: Tensor, interleaved: bool) -> Tensor:
    y = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
    return _launch("silu_mul", "gate_up", silu_mul_kernel, gate_up, y, INTERLEAVED=interleaved)


def _quick_gelu_triton(x: Tensor) -> Tensor:
    return _launch("quick_gelu", "x", quick_gelu_kernel, x, x.new_empty(x.shape))


def _launch(
    op: str, name: str, kernel: triton.JITFunction, x: Tensor, y: Tensor, **options: bool
) -> Tensor:
    check(x.stride(1) == 1, f"{op}: {name} must have neighbouring columns (stride 1)")
    rows, width = y.shape
    if y.numel() == 0:
        return y
    bucket = triton.next_power_of_2(rows)
    key = f"{f'T<={bucket}' if bucket <= 64 else 'T>64'} F{width}"
    config = TUNABLE[op].choose(key, x.device, rows, width)
    kernel[(rows * cdiv(width, config["block"]),)](
        x,
        y,
        width=width,
        row_stride=x.stride(0),
        BLOCK=config["block"],
        num_warps=config["num_warps"],
        **options,
    )
    return y


def _rule(gpu: Gpu, rows: int, width: int) -> KernelConfig:
    """Columns per CTA, and warps: two loads of 16 bytes per thread and operand, at least 32 KiB on
    an SM full of warps; one load if two would leave SMs without work."""
    block = 2048
    while block > 256 and rows * cdiv(width, block) < 2 * gpu.sms:
        block //= 2
    return {"block": block, "num_warps": 4 if block > 512 else block // 256}


def _candidates(key: str, gpu: Gpu) -> list[KernelConfig]:
    shapes = ((256, 1), (512, 1), (512, 2), (1024, 2), (1024, 4), (2048, 4), (2048, 8), (4096, 8))
    return [{"block": block, "num_warps": warps} for block, warps in shapes]


TUNABLE = {op: Tunable(op, _rule, _candidates) for op in ("silu_mul", "quick_gelu")}
_SILU_MUL = {"eager": silu_mul_ref, "portable": _silu_mul_portable, "triton": _silu_mul_triton}
_QUICK_GELU = {
    "eager": quick_gelu_ref,
    "portable": _quick_gelu_portable,
    "triton": _quick_gelu_triton,
}


def _check_rows(op: str, name: str, x: Tensor) -> None:
    if x.dim() != 2:
        raise ValueError(f"{op}: {name} must have two axes, not shape {list(x.shape)}")
    if x.dtype not in DTYPES:
        raise ValueError(f"{op}: {name} must be fp32, bf16 or fp16, not {x.dtype}")
