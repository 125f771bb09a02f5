"""Philox4x32-10, the counter-based random number generator, in PyTorch."""

import torch
from torch import Tensor

WORD = 0xFFFFFFFF  # the low 32 bits


def philox4x32(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """The four output words of Philox4x32-10, in [0, 2^32).

    counter, key: four and two int64 tensors of words in [0, 2^32), with shapes that broadcast.
    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011).
    """
    c0, c1, c2, c3 = (word.clone() for word in torch.broadcast_tensors(*counter))
    k0, k1 = key
    high = torch.empty_like(c0)
    for _ in range(10):
        # int64 products wrap around, but their low and high halves equal those of unsigned ones.
        # c1 and c3 keep upper halves, which are masked off when they are combined with c0 and c2.
        for product, factor, word, k in ((c2, 0xCD9E8D57, c1, k0), (c0, 0xD2511F53, c3, k1)):
            product.mul_(factor)
            torch.bitwise_right_shift(product, 32, out=high)
            word.bitwise_xor_(high).bitwise_xor_(k).bitwise_and_(WORD)
        c0, c1, c2, c3 = c1, c2, c3, c0
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1.bitwise_and_(WORD), c2, c3.bitwise_and_(WORD)


def words_of(quads: Tensor, seeds: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
    """The words of tokens 4 q .. 4 q + 3 for every q of `quads`.

    quads: [B, n] or [1, n]; seeds, positions: [B]; all int64. Returns four tensors [B, n].
    """
    seeds, positions = seeds[:, None], positions[:, None]
    counter = (quads, positions & WORD, (positions >> 32) & WORD, torch.zeros_like(seeds))
    return philox4x32(counter, (seeds & WORD, (seeds >> 32) & WORD))


def gumbel_(words: Tensor) -> Tensor:
    """-log(-log1p(-u)) of fp32 words, in place; u = (word + 0.5) * 2^-32, kept below 1."""
    words.add_(0.5).mul_(-(2.0**-32)).clamp_(min=2.0**-24 - 1)  # -u
    return words.log1p_().neg_().log_().neg_()
