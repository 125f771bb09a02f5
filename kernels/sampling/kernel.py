"""The Triton kernels of `sample`: no sort, no synchronisation, the same launches for every input.

Each row is split into blocks of BLOCK tokens, one CTA each:

    scan   reads the logits from HBM, once: each block's largest logit and sum of exponentials;
           without truncation, also each block's token with the largest score
    cut    (with truncation) one CTA per row finds the smallest z that is kept
    draw   (with truncation) each block's token with the largest score among those kept, and the
           sum of their exponentials
    pick   one CTA per row: the best block's token and its log-probability, written to where the
           next step reads them

`cut` reads little. `scan` writes the largest logit of each group of 64 tokens; since these are
logits themselves, the depth at which they alone reach the target bounds the cut, and groups whose
largest logit is past the bound are never read. The result is exact for all logits. A flat row with
top_p alone has no such groups and takes a dozen passes over the row, which L2 holds.

A log-probability is the drawn token's logit less the logarithm of a sum of exponentials. The raw
one takes the sums of `scan`, the processed one those of the tokens that are drawn from: with
truncation the sums of `draw`, else the tempered ones of `scan`. Neither reads the logits again.

What is computed for a row, and the order of its sums, depends on its logits and BLOCK alone: its
token and log-probability are the same bits in every batch and at every index.

The token may differ from that of `sample_ref`, which also rounds to fp32,
  - if two scores are within 2^-19 * max(1, |z|, |noise|) of each other: each has an error of a few
    ulp of its terms, and a block's winner is found with z relative to the block's largest logit;
  - if top_p is within 2^-19 of the probability that it is compared with: the error of exponentials
    and of sums, which are fp32 within a thread and a block, and fp64 above.
Log-probabilities, raw or processed, have sums in fp32 and are within 1e-6 * max(1, |logprob|) of
exact ones (1e-7 measured in the interpreter). If one token is kept, the processed one is exactly 0.
"""

import triton
import triton.language as tl

from kernels.sampling.noise import gumbel, perturbed_argmax, random_words

GROUP = tl.constexpr(64)  # tokens that share one entry of `maxima`
INFINITY = tl.constexpr(0x7F800000)  # the bits of fp32 infinity
VANISHED = tl.constexpr(0x42D00000)  # the bits of 104: exp(-104) is 0 in fp32


@triton.jit
def load_logits(row_logits, tokens, mask):
    """Logits in fp32, -inf where masked."""
    return tl.load(row_logits + tokens, mask, other=-float("inf")).to(tl.float32)


@triton.jit
def exp(x):
    """exp(x) for x <= 0; tl.exp costs half as much again, as it handles subnormal results."""
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def row_total(sums, mask, block_peaks, peak):
    """The sum of exp(x - peak) over the row; NaN if it holds NaN or +inf, or only -inf."""
    return tl.sum(tl.load(sums, mask, other=0.0) * exp(block_peaks - peak), axis=0)


@triton.jit
def depth(x, peak, inverse):
    """How far z is below 0, as the bits of an fp32, which order like it: 0 to INFINITY."""
    return tl.abs((x - peak) * inverse).to(tl.int32, bitcast=True)


