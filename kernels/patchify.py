"""Patches of image views as rows of one matrix, the input of the patch embedding.

A view is cut into squares of `size` x `size` pixels, row by row, and a square becomes the row
[channel, y, x], as the weight of a convolution has it. Rows are padded with zeros to a multiple of
8 values, so that in 16 bits each starts at a multiple of 16 bytes, which the GPU's fast matrix
products need: 588 values of 14 x 14 pixels become 592.

Views are bytes as a decoder gives them, or numbers. A byte is looked up in a table of its 256
values, so whatever normalises pixels rounds the same in every form and on every device.

The Triton form reads each view once and writes each row once, in one launch per view. A product
that reads pixels itself would save writing and reading the rows, 25 MB for an image of 1280 x 720
pixels: about 6 us of the 80 ms that the tower takes for it, by arithmetic. It is not built.

block       values per CTA
num_warps
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.runtime.arithmetic import INT32_END, cdiv
from kernels.runtime.configs import Gpu, KernelConfig, Tunable
from kernels.runtime.dispatch import check, operators, pick
from kernels.runtime.dtypes import DTYPES


def patchify(
    views: Sequence[Tensor], table: Tensor, *, size: int, impl: str | None = None
) -> Tensor:
    """Patches of all views, in order, row-major within a view: [T, row_width(size)].

    views: each uint8 [height, width, 3], or fp32, bf16 or fp16 [3, height, width]
    table: [3, 256], the value of each byte in each channel, in the dtype of the result
    size: side of a patch, which divides all heights and widths
    Raises ValueError for shapes, dtypes or devices that do not fit.
    """
    if torch.compiler.is_compiling():
        return operators().patchify(views, table, size, impl)
    check(size > 0, f"size must be 1 or more, not {size}")
    check(table.dtype in DTYPES, f"table must be fp32, bf16 or fp16, not {table.dtype}")
    check(table.shape == (3, 256), f"table must be [3, 256], not {list(table.shape)}")
    for i, view in enumerate(views):
        check(view.device == table.device, f"view {i} must be on {table.device} like table")
        pixels = channels_first(view, i)
        _, height, width = pixels.shape
        check(
            height % size == width % size == 0,
            f"view {i} has {height} x {width} pixels; sides must be multiples of {size}",
        )
        sides = zip(pixels.shape, pixels.stride(), strict=True)
        span = 1 + sum((n - 1) * stride for n, stride in sides)
        values = height * width // (size * size) * row_width(size)
        check(
            max(values, span) < INT32_END,
            f"view {i} of {height} x {width} pixels has {values} values in patches and spans {span}"
            " in memory; both must be under 2^31",
        )
    return pick("patchify", impl, table.device, _FORMS)(views, table, size)


def row_width(size: int) -> int:
    """Values per row: those of a patch, 3 * size * size, padded to a multiple of 8."""
    return cdiv(3 * size * size, 8) * 8


def channels_first(view: Tensor, index: int = 0) -> Tensor:
    """The view as [3, height, width], without a copy. Raises ValueError if it is none."""
    as_bytes = view.dtype == torch.uint8
    check(
        as_bytes or view.dtype in DTYPES,
        f"view {index} must be uint8, fp32, bf16 or fp16, not {view.dtype}",
    )
    axes = "[height, width, 3]" if as_bytes else "[3, height, width]"
    check(
        view.ndim == 3 and view.shape[2 if as_bytes else 0] == 3,
        f"view {index} has shape {list(view.shape)}; in {view.dtype} it must be {axes}",
    )
    return view.permute(2, 0, 1) if as_bytes else view


def patchify_ref(views: Sequence[Tensor], table: Tensor, size: int) -> Tensor:
    """The definition."""
    rows = [table.new_empty(0, 3 * size * size)]
    for view in views:
        pixels = channels_first(view)
        if view.dtype == torch.uint8:
            pixels = torch.stack([table[c][pixels[c].int()] for c in range(3)])
        patches = pixels.to(table.dtype).unflatten(2, (-1, size)).unflatten(1, (-1, size))
        rows.append(patches.permute(1, 3, 0, 2, 4).flatten(2).flatten(0, 1))
    return F.pad(torch.cat(rows), (0, row_width(size) - 3 * size * size))


def _portable(views: Sequence[Tensor], table: Tensor, size: int) -> Tensor:
    out, parts = _allocated(views, table, size)
    out[:, 3 * size * size :] = 0
    channels = 256 * torch.arange(3, dtype=torch.int32, device=table.device)[:, None]
    for view, part in zip(views, parts, strict=True):
        patches = channels_first(view).unflatten(2, (-1, size)).unflatten(1, (-1, size))
        patches = patches.permute(1, 3, 0, 2, 4)  # [rows, columns, 3, size, size]
        values = part[:, : 3 * size * size].view(patches.shape)
        if view.dtype == torch.uint8:
            indices = patches.reshape(-1, 3, size * size) + channels  # bytes move, not values
            patches = table.flatten().index_select(0, indices.flatten()).view(patches.shape)
        values.copy_(patches)
    return out


@triton.jit(
    do_not_specialize=["columns", "row_stride", "column_stride", "channel_stride"],
    do_not_specialize_on_alignment=["view"],
)
def patchify_kernel(
    view: tl.tensor,
    table: tl.tensor,
    out: tl.tensor,
    columns: tl.tensor,
    row_stride: tl.tensor,
    column_stride: tl.tensor,
    channel_stride: tl.tensor,
    count: tl.tensor,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """BLOCK of the `count` values of a view's rows, which are WIDTH wide, `columns` to a row of
    patches. Strides are the view's."""
    AREA: tl.constexpr = SIZE * SIZE
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    patch, value = index // WIDTH, index % WIDTH
    channel, pixel = value // AREA, value % AREA
    y = patch // columns * SIZE + pixel // SIZE
    x = patch % columns * SIZE + pixel % SIZE
    source = view + y * row_stride + x * column_stride + channel * channel_stride
    mask = (index < count) & (channel < 3)  # not the padding
    values = tl.load(source, mask=mask, other=0)
    if view.dtype.element_ty == tl.uint8:
        values = tl.load(table + channel * 256 + values, mask=mask, other=0)
    tl.store(out + index, values.to(out.dtype.element_ty), mask=index < count)


