"""The launcher of prefix attention's Triton form, and how it cuts its work on which GPU."""

import math

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels._launch import check
from kernels._tiles import Gpu, Tiles, gpu_of, tiles
from kernels.prefix_attention_triton import BITS, NATIVE, merge_kernel, prefix_attention_kernel
from kernels.prefix_plan import PrefixPlan
from kernels.prefix_schedule import Cut, Schedule

HEAD_DIMS = (16, 32, 64, 128, 256)
PAGE_SIZES = (16, 32, 64, 128)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LOG2E = 1 / math.log(2)


def prefix_attention_triton(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    plan: PrefixPlan,
    scale: float,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    window: int = 0,
    batch_invariant: bool = False,
) -> tuple[Tensor, Tensor]:
    """`prefix_attention` in two launches; the first use of a plan cuts up its work before."""
    rows, heads, dim = q.shape
    kv_heads, page_size = k_pages.shape[1:3]
    _check(q, dim, page_size, heads // kv_heads)
    fp8 = k_scale is not None
    large, small = tile_sizes(plan, heads // kv_heads, dim, batch_invariant)
    chosen = choose(q.device, q.dtype, dim, page_size, large, small, fp8, batch_invariant)
    gpu = gpu_of(q.device)
    cut = Cut(
        kv_heads=kv_heads,
        group=heads // kv_heads,
        sizes=(large, small),
        grain=chosen["grain"],
        overhead=0 if batch_invariant else chosen["overhead"],
        programs=gpu.sms * chosen["programs"],
        window=window,
        invariant=batch_invariant,
    )
    schedule = plan.schedule(cut)
    return launch(q, k_pages, v_pages, plan, schedule, chosen, scale, k_scale, v_scale)


def launch(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    plan: PrefixPlan,
    schedule: Schedule,
    chosen: Tiles,
    scale: float,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Both launches over a schedule."""
    (rows, heads, dim), cut = q.shape, schedule.cut
    out = torch.empty_like(q)
    lse = q.new_empty(rows, heads, dtype=torch.float32)
    if not rows:
        return out, lse
    vectors = sum(slots * size for slots, size in zip(schedule.slots, cut.sizes, strict=True))
    part_out = q.new_empty(vectors, dim, dtype=torch.float32)
    part_lse = q.new_empty(vectors, dtype=torch.float32)
    line = {
        "tiles": schedule.tiles,
        "starts": schedule.starts,
        "stretch": schedule.stretch,
        "large": schedule.counts[0],
        "small": schedule.counts[1],
        "large_slots": schedule.slots[0],
    }
    shape = {
        "KV_HEADS": cut.kv_heads,
        "GROUP": cut.group,
        "D": dim,
        "SIZES": cut.sizes,
        "OVERHEAD": cut.overhead,
        "INVARIANT": cut.invariant,
    }
    fp8 = 0
    if k_scale is not None:
        fp8 = (NATIVE if gpu_of(q.device).arch >= 89 else BITS).value
        if fp8 == BITS.value:
            k_pages, v_pages = k_pages.view(torch.uint8), v_pages.view(torch.uint8)
    k_tiles = v_tiles = None
    if chosen["tma"]:
        k_tiles, v_tiles = (_descriptor(pages, chosen["block"]) for pages in (k_pages, v_pages))
    prefix_attention_kernel[(cut.programs,)](
        q=q,
        k_pages=k_pages,
        v_pages=v_pages,
        k_scale=k_scale,
        v_scale=v_scale,
        k_tiles=k_tiles,
        v_tiles=v_tiles,
        out=out,
        lse=lse,
        part_out=part_out,
        part_lse=part_lse,
        page_table=plan.pages,
        first_tile=schedule.first_tile,
        row_position=plan.row_position if cut.window else None,
        qk_scale=scale * LOG2E,
        PAGE=plan.page_size,
        BLOCK=chosen["block"],
        GRAIN=cut.grain,
        WINDOW=cut.window,
        FP8=fp8,
        TMA=bool(chosen["tma"]),
        num_warps=chosen["num_warps"],
        num_stages=chosen["num_stages"],
        **line,
        **shape,
    )
    heads_at_once = min(8, triton.next_power_of_2(cut.group))
    merge_kernel[(rows, cut.kv_heads, triton.cdiv(cut.group, heads_at_once))](
        out=out,
        lse=lse,
        part_out=part_out,
        part_lse=part_lse,
        row_tiles=schedule.row_tiles,
        depth=schedule.row_tiles.shape[1],
        VECTORS=heads_at_once,
        AT_ONCE=1 if cut.invariant else max(1, min(8, 8192 // (heads_at_once * dim))),
        num_warps=4,
        **line,
        **shape,
    )
    return out, lse


def tile_sizes(plan: PrefixPlan, group: int, dim: int, batch_invariant: bool) -> tuple[int, int]:
    """M of the larger and the smaller row tiles, 0 for one that the plan has no use for.

    16 is the least M of a tensor-core product, 64 that of wgmma; 16 rollouts of 4 heads fill it.
    The batch-invariant mode has one size, whatever is in the batch.
    """
    if batch_invariant:
        return max(64, triton.next_power_of_2(group)), 0
    vectors = [group * (node.row_end - node.row_start) for node in plan.nodes]
    small = 16 if group <= 16 and any(0 < n <= 16 for n in vectors) else 0
    most = max(vectors, default=0)
    if small and most <= 16:
        return 0, small
    # 128 vectors of head_dim 256 and their fp32 sums do not fit the registers.
    return 128 if max(most, group) > 64 and dim < 256 else 64, small


def choose(
    device: torch.device,
    dtype: torch.dtype,
    dim: int,
    page_size: int,
    large: int,
    small: int,
    fp8: bool,
    batch_invariant: bool,
) -> Tiles:
    """The tile choices for inputs of a class, from the GPU's table or by rule."""
    key = f"D{dim} M{large}+{small}" + " fp8" * fp8 + " invariant" * batch_invariant

    def rule(gpu: Gpu) -> Tiles:
        # Registers decide: past these, the compiler spills (`python -m profiles static`).
        wide = dim == 256 or large == 128
        old = gpu.arch < 90
        tight = (dim == 256 and (old or fp8)) or (large == 128 and old and fp8)
        block = min(page_size, 32 if tight else 64)
        kv_bytes = 2 * block * dim * (1 if fp8 else dtype.itemsize)
        return {
            "block": block,
            "num_warps": 8 if wide or (fp8 and old) else 4,
            "num_stages": 2 if 4 * kv_bytes > gpu.shared_bytes else 3,
            "programs": 1 if wide else 2 if large else 4,
            "grain": 256 if batch_invariant else 16,
            "overhead": 2,
            "tma": 0,
        }

    return tiles("prefix_attention", key, device, rule)


def _descriptor(pages: Tensor, block: int) -> TensorDescriptor:
    """Pages as rows of head_dim, of which a tensor copy takes a block of one head's page."""
    dim = pages.shape[-1]
    return TensorDescriptor.from_tensor(pages.view(-1, dim), [block, dim])


def _check(q: Tensor, dim: int, page_size: int, group: int) -> None:
    check(q.dtype in DTYPES, f"q must be bf16, fp16 or fp32, not {q.dtype}")
    check(q.is_contiguous(), "q must be contiguous")
    check(dim in HEAD_DIMS, f"head_dim {dim}: impl 'triton' has {HEAD_DIMS}")
    check(page_size in PAGE_SIZES, f"page_size {page_size}: impl 'triton' has {PAGE_SIZES}")
    check(group <= 128, f"{group} query heads per KV head: impl 'triton' has at most 128")
