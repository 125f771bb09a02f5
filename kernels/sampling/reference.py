"""The definition of `sample`, in eager PyTorch."""

import torch
from torch import Tensor

from kernels.runtime.arithmetic import cdiv
from kernels.sampling.philox import gumbel_, words_of

ROW_ALIGNMENT = 16  # rows are padded to multiples of this many fp32, 64 bytes, to be aligned alike
COUNTER_BLOCK = 1 << 17  # counters computed at a time on a CPU: five int64 buffers of 1 MiB


def sample_ref(
    logits: Tensor,
    seeds: Tensor,
    positions: Tensor,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    logprobs: str = "raw",
) -> tuple[Tensor, Tensor]:
    """The definition of `sample`: int64 tokens and fp32 log-probabilities.

    Exponentials, logarithms and sums are computed row by row, over rows with the same alignment,
    because torch may round them differently for other shapes and alignments.
    """
    scores = aligned_rows(logits)
    z = scores - scores.amax(1, keepdim=True)
    if temperature > 0:
        z.mul_(1 / temperature)
        for row in z:
            _truncate(row, top_k, top_p)
        tokens = _noise(seeds, positions, scores.shape[1] // 4).add_(z).argmax(1, keepdim=True)
    else:
        tokens = z.argmax(1, keepdim=True)
        z = torch.full_like(z, -torch.inf).scatter_(1, tokens, z.gather(1, tokens))
    drawn = logprobs_of(tokens, scores if logprobs == "raw" else z)
    tokens = torch.where(drawn.isnan(), -1, tokens)
    return tokens[:, 0], drawn[:, 0]


def logprobs_of(tokens: Tensor, scores: Tensor) -> Tensor:
    """The log-probabilities of `tokens` [B, 1] in the softmax of fp32 `scores` [B, V].

    Not by log_softmax, which adds a row's exponentials one after the other in each SIMD lane: at V
    151,936 it is off by 50 roundoffs with AVX-512 and 100 with AVX2, logsumexp by 5.
    """
    z = scores - scores.amax(1, keepdim=True)  # small sums round less
    return z.gather(1, tokens) - z.logsumexp(1, keepdim=True)


def aligned_rows(logits: Tensor) -> Tensor:
    """Logits in fp32 with rows padded by -inf: all start at multiples of 64 bytes. May be `logits`
    themselves."""
    batch, vocab = logits.shape
    width = cdiv(vocab, ROW_ALIGNMENT) * ROW_ALIGNMENT
    aligned = logits.is_contiguous() and logits.data_ptr() % (4 * ROW_ALIGNMENT) == 0
    if logits.dtype == torch.float32 and width == vocab and aligned:
        return logits
    scores = logits.new_full((batch, width), -torch.inf, dtype=torch.float32)
    scores[:, :vocab] = logits
    return scores


def _noise(seeds: Tensor, positions: Tensor, count: int) -> Tensor:
    """-log(-log1p(-u)) of tokens 0 .. 4 * count - 1, fp32 [B, 4 * count]."""
    noise = torch.empty(len(seeds), count, 4, device=seeds.device)
    quads = torch.arange(count, device=seeds.device)[None]
    rows = max(1, len(seeds) if seeds.is_cuda else COUNTER_BLOCK // count)
    for block, *draws in zip(
        noise.split(rows), seeds.split(rows), positions.split(rows), strict=True
    ):
        for column, word in enumerate(words_of(quads, *draws)):
            block[:, :, column] = word
    noise = noise.flatten(1)
    for row in noise:
        gumbel_(row)
    return noise


def _truncate(z: Tensor, top_k: int, top_p: float) -> None:
    """Set to -inf the elements of z [V] (all <= 0) that top_k and then top_p remove."""
    if 0 < top_k < len(z):
        z.masked_fill_(z < z.topk(top_k).values[-1], -torch.inf)
    if top_p < 1:
        wide = z.double()
        total = wide.exp().sum()
        # Tokens less probable than (1 - top_p) / V add up to less than 1 - top_p, so none of them
        # is the one that reaches top_p. Only the others, in practice few, have to be sorted.
        unlikely = wide < (total * ((1 - top_p) / len(z))).log()
        ordered = wide[~unlikely].sort(descending=True).values
        below = ordered.exp().cumsum(0) < top_p * total
        last = below.sum().clamp_(max=len(ordered) - 1)
        z.masked_fill_(wide < ordered.take(last), -torch.inf)