def _triton(views: Sequence[Tensor], table: Tensor, size: int) -> Tensor:
    out, parts = _allocated(views, table, size)
    table = table.contiguous()
    for view, part in zip(views, parts, strict=True):
        if not view.numel():
            continue
        pixels = channels_first(view)
        config = TUNABLE.choose(f"P{size}", view.device)
        patchify_kernel[(cdiv(part.numel(), config["block"]),)](
            view=view,
            table=table,
            out=part,
            columns=pixels.shape[2] // size,
            row_stride=pixels.stride(1),
            column_stride=pixels.stride(2),
            channel_stride=pixels.stride(0),
            count=part.numel(),
            SIZE=size,
            WIDTH=out.shape[1],
            BLOCK=config["block"],
            num_warps=config["num_warps"],
        )
    return out


def _allocated(views: Sequence[Tensor], table: Tensor, size: int) -> tuple[Tensor, list[Tensor]]:
    """The result, unwritten, and the part of each view."""
    counts = [view.numel() // (3 * size * size) for view in views]
    out = table.new_empty(sum(counts), row_width(size))
    return out, list(out.split(counts))


def _rule(gpu: Gpu) -> KernelConfig:
    """A store of 16 bytes per thread; enough CTAs for every SM even from one small view."""
    return {"block": 1024, "num_warps": 4}


def _candidates(key: str, gpu: Gpu) -> list[KernelConfig]:
    shapes = ((256, 1), (512, 2), (1024, 4), (1024, 8), (2048, 4), (2048, 8), (4096, 8))
    return [{"block": block, "num_warps": warps} for block, warps in shapes]


TUNABLE = Tunable("patchify", _rule, _candidates)
_FORMS = {"eager": patchify_ref, "portable": _portable, "triton": _triton}
