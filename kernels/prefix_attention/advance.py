"""Advances a decode step's plan by one token on the device; for the Triton form without host work.

Every leaf grows by one token: its length and causal offset, its row's positions, and the slot for
the next K and V, looked up in the page table. A captured CUDA graph that ends with `advance` can be
replayed `plan.steps_left` times; then, or when rollouts start or end, the host builds a new plan.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.prefix_plan import PrefixPlan
from kernels.runtime.arithmetic import INT32_END, cdiv
from kernels.runtime.dispatch import check, pick


def advance(plan: PrefixPlan, positions: Tensor, slots: Tensor, *, impl: str | None = None) -> None:
    """Move a decode step's tensors on to the next step, in place and on the device.

    positions, slots: int [T], as `qk_norm_rope` takes them. Also updates the plan's tensors and
    schedules, but not its `nodes` on the host, which impl "eager" of attention reads. A leaf whose
    pages are full gets slot -1, so replay `plan.steps_left` times at most.
    Tensors are created at first use: run a step, and this, before capture.
    Raises ValueError if the plan is not that of a decode step.
    """
    check(plan.is_decode, "advance: every row of the plan must be the only new token of its node")
    for name, tensor in (("positions", positions), ("slots", slots)):
        check(tensor.shape == (plan.num_rows,), f"advance: {name} must be [{plan.num_rows}]")
        integer = tensor.dtype in (torch.int32, torch.int64)
        check(integer, f"advance: {name} must be int32 or int64, not {tensor.dtype}")
        check(tensor.device == plan.kv_len.device, f"advance: {name} must be on the plan's device")
        check(tensor.is_contiguous(), f"advance: {name} must be contiguous")
    check(
        slots.dtype == torch.int64 or plan.num_pages * plan.page_size <= INT32_END,
        f"advance: slots of {plan.num_pages} pages of {plan.page_size} tokens must be int64",
    )
    forms = {"eager": advance_ref, "triton": _advance_triton}
    pick("advance", impl, plan.kv_len.device, forms)(plan, positions, slots)
    plan.advanced += 1
    for schedule in plan.schedules.values():
        schedule.update()


def advance_ref(plan: PrefixPlan, positions: Tensor, slots: Tensor) -> None:
    """The definition, without the schedules' update."""
    leaf, size = plan.leaf_of_row.long(), plan.page_size
    length = plan.kv_len[leaf]  # before this step: the offset of its new token
    for tensor in (plan.kv_len, plan.causal_offset):
        tensor[leaf] += 1
    for tensor in (plan.row_position, positions):
        tensor += 1
    first, end = plan.page_start[leaf], plan.page_start[leaf + 1]
    entry = first + length // size
    page = plan.pages[entry.clamp_max(len(plan.pages) - 1).long()]
    slots.copy_(torch.where(entry < end, page.long() * size + length % size, -1))


def _advance_triton(plan: PrefixPlan, positions: Tensor, slots: Tensor) -> None:
    block = 128
    advance_kernel[(cdiv(plan.num_rows, block),)](
        plan.leaf_of_row,
        plan.kv_len,
        plan.causal_offset,
        plan.row_position,
        positions,
        slots,
        plan.page_start,
        plan.pages,
        plan.num_rows,
        PAGE=plan.page_size,
        BLOCK=block,
        num_warps=4,
    )


@triton.jit(do_not_specialize=["rows"])
def advance_kernel(
    leaf_of_row,
    kv_len,
    causal_offset,
    row_position,
    positions,
    slots,
    page_start,
    pages,
    rows,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One thread per row, which has its leaf to itself."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = row < rows
    leaf = tl.load(leaf_of_row + row, mask=live, other=0)
    length = tl.load(kv_len + leaf, mask=live, other=0)
    tl.store(kv_len + leaf, length + 1, mask=live)
    tl.store(causal_offset + leaf, tl.load(causal_offset + leaf, mask=live) + 1, mask=live)
    tl.store(row_position + row, tl.load(row_position + row, mask=live) + 1, mask=live)
    tl.store(positions + row, tl.load(positions + row, mask=live) + 1, mask=live)
    entry = tl.load(page_start + leaf, mask=live, other=0) + length // PAGE
    fits = live & (entry < tl.load(page_start + leaf + 1, mask=live, other=0))
    page = tl.load(pages + entry, mask=fits, other=0).to(tl.int64)
    tl.store(slots + row, tl.where(fits, page * PAGE + length % PAGE, -1), mask=live)
