"""The second kernel of prefix attention: log-sum-exp merge of each row's partials, in fp32."""

import triton
import triton.language as tl

from kernels.prefix_attention.records import ALONE, FLAGS, RECORD, ROW
from kernels.runtime.pdl import release_next, wait_for_previous

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit(do_not_specialize=["depth", "large", "small", "large_partials", "overhead"])
def merge_kernel(
    out,  # [T, Hq, D]
    lse,  # fp32 [T, Hq]
    part_out,
    part_lse,
    row_tiles,  # int32 [T, depth]: each row's tiles from the root down, -1 where there is none
    tiles,
    starts,
    range_length,
    depth,
    large,
    small,
    large_partials,
    overhead,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    SIZES: tl.constexpr,
    INVARIANT: tl.constexpr,
    SPLIT: tl.constexpr,
    AT_ONCE: tl.constexpr,  # partials loaded at a time
    PDL: tl.constexpr,
):
    """One query vector: sum of 2^lse * out over its partials, divided by the sum of 2^lse.

    The order is that of the row's path, from the root down.
    """
    row, q_head = tl.program_id(0), tl.program_id(1)
    head = q_head // GROUP
    # Safe before the wait: the schedule was written at least two kernels earlier.
    middle = tl.load(starts + large)
    wait_for_previous(PDL)
    release_next(PDL)
    dim = tl.arange(0, D)
    peak = float("-inf")
    total = 0.0
    acc = tl.zeros([D], tl.float32)
    total_partials = 0
    finished = depth > 0
    for at in range(0, depth):
        tile = tl.load(row_tiles + row.to(tl.int64) * depth + at)
        if tile >= 0:
            is_small = tile >= large
            begin = tl.where(is_small, middle, 0)
            count = tl.where(is_small, small, large)
            length = tl.load(starts + tl.where(is_small, large + small, large)) - begin
            start, stop = tl.load(starts + tile) - begin, tl.load(starts + tile + 1) - begin
            if INVARIANT:
                partial = head * length + start
                num_partials = stop - start
            else:
                share = tl.load(range_length + is_small.to(tl.int32))
                line = (0 if SPLIT else KV_HEADS * begin) + head * length
                first = (line + start + overhead) // share
                partial = head * count + tile - tl.where(is_small, large, 0) + first
                num_partials = tl.where(stop > start, (line + stop - 1) // share - first + 1, 0)
            record = tiles + tile * RECORD
            finished = finished & ((tl.load(record + FLAGS) & ALONE) != 0)
            total_partials += num_partials
            size = tl.where(is_small, SIZES[1], SIZES[0])
            vector = partial.to(tl.int64) * size + tl.where(is_small, large_partials * SIZES[0], 0)
            vector += (row - tl.load(record + ROW)) * GROUP + q_head % GROUP
            for block in range(0, num_partials, AT_ONCE):
                index = block + tl.arange(0, AT_ONCE)
                live = index < num_partials
                source = vector + index * size
                logs = tl.load(part_lse + source, mask=live, other=float("-inf"))
                x = tl.load(
                    part_out + source[:, None] * D + dim[None, :], mask=live[:, None], other=0.0
                )  # [AT_ONCE, D]
                new_peak = tl.maximum(peak, tl.max(logs, 0))
                base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
                weights = tl.exp2(logs - base)
                rescale = tl.exp2(peak - base)
                total = total * rescale + tl.sum(weights, 0)
                acc = acc * rescale + tl.sum(x * weights[:, None], 0)
                peak = new_peak
    if (total_partials != 1) | (finished == 0):
        divisor = tl.where(total > 0.0, total, 1.0)
        target = row.to(tl.int64) * (KV_HEADS * GROUP) + q_head
        tl.store(out + target * D + dim, (acc / divisor).to(out.dtype.element_ty))
        tl.store(lse + target, (peak + tl.log2(divisor)) * LN2)  # -inf if nothing was seen
