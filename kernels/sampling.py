"""Draws one token per row of logits: temperature, top-k, top-p, then Gumbel-max.

The noise is counter-based (Philox4x32-10), so that a row's token is a function of its logits, seed
and position alone, whatever else is in the batch. No generator state is kept anywhere.
"""

from collections.abc import Iterator
from itertools import repeat

import torch
from torch import Tensor

from kernels._launch import check, pick

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WORD = 0xFFFFFFFF  # the low 32 bits
# Elements per operation on a CPU: torch runs up to so many on one thread, and the fork and join of
# hundreds of operations cost more than a second core gains.
BLOCK = 1 << 15


def sample(
    logits: Tensor,
    seeds: Tensor,
    positions: Tensor,
    *,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The token drawn for each row, and its log-probability.

    logits: [B, V]; seeds, positions: int64 [B], any values. Returns tokens int64 [B] and logprobs
    fp32 [B]: the log-softmax of the logits as given (no temperature, no truncation) at the token.

    All in fp32. temperature 0 takes the largest logit, the lowest index on ties. Otherwise the
    scores are z = (logits - max(logits)) * (1 / temperature), and tokens are left out in two steps:
      top_k > 0  keeps the tokens with z at least the k-th largest;
      top_p < 1  keeps of those the fewest of the most probable whose probability, renormalised,
                 reaches top_p, and every token that ties with the last of them.
    Of the rest the largest z - log(-log1p(-u)) wins, u = (w + 0.5) * 2^-32 below 1, where the w of
    token v is word v % 4 of Philox4x32-10 with counter (v // 4, position mod 2^32,
    position >> 32, 0) and the row's seed as key, as `tl.philox(seed, ...)` computes it.

    A row that holds NaN or +inf, or only -inf, is no distribution: token -1, log-probability NaN.
    Raises ValueError for shapes, dtypes, devices and settings that do not fit.
    """
    _check_tensors(logits, seeds, positions)
    # Within these bounds neither the temperature nor its inverse is subnormal in fp32.
    check(
        temperature == 0 or 2.0**-126 <= temperature <= 2.0**126,
        f"sample: temperature must be 0 or from 2^-126 to 2^126, not {temperature}",
    )
    check(
        isinstance(top_k, int) and top_k >= 0,
        f"sample: top_k must be 0 (off) or a positive integer, not {top_k}",
    )
    check(0 < top_p <= 1, f"sample: top_p must be above 0 and at most 1, not {top_p}")
    form = pick("sample", impl, logits.device, _SAMPLE)
    return form(logits, seeds, positions, temperature, top_k, top_p)


def sample_ref(
    logits: Tensor,
    seeds: Tensor,
    positions: Tensor,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The definition of `sample`.

    Row by row, each in a buffer of its own, because torch sums, and rounds exponentials and
    logarithms, differently for different batch shapes and alignments.
    """
    tokens = torch.empty_like(seeds)
    logprobs = torch.empty(seeds.shape, device=seeds.device)
    rows, vocab = logits.shape
    noise = repeat(None, rows) if temperature == 0 else _noise(seeds, positions, vocab)
    for row, row_noise in enumerate(noise):
        scores = logits[row].to(torch.float32, copy=True)
        if row_noise is None:
            token = scores.argmax()
        else:
            z = (scores - scores.max()).mul_(1 / temperature)
            token = row_noise.add_(_truncate(z, top_k, top_p)).argmax()
        logprob = scores.log_softmax(0).take(token)
        tokens[row] = torch.where(logprob.isnan(), -1, token)
        logprobs[row] = logprob
    return tokens, logprobs


def philox4x32(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """The four output words of Philox4x32-10, in [0, 2^32).

    counter: four, key: two int64 tensors of words in [0, 2^32), of shapes that broadcast. Source:
    Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011).
    """
    c0, c1, c2, c3 = (word.clone() for word in torch.broadcast_tensors(*counter))
    k0, k1 = key
    product0, product2 = torch.empty_like(c0), torch.empty_like(c2)
    for _ in range(10):
        # int64 products wrap around, but their low and high halves are those of the unsigned ones.
        # c1 and c3 are left with upper halves, which are masked off where they meet c0 and c2.
        torch.mul(c0, 0xD2511F53, out=product0)
        torch.mul(c2, 0xCD9E8D57, out=product2)
        torch.bitwise_right_shift(product2, 32, out=c0)
        torch.bitwise_right_shift(product0, 32, out=c2)
        c0.bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(WORD)
        c2.bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(WORD)
        c1, product2 = product2, c1
        c3, product0 = product0, c3
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1.bitwise_and_(WORD), c2, c3.bitwise_and_(WORD)


def _noise(seeds: Tensor, positions: Tensor, vocab: int) -> Iterator[Tensor]:
    """-log(-log1p(-u)), fp32 [vocab], of one row after the other."""
    count = -(-vocab // 4)
    rows = len(seeds) if seeds.is_cuda else max(1, BLOCK // count)
    index = torch.arange(count, device=seeds.device)
    zero = torch.zeros_like(index[:1])
    for start in range(0, len(seeds), rows):
        seed = seeds[start : start + rows, None]
        position = positions[start : start + rows, None]
        counter = (index, position & WORD, (position >> 32) & WORD, zero)
        words = philox4x32(counter, (seed & WORD, (seed >> 32) & WORD))
        for row in zip(*words, strict=True):
            uniform = torch.empty(count, 4, device=seeds.device)
            for column, word in enumerate(row):
                uniform[:, column] = word
            uniform = uniform.flatten()[:vocab]
            for part in uniform.split(BLOCK):
                part.add_(0.5).mul_(-(2.0**-32)).clamp_(min=2.0**-24 - 1)  # -u
                part.log1p_().neg_().log_().neg_()
            yield uniform


def _truncate(z: Tensor, top_k: int, top_p: float) -> Tensor:
    """z [V], at most 0, with -inf in place of what top_k and then top_p leave out."""
    if 0 < top_k < len(z):
        z = z.masked_fill(z < z.topk(top_k).values[-1], -torch.inf)
    if top_p < 1:
        wide = z.double()
        total = wide.exp().sum()
        # Tokens less probable than (1 - top_p) / V together miss 1 - top_p, so none is the one that
        # reaches top_p: the rest, in practice few, are all there is to sort.
        unlikely = wide < (total * ((1 - top_p) / len(z))).log()
        ordered = wide[~unlikely].sort(descending=True).values
        below = ordered.exp().cumsum(0) < top_p * total
        last = below.sum().clamp_(max=len(ordered) - 1)
        z = z.masked_fill(wide < ordered.take(last), -torch.inf)
    return z


_SAMPLE = {"eager": sample_ref}


def _check_tensors(logits: Tensor, seeds: Tensor, positions: Tensor) -> None:
    check(
        logits.dim() == 2 and logits.shape[1] > 0,
        f"sample: logits must be [B, V], not {list(logits.shape)}",
    )
    check(logits.dtype in DTYPES, f"sample: logits must be fp32, bf16 or fp16, not {logits.dtype}")
    for name, tensor in {"seeds": seeds, "positions": positions}.items():
        check(
            tensor.shape == logits.shape[:1] and tensor.dtype == torch.int64,
            f"sample: {name} must be int64 [{len(logits)}], one per row of logits,"
            f" not {tensor.dtype} {list(tensor.shape)}",
        )
        check(
            tensor.device == logits.device,
            f"sample: {name} must be on {logits.device} like logits, not on {tensor.device}",
        )
