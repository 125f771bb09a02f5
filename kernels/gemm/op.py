"""Linear layers and stride-2 convolutions of vision tokens as one Triton GEMM.

    linear        out[i] = f(W x[i] + b)
    convolution   3x3, stride 2, padding 1 on each view's grid, straight from its packed tokens

Sums are fp32, rounded once after the bias. quick_gelu is applied to the rounded value, in fp32, and
rounded again, as by F.linear followed by `quick_gelu`. Results go to the rows of `out` in order, or
to those in `rows`.

stream_k.py divides the work. If it splits tiles, a second launch sums their partials in a fixed
order, so that results do not change from run to run. Partials take an fp32 workspace of at most two
tiles per CTA: 33 MiB for tiles of 128 x 256 on 132 SMs.

For 16-bit inputs the rule chooses tiles of 128 x 256, with 85 operations per byte read (64 x 256
has 51, 128 x 128 has 64), or 64 rows where there are few.
"""

from collections.abc import Sequence

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.gemm.kernel import gemm_kernel, merge_partials_kernel
from kernels.gemm.stream_k import stream_k
from kernels.runtime.arithmetic import cdiv
from kernels.runtime.configs import Gpu, KernelConfig, Tunable, gpu_of
from kernels.runtime.dispatch import check, copyable, operators, refuse_grad
from kernels.runtime.dtypes import DTYPES
from kernels.runtime.grids import Grid, sides_of, tokens_of
from kernels.runtime.tensor_cache import cached_tensors


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    quick_gelu: bool = False,
    out: Tensor | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """f(x @ weight.T + bias): x [M, C], weight [N, C], bias [N] -> [M, N], or `out`.

    out: [R, N]; rows: int64 [M]. Both or neither: result row i is written to out[rows[i]]. The
    caller guarantees that rows are distinct and less than R; checking would wait for the GPU.
    Raises ValueError for shapes, dtypes, devices or memory layouts that do not fit.
    """
    if torch.compiler.is_compiling() and out is None:
        return operators().linear(x, weight, bias, quick_gelu)
    refuse_grad("linear", (x, weight, bias))
    check(x.ndim == 2 and weight.ndim == 2, "x and weight must each have two axes")
    check(weight.shape[1] == x.shape[1], f"weight must be [N, {x.shape[1]}] for x {list(x.shape)}")
    check(weight.is_contiguous(), "weight must be contiguous")
    return _launch(x, weight, bias, None, x.shape[0], quick_gelu, out, rows)


