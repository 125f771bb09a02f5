"""Log-probabilities other than those of sampled tokens: of their alternatives, and of a prompt.

Computed in PyTorch from the logits, for the rows that ask for them, and appended to the sampler's
results, so that one copy takes everything to the host. Results with up to n alternatives are int32
[2 + 2n, columns]: a column's token and the bits of its log-probability in fp32
(`SampleOutput.results`), then the same two for each alternative, -1 in their place where there are
fewer. Columns of scored prompt tokens follow those of sampled tokens.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.runtime.staging import on_device
from pacore_sched.sched.request import SampledTokens, Sampling

BLOCK_BYTES = 64 << 20  # of logits in fp32 that are computed at a time


class TopKey(NamedTuple):
    """What a row's alternatives depend on: their number, and the distribution."""

    number: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    @staticmethod
    def of(sampling: Sampling) -> "TopKey":
        """Raw log-probabilities are processed ones at temperature 1 without truncation."""
        if sampling.logprobs == "raw":
            return TopKey(sampling.top_logprobs)
        settings = sampling.temperature, sampling.top_k, sampling.top_p
        return TopKey(sampling.top_logprobs, *settings)


@dataclass(frozen=True)
class TopRows:
    """The rows of a step that ask for alternatives, in parts with equal keys."""

    parts: tuple[tuple[TopKey, Tensor], ...]

    @staticmethod
    def of(samplings: Sequence[Sampling], device: torch.device) -> "TopRows | None":
        """Those of rows with these sampling parameters; None if there are none."""
        rows: dict[TopKey, list[int]] = {}
        for row, sampling in enumerate(samplings):
            if sampling.top_logprobs:
                rows.setdefault(TopKey.of(sampling), []).append(row)
        if not rows:
            return None
        parts = ((key, on_device(np.array(indices), device)) for key, indices in rows.items())
        return TopRows(tuple(parts))

    def append(self, results: Tensor, logits: Tensor) -> Tensor:
        """Results [2, B] of rows with these logits [B, V], with alternatives."""
        count = max(key.number for key, _ in self.parts)
        appended = _padded(results, 2 + 2 * count)
        for key, rows in self.parts:
            for block in rows.split(_block_rows(logits.shape[1])):
                top = _top(logits[block], _distribution(logits[block], key), key.number)
                appended[2 : 2 + len(top), block] = top
        return appended


def score(
    logits: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, vocab: int, top: int
) -> Tensor:
    """Results whose tokens are `targets`, int64 [T], each after a row of `hidden` [T, hidden].

    logits: the LM head; called with blocks of rows
    """
    rows, columns = _block_rows(vocab), []
    for block, ids in zip(hidden.split(rows), targets.split(rows), strict=True):
        scores = logits(block)
        logprobs = _distribution(scores, TopKey(top))
        results = _pairs(ids[:, None], logprobs)
        columns.append(torch.cat((results, _top(scores, logprobs, top))) if top else results)
    return torch.cat(columns, 1)


def joined(results: Sequence[Tensor]) -> Tensor:
    """The columns of several results, side by side."""
    height = max(map(len, results))
    return torch.cat([_padded(part, height) for part in results], 1)


def unpacked_results(results: Tensor) -> SampledTokens:
    """Results on the host, as lists."""
    tokens, logprobs = results[0].tolist(), results[1].view(torch.float32).tolist()
    if len(results) == 2:
        return SampledTokens(tokens, logprobs)
    ids, values = results[2::2].T.tolist(), results[3::2].view(torch.float32).T.tolist()
    top = [
        tuple((id, value) for id, value in zip(*column, strict=True) if value > -math.inf)
        for column in zip(ids, values, strict=True)
    ]
    return SampledTokens(tokens, logprobs, top)


def _block_rows(vocab: int) -> int:
    return max(1, BLOCK_BYTES // (4 * vocab))


def _padded(results: Tensor, height: int) -> Tensor:
    """Results with as many alternatives as fit in `height`: the bits of -1 are a NaN."""
    return F.pad(results, (0, 0, 0, height - len(results)), value=-1)


def _distribution(logits: Tensor, key: TopKey) -> Tensor:
    """Log-probabilities fp32 [B, V] that the sampler draws with, as `sample` defines them.

    On a GPU the host does not wait, as it would for the definition's top-p.
    """
    scores = logits.float()
    if key == TopKey(key.number):
        return scores.log_softmax(1)
    if key.temperature == 0:
        certain = torch.full_like(scores, -torch.inf)
        return certain.scatter_(1, scores.argmax(1, keepdim=True), 0.0)
    z = (scores - scores.amax(1, keepdim=True)).mul_(1 / key.temperature)
    if 0 < key.top_k < z.shape[1]:
        z.masked_fill_(z < z.topk(key.top_k).values[:, -1:], -torch.inf)
    if key.top_p < 1:
        ordered = z.sort(descending=True).values
        mass = ordered.double().exp_().cumsum_(1)
        last = (mass < key.top_p * mass[:, -1:]).sum(1, keepdim=True)
        z.masked_fill_(z < ordered.gather(1, last), -torch.inf)
    return z.log_softmax(1)


def _top(logits: Tensor, logprobs: Tensor, count: int) -> Tensor:
    """The `count` most likely tokens of each row as pairs, int32 [2 * count, B], or fewer if the
    vocabulary is smaller.

    In the order of their logits, the lowest id first on ties, as greedy sampling has it. Ties are
    frequent in 16 bits, and `topk` alone leaves their order open.
    """
    bits = (logits.float() + 0.0).view(torch.int32)  # -0 becomes +0
    ascending = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the logits
    vocab = logits.shape[1]
    keys = ascending.long().mul_(1 << 32)
    keys += torch.arange(vocab - 1, -1, -1, device=logits.device)
    ids = vocab - 1 - (keys.topk(min(count, vocab)).values & 0xFFFFFFFF)
    return _pairs(ids, logprobs)


def _pairs(ids: Tensor, logprobs: Tensor) -> Tensor:
    """Ids [B, n] and their log-probabilities, of [B, V], as int32 [2n, B]: one row each in turn."""
    drawn = logprobs.gather(1, ids).view(torch.int32)
    return torch.stack((ids.int(), drawn), 2).flatten(1).T