@triton.jit
def sample_scan_kernel(
    logits,  # [B, V]
    seeds,  # int64 [B]
    positions,  # int64 [B]
    peaks,  # fp32 [B, blocks]: the largest logit of each block
    sums,  # fp32 [2, B, blocks]: of exp(x - peak), NaN if one is; of exp((x - peak) / temperature)
    maxima,  # fp32 [B, blocks, BLOCK / GROUP], with TRUNCATED: the largest logit of each group
    winners,  # int32 [B, blocks], without TRUNCATED: each block's token with the largest score
    vocab,
    stride,
    seed_stride,
    position_stride,
    inverse,  # of the temperature
    blocks,
    size,  # B * blocks
    BLOCK: tl.constexpr,
    GREEDY: tl.constexpr,
    TRUNCATED: tl.constexpr,
    TEMPERED: tl.constexpr,  # whether to compute the second sum
):
    cell = tl.program_id(0)
    row, block = cell // blocks, cell % blocks
    tokens = block * BLOCK + tl.arange(0, BLOCK)
    x = load_logits(logits + row.to(tl.int64) * stride, tokens, tokens < vocab)  # [BLOCK]
    peak = tl.max(x, axis=0)
    below = x - tl.where(peak == -float("inf"), 0.0, peak)
    tl.store(peaks + cell, peak)
    tl.store(sums + cell, tl.sum(exp(below), axis=0))
    if TEMPERED:
        tl.store(sums + size + cell, tl.sum(exp(below * inverse), axis=0))
    if TRUNCATED:
        groups = tl.arange(0, BLOCK // GROUP)
        grouped = tl.max(tl.reshape(x, [BLOCK // GROUP, GROUP]), axis=1)
        tl.store(maxima + cell.to(tl.int64) * (BLOCK // GROUP) + groups, grouped)
    else:
        if GREEDY:
            winner = tl.min(tl.where(x == peak, tokens, vocab), axis=0)
        else:
            # Here z is relative to the block's largest logit; `pick` uses the row's.
            seed = tl.load(seeds + row.to(tl.int64) * seed_stride)
            position = tl.load(positions + row.to(tl.int64) * position_stride)
            quads = block * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
            words = random_words(seed, position, quads)
            winner = perturbed_argmax(below * inverse, words, tokens, vocab)
        tl.store(winners + cell, winner)


@triton.jit(do_not_specialize=["top_k"])
def sample_cut_kernel(
    logits,  # [B, V]
    peaks,  # fp32 [B, blocks]
    sums,  # fp32 [2, B, blocks]
    maxima,  # fp32 [B, groups]
    lists,  # int32 [B, groups]: scratch, the groups to search
    cuts,  # int32 [B]: the largest depth that is kept
    vocab,
    stride,
    inverse,
    top_k,
    top_p,
    blocks,
    groups,
    size,  # B * blocks
    BLOCKS: tl.constexpr,  # powers of two, at least blocks and groups
    GROUPS: tl.constexpr,
    TILE: tl.constexpr,  # groups read at a time
    BY_COUNT: tl.constexpr,
    BY_MASS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCKS)
    block_peaks = tl.load(peaks + row * blocks + block, block < blocks, other=-float("inf"))
    peak = tl.max(block_peaks, axis=0)
    total = row_total(sums + row * blocks + block, block < blocks, block_peaks, peak)
    if total == total:  # not NaN: the row is a distribution
        group = tl.arange(0, GROUPS)
        group_peaks = tl.load(maxima + row * groups + group, group < groups, other=-float("inf"))
        depths = depth(group_peaks, peak, inverse)  # [GROUPS]
        row_list = lists + row * groups
        row_logits = logits + row * stride
        if BY_COUNT:
            hi = bound(depths, tl.full(depths.shape, 1, tl.float32), top_k)
            count = list_groups(row_list, group, (depths <= hi) & (group < groups))
            hi = search(
                row_logits, row_list, count, vocab, peak, inverse, top_k, hi, TILE, BY_MASS=False
            )
        if BY_MASS:
            if BY_COUNT:
                count = list_groups(row_list, group, (depths <= hi) & (group < groups))
                need = top_p * mass_of(row_logits, row_list, count, vocab, peak, inverse, hi, TILE)
            else:
                tempered_sums = tl.load(
                    sums + size + row * blocks + block, block < blocks, other=0.0
                )
                need = top_p * tl.sum(tempered_sums * exp((block_peaks - peak) * inverse), axis=0)
                # A thousandth more than `need` covers the rounding of sums.
                hi = tl.minimum(bound(depths, mass(depths), need * 1.001), VANISHED)
                count = list_groups(row_list, group, (depths <= hi) & (group < groups))
            hi = search(
                row_logits, row_list, count, vocab, peak, inverse, need, hi, TILE, BY_MASS=True
            )
        tl.store(cuts + row, hi)


@triton.jit
def mass(depths):
    return exp(-depths.to(tl.float32, bitcast=True))


@triton.jit
def bound(depths, weights, need):
    """A depth, near the least, down to which `weights` reach `need`; INFINITY if none does."""
    lo, hi = 0, INFINITY >> 12  # a relative precision of 2^-11 is enough
    for _ in range(19):
        middle = (lo + hi) // 2
        reached = tl.sum(tl.where((depths >> 12) <= middle, weights, 0.0), axis=0) >= need
        lo, hi = tl.where(reached, lo, middle + 1), tl.where(reached, middle, hi)
    return tl.minimum((hi << 12) | 0xFFF, INFINITY)


@triton.jit
def list_groups(row_list, groups, selected):
    """Write the `selected` ones of `groups` to `row_list`, in order; returns their number."""
    selected = selected.to(tl.int32)
    tl.debug_barrier()  # all threads have read the entries that this overwrites
    tl.store(row_list + tl.cumsum(selected, axis=0) - 1, groups, selected > 0)
    tl.debug_barrier()  # all threads see the new entries
    return tl.sum(selected, axis=0)


@triton.jit
def load_depths(row_logits, row_list, first, count, vocab, peak, inverse, TILE: tl.constexpr):
    """Depths of the tokens of TILE groups, [TILE * GROUP / 8, 8]; INFINITY past the last token."""
    rows: tl.constexpr = TILE * GROUP // 8
    lane = tl.arange(0, rows)
    entry = first + lane // (GROUP // 8)
    group = tl.load(row_list + entry, entry < count, other=0)
    tokens = group * GROUP + (lane % (GROUP // 8)) * 8
    tokens = tl.multiple_of(tokens, 8)[:, None] + tl.arange(0, 8)[None, :]
    x = load_logits(row_logits, tokens, (tokens < vocab) & (entry < count)[:, None])
    return depth(x, peak, inverse)


@triton.jit
def mass_of(row_logits, row_list, count, vocab, peak, inverse, hi, TILE: tl.constexpr):
    """The mass of the listed tokens down to depth `hi`."""
    total = tl.zeros([TILE * GROUP // 8], tl.float32)
    for first in range(0, count, TILE):
        d = load_depths(row_logits, row_list, first, count, vocab, peak, inverse, TILE)
        total += tl.sum(tl.where(d <= hi, mass(d), 0.0), axis=1)
    return tl.sum(total.to(tl.float64), axis=0)


@triton.jit
def search(
    row_logits,
    row_list,
    count,
    vocab,
    peak,
    inverse,
    need,
    hi,
    TILE: tl.constexpr,
    BY_MASS: tl.constexpr,
):
    """The least depth c such that at least `need` listed tokens have depth <= c; at most `hi`.

    BY_MASS: such that their mass, not their number, is at least `need`.
    Each round counts at three depths in (lo, hi]. The first six rounds divide z evenly, all later
    ones its bits. Every seventh round instead shrinks the interval to the depths that occur in it,
    and the list to their groups.
    """
    rows: tl.constexpr = TILE * GROUP // 8
    lo, base = -1, tl.full((), 0, tl.float64)  # number or mass at depth <= lo
    round_index = 0
    while hi - lo > 1:
        if round_index % 7 == 6:
            lo, hi, count = narrow(row_logits, row_list, count, vocab, peak, inverse, lo, hi, TILE)
        else:
            a, b, c = quarters(lo, hi, round_index < 6)
            sum_a, sum_b = tl.zeros([rows], tl.float32), tl.zeros([rows], tl.float32)
            sum_c = tl.zeros([rows], tl.float32)
            for first in range(0, count, TILE):
                d = load_depths(row_logits, row_list, first, count, vocab, peak, inverse, TILE)
                weight = tl.where(d > lo, mass(d) if BY_MASS else 1.0, 0.0)
                sum_a += tl.sum(tl.where(d <= a, weight, 0.0), axis=1)
                sum_b += tl.sum(tl.where(d <= b, weight, 0.0), axis=1)
                sum_c += tl.sum(tl.where(d <= c, weight, 0.0), axis=1)
            at_a = base + tl.sum(sum_a.to(tl.float64), axis=0)
            at_b = base + tl.sum(sum_b.to(tl.float64), axis=0)
            at_c = base + tl.sum(sum_c.to(tl.float64), axis=0)
            in_a, in_b, in_c = at_a >= need, at_b >= need, at_c >= need
            hi = tl.where(in_a, a, tl.where(in_b, b, tl.where(in_c, c, hi)))
            lo = tl.where(in_a, lo, tl.where(in_b, a, tl.where(in_c, b, c)))
            base = tl.where(in_a, base, tl.where(in_b, at_a, tl.where(in_c, at_b, at_c)))
        round_index += 1
    return hi


@triton.jit
def quarters(lo, hi, evenly):
    """Three depths that divide (lo, hi] into quarters: of z if `evenly`, else of its bits."""
    low = tl.maximum(lo, 0)
    x = low.to(tl.float32, bitcast=True)
    step = tl.maximum(tl.minimum(hi.to(tl.float32, bitcast=True), 64.0) - x, 0.0) * 0.25
    half = (hi - lo) // 2
    a = tl.where(evenly, (x + step).to(tl.int32, bitcast=True), lo + (half + 1) // 2)
    b = tl.where(evenly, (x + 2 * step).to(tl.int32, bitcast=True), lo + half)
    c = tl.where(evenly, (x + 3 * step).to(tl.int32, bitcast=True), lo + half + half // 2)
    return tl.minimum(a, hi), tl.minimum(b, hi), tl.minimum(c, hi)


@triton.jit
def narrow(row_logits, row_list, count, vocab, peak, inverse, lo, hi, TILE: tl.constexpr):
    """Shrink (lo, hi] to the depths that occur in it, and the list to groups with such depths."""
    min_depth, max_depth, kept = hi, lo + 1, 0
    for first in range(0, count, TILE):
        d = load_depths(row_logits, row_list, first, count, vocab, peak, inverse, TILE)
        inside = (d > lo) & (d <= hi)
        min_depth = tl.minimum(min_depth, tl.min(tl.min(tl.where(inside, d, hi), axis=1), axis=0))
        max_depth = tl.maximum(
            max_depth, tl.max(tl.max(tl.where(inside, d, lo + 1), axis=1), axis=0)
        )
        entry = first + tl.arange(0, TILE)
        group = tl.load(row_list + entry, entry < count, other=0)
        reach = tl.max(tl.reshape(inside.to(tl.int32), [TILE, GROUP]), axis=1) > 0
        kept += list_groups(row_list + kept, group, reach & (entry < count))
    return min_depth - 1, max_depth, kept


@triton.jit
def sample_draw_kernel(
    logits,  # [B, V]
    seeds,  # int64 [B]
    positions,  # int64 [B]
    peaks,  # fp32 [B, blocks]
    cuts,  # int32 [B]
    winners,  # int32 [B, blocks]: `vocab` for a block of which no token is kept
    masses,  # fp32 [B, blocks] or None: the sum of exp(z) over its tokens that are kept
    vocab,
    stride,
    seed_stride,
    position_stride,
    inverse,
    blocks,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    cell = tl.program_id(0)
    row, block = cell // blocks, cell % blocks
    block_ids = tl.arange(0, BLOCKS)
    peak = tl.max(
        tl.load(peaks + row * blocks + block_ids, block_ids < blocks, other=-float("inf")), axis=0
    )
    cut = tl.load(cuts + row)
    winner, mass = vocab, tl.full((), 0, tl.float32)
    if depth(tl.load(peaks + cell), peak, inverse) <= cut:
        tokens = block * BLOCK + tl.arange(0, BLOCK)
        x = load_logits(logits + row.to(tl.int64) * stride, tokens, tokens < vocab)  # [BLOCK]
        seed = tl.load(seeds + row.to(tl.int64) * seed_stride)
        position = tl.load(positions + row.to(tl.int64) * position_stride)
        quads = block * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
        z = tl.where(depth(x, peak, inverse) <= cut, (x - peak) * inverse, -float("inf"))
        winner = perturbed_argmax(z, random_words(seed, position, quads), tokens, vocab)
        mass = tl.sum(exp(z), axis=0)
    tl.store(winners + cell, winner)
    if masses is not None:
        tl.store(masses + cell, mass)


@triton.jit
def sample_pick_kernel(
    logits,  # [B, V]
    seeds,  # int64 [B]
    positions,  # int64 [B]
    peaks,  # fp32 [B, blocks]
    sums,  # fp32 [2, B, blocks]
    winners,  # int32 [B, blocks]
    masses,  # fp32 [B, blocks] or None, with PROCESSED and truncation: as `draw` writes them
    results,  # int32 [2, B]: tokens; the bits of their log-probabilities
    ids,  # int64 [B] or None: the tokens, with 0 for -1
    last,  # int64 or None: the same, written to last[batch_indices[b]]
    batch_indices,  # int64 [B] or None
    vocab,
    stride,
    seed_stride,
    position_stride,
    inverse,
    blocks,
    BLOCKS: tl.constexpr,
    GREEDY: tl.constexpr,
    PROCESSED: tl.constexpr,  # whether the log-probability is that of the distribution drawn from
):
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCKS)
    mask = block < blocks
    block_peaks = tl.load(peaks + row * blocks + block, mask, other=-float("inf"))
    peak = tl.max(block_peaks, axis=0)
    total = row_total(sums + row * blocks + block, mask, block_peaks, peak)
    winner = tl.load(winners + row * blocks + block, mask, other=vocab)
    x = load_logits(logits + row * stride, winner, winner < vocab)  # [BLOCKS]
    z = (x - peak) * inverse
    if not GREEDY:
        # Each winner has a different counter; its word is one of that counter's four.
        seed = tl.load(seeds + row * seed_stride)
        position = tl.load(positions + row * position_stride)
        quad_noise = tl.reshape(gumbel(random_words(seed, position, winner // 4)), [BLOCKS, 4])
        is_winner = (winner % 4)[:, None] == tl.arange(0, 4)[None, :]
        z += tl.sum(tl.where(is_winner, quad_noise, 0.0), axis=1)
    best = tl.max(z, axis=0)
    token = tl.min(tl.where(z == best, winner, vocab), axis=0)
    drawn = tl.max(tl.where(winner == token, x, -float("inf")), axis=0)
    token = tl.where(total == total, token, -1)
    logprob = drawn - peak - tl.log(total)
    if PROCESSED:
        processed = 0.0  # of a point mass
        if not GREEDY:
            if masses is not None:
                mass = tl.sum(tl.load(masses + row * blocks + block, mask, other=0.0), axis=0)
            else:
                tempered = tl.load(sums + (tl.num_programs(0) + row) * blocks + block, mask, 0.0)
                mass = tl.sum(tempered * exp((block_peaks - peak) * inverse), axis=0)
            processed = (drawn - peak) * inverse - tl.log(mass)
        logprob = tl.where(total == total, processed, logprob)  # NaN stays
    tl.store(results + row, token)
    tl.store(results + tl.num_programs(0) + row, logprob.to(tl.int32, bitcast=True))
    next_id = tl.maximum(token, 0).to(tl.int64)
    if ids is not None:
        tl.store(ids + row, next_id)
    if last is not None:
        tl.store(last + tl.load(batch_indices + row), next_id)