def convolution(
    x: Tensor,
    grids: Sequence[Grid],
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    out: Tensor | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """3x3, stride 2, padding 1 on packed views: x [T, C], weight [N, C, 3, 3] -> [T', N], or `out`.

    weight must be channels-last in memory; `out` and `rows` are as for `linear`.
    Raises ValueError likewise.
    """
    if torch.compiler.is_compiling() and out is None:
        return operators().convolution(x, sides_of(grids), weight, bias)
    refuse_grad("convolution", (x, weight, bias))
    tokens = tokens_of(grids)
    check(
        x.ndim == 2 and x.shape[0] == tokens,
        f"x must be [{tokens}, C], a row per token of the grids, not {list(x.shape)}",
    )
    check(
        weight.ndim == 4 and weight.shape[1:] == (x.shape[1], 3, 3),
        f"weight must be [N, {x.shape[1]}, 3, 3], not {list(weight.shape)}",
    )
    by_tap = weight.permute(0, 2, 3, 1)
    check(by_tap.is_contiguous(), "weight must be in torch.channels_last for impl 'triton'")
    windows = windows_of(tuple(map(tuple, grids)), x.device)
    return _launch(x, by_tap.flatten(1), bias, windows, windows.shape[1], False, out, rows)


def check_output_rows(
    x: Tensor, count: int, width: int, out: Tensor | None, rows: Tensor | None
) -> None:
    """Raise ValueError unless `count` results of `width` columns can be written to `rows` of `out`.

    The results have the dtype and device of x.
    """
    check((out is None) == (rows is None), "give both out and rows, or neither")
    if out is None or rows is None:
        return
    check(out.ndim == 2 and out.shape[1] == width, f"out must be [R, {width}]")
    check(out.stride(1) == 1, "out must have neighbouring columns (stride 1)")
    check(
        out.dtype == x.dtype and out.device == x.device,
        f"out must be {x.dtype} on {x.device}",
    )
    check(
        rows.dtype == torch.int64 and rows.shape == (count,) and rows.is_contiguous(),
        f"rows must be int64 [{count}] and contiguous",
    )
    check(rows.device == x.device, f"rows must be on {x.device}")


def halved(grids: Sequence[Grid]) -> list[Grid]:
    """The grids of a convolution's output."""
    return [(cdiv(rows, 2), cdiv(columns, 2)) for rows, columns in grids]


@cached_tensors(64)
def windows_of(grids: tuple[Grid, ...], device: torch.device) -> Tensor:
    """The window of each output token, int32 [3, T'], cached for 64 batches of views.

    The rows are the window's first token (which may be outside the view, even negative), the
    columns of its view, and nine bits: bit 3 a + b is set if tap (a, b) is inside the view.
    """
    of_grid = {grid: _windows_of_grid(grid) for grid in set(grids)}
    tables, start = [torch.empty(3, 0, dtype=torch.int32)], 0
    for rows, columns in grids:
        table = of_grid[rows, columns]
        tables.append(table + torch.tensor([[start], [0], [0]], dtype=torch.int32))
        start += rows * columns
    return torch.cat(tables, dim=1).to(device)


def _windows_of_grid(grid: Grid) -> Tensor:
    """`windows_of` for one view, on the CPU."""
    (rows, columns), [(out_rows, out_columns)] = grid, halved([grid])
    row = 2 * torch.arange(out_rows)[:, None] - 1
    column = 2 * torch.arange(out_columns) - 1
    first, inside = row * columns + column, torch.tensor(0)
    for tap in range(9):
        at_row, at_column = row + tap // 3, column + tap % 3
        valid = (at_row >= 0) & (at_row < rows) & (at_column >= 0) & (at_column < columns)
        inside = inside | valid.long() << tap
    return torch.stack([first, torch.full_like(first, columns), inside]).flatten(1).int()


def _launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    windows: Tensor | None,
    count: int,
    quick_gelu: bool,
    out: Tensor | None,
    rows: Tensor | None,
) -> Tensor:
    """Compute `count` result rows from x [tokens, C] and weight [N, taps * C]."""
    width, channels = weight.shape[0], x.shape[1]
    _check_operands(x, weight, bias, count, out, rows)
    if out is None:
        out = x.new_empty(count, width)
    if not count or not width:
        return out
    taps = 1 if windows is None else 9
    config = _config_of(x, count, width, taps)
    block_m, block_n, block_k = (config[f"block_{axis}"] for axis in "mnk")
    split = stream_k(
        cdiv(count, block_m),
        cdiv(width, block_n),
        steps=taps * cdiv(channels, block_k),
        programs=gpu_of(x.device).sms * config["programs"],
        overhead=config["overhead"],
    )
    result = {
        "bias": bias,
        "out": out,
        "out_rows": rows,
        "part": x.new_empty(split.partials, block_m, block_n, dtype=torch.float32),
        "rows": count,
        "width": width,
        "out_stride": out.stride(0),
        "band": split.band,
        "whole": split.whole,
        "lanes": split.lanes,
        "share": split.share,
        "QUICK_GELU": quick_gelu,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
    }
    gemm_kernel[(split.programs if split.rest else min(split.programs, split.whole),)](
        **_factors(x, weight, windows, config),
        windows=windows,
        a_stride=x.stride(0),
        rest=split.rest,
        C=channels,
        TAPS=taps,
        BLOCK_K=block_k,
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
        **result,
    )
    if split.rest:
        merge_rows = min(block_m, 8)
        merge_partials_kernel[(split.rest, block_m // merge_rows)](
            STEPS=split.steps, ROWS=merge_rows, num_warps=4, **result
        )
    return out


def _factors(x: Tensor, weight: Tensor, windows: Tensor | None, config: KernelConfig) -> dict:
    """The kernel's arguments for both factors; with tma, also descriptors of their blocks."""
    m, n, k = (config[f"block_{axis}"] for axis in "mnk")
    tma = bool(config["tma"]) and copyable(weight) and (windows is not None or copyable(x))
    check(
        x.shape[1] % k == 0 or not tma, "kernel config: with tma, block_k must divide the channels"
    )
    return {
        "a": x,
        "w": weight,
        "a_blocks": TensorDescriptor.from_tensor(x, [m, k]) if tma and windows is None else None,
        "w_blocks": TensorDescriptor.from_tensor(weight, [n, k]) if tma else None,
        "TMA": tma,
    }


def _config_of(x: Tensor, count: int, width: int, taps: int) -> KernelConfig:
    """The kernel config for `count` result rows of `width` columns."""
    bucket = triton.next_power_of_2(count)
    size = f"M<={bucket}" if bucket <= 4096 else "M>4096"
    operation = ("conv" if taps > 1 else "linear") + (" fp32" if x.dtype == torch.float32 else "")
    key = f"{size} N{width} C{x.shape[1]} {operation}"
    return TUNABLE.choose(key, x.device, x.dtype, count, width)


def _rule(gpu: Gpu, dtype: torch.dtype, count: int, width: int) -> KernelConfig:
    if dtype == torch.float32:  # no tensor cores: as much as registers hold
        return _config(64, 64, 16, num_warps=8, num_stages=2)
    block_m = 64 if count <= 64 else 128
    block_n = min(256, max(64, triton.next_power_of_2(width)))
    warps = 8 if block_m * block_n > 128 * 128 else 4
    buffers = gpu.shared_bytes // (2 * 64 * (block_m + block_n))
    stages = min(4, buffers + (gpu.arch < 90))  # before sm_90 one stage needs no buffer
    return _config(block_m, block_n, 64, num_warps=warps, num_stages=stages)


def _config(block_m: int, block_n: int, block_k: int, **others: int) -> KernelConfig:
    """A kernel config, with one CTA per SM unless `programs` is given.

    overhead  cost of splitting a tile (writing and reading partials), in steps of block_k
    tma       1: tensor copies (sm_90) for the weight, and for x of a linear layer, where rows are
              aligned to 16 bytes
    """
    tile = {"block_m": block_m, "block_n": block_n, "block_k": block_k}
    return tile | {"programs": 1, "overhead": 16, "tma": 0} | others


def _candidates(key: str, gpu: Gpu) -> list[KernelConfig]:
    if key.endswith("fp32"):
        return [_config(m, n, 16, num_warps=8, num_stages=2) for m, n in ((64, 64), (128, 64))]
    has_tma = gpu.arch >= 90
    candidates = [
        _config(128, 256, 64, num_warps=8, num_stages=4),
        _config(128, 256, 64, num_warps=8, num_stages=3),
        _config(256, 128, 64, num_warps=8, num_stages=3),
        _config(128, 128, 64, num_warps=4, num_stages=3, programs=2),
        _config(128, 128, 32, num_warps=4, num_stages=5, programs=2),
        _config(64, 256, 64, num_warps=4, num_stages=3),
        _config(64, 128, 64, num_warps=4, num_stages=4, programs=2),
    ]
    candidates += [candidates[0] | {"overhead": n} for n in (8, 32)]
    if has_tma:
        candidates += [config | {"tma": 1} for config in candidates[:3]]
    return candidates


TUNABLE = Tunable("gemm", _rule, _candidates)


def _check_operands(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    count: int,
    out: Tensor | None,
    rows: Tensor | None,
) -> None:
    check(x.dtype in DTYPES, f"x must be fp32, bf16 or fp16, not {x.dtype}")
    check(x.stride(1) == 1 or x.shape[1] == 1, "x must have neighbouring channels (stride 1)")
    width = weight.shape[0]
    check(bias is None or bias.shape == (width,), f"bias must be [{width}]")
    check_output_rows(x, count, width, out, rows)
    for name, tensor in {"weight": weight, "bias": bias}.items():
        check(
            tensor is None or (tensor.dtype == x.dtype and tensor.device == x.device),
            f"{name} must be {x.dtype} on {x.device} like x",
        )
