"""`sample` on a CPU: the definition's tokens, with noise for the tokens that can win only.

Tokens are divided into groups of 16, whose largest logits and smallest words bound the scores in
them. Only the groups that can hold a row's winner, a few dozen, get exact scores:

    maxima   reads the logits once; the only pass over them apart from the log-softmax
    cut      the smallest z that top_k and top_p keep, from the groups that reach down to it
    bound    where too many groups are left: the smallest of each group's words. Philox is most of
             the work of a draw without truncation
    winner   the exact scores in the groups with the highest bounds, until no other can reach them

Where rounding could decide, the definition does: for a row with two scores within CLOSE of each
other, or with top_p within TOP_P_ERROR of a probability that it is compared with. The tokens are
therefore those of the definition, also where torch rounds a logarithm differently in a tensor of
another shape. Log-probabilities are computed as in the definition, and are the same bits.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from kernels.sampling.philox import gumbel_, words_of
from kernels.sampling.reference import aligned_rows, logprobs_of, sample_ref

LOGIT_BLOCK = 1 << 20  # logits processed at a time: 4 MiB
FIRST_GROUPS = 64  # scored at first, per row: rarely too few, as 16 are expected to be needed
MOST_NOISE, LEAST_NOISE = 22.9, -2.9  # noise lies between them
CLOSE = 2.0**-14  # scores have errors of a few ulp of 32, 2^-19 each
TOP_P_ERROR = 1e-9  # sums of 2^20 fp64 terms have errors of at most 2^-33


def sample_portable(
    logits: Tensor,
    seeds: Tensor,
    positions: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    logprobs: str,
) -> tuple[Tensor, Tensor]:
    """The results of `sample_ref`, bit by bit, at a lower cost."""
    logits, rows = logits.detach(), max(1, LOGIT_BLOCK // logits.shape[1])
    parts = [
        _sample_rows(*part, temperature, top_k, top_p, logprobs)
        for part in zip(logits.split(rows), seeds.split(rows), positions.split(rows), strict=True)
        if len(part[0])
    ]
    if not parts:
        return seeds, seeds.float()
    tokens, drawn = zip(*parts, strict=True)
    return torch.cat(tokens), torch.cat(drawn)


def _sample_rows(
    logits: Tensor,
    seeds: Tensor,
    positions: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    logprobs: str,
) -> tuple[Tensor, Tensor]:
    groups = _Groups.of(aligned_rows(logits), temperature)
    unsure = torch.zeros_like(seeds, dtype=torch.bool)
    cut = groups.z.new_full((len(seeds), 1), -torch.inf)
    if temperature == 0:
        tokens = _first_peaks(groups)
    else:
        if 0 < top_k < groups.width or top_p < 1:
            cut, unsure = _cut(groups, top_k, top_p)
        tokens, close = _winners(groups, cut, seeds, positions)
        unsure |= close
    drawn = _logprobs(groups, tokens, cut, temperature, logprobs)
    tokens = torch.where(drawn.isnan(), -1, tokens)[:, 0]
    drawn = drawn[:, 0]
    if unsure.any():
        draw = (logits[unsure], seeds[unsure], positions[unsure])
        tokens[unsure], drawn[unsure] = sample_ref(*draw, temperature, top_k, top_p, logprobs)
    return tokens, drawn


@dataclass(frozen=True)
class _Groups:
    """Rows of scores in G groups of 16 tokens: group g has those of quads g + i * G, i < 4."""

    scores: Tensor  # fp32 [R, 16 * G]
    peak: Tensor  # [R, 1]
    inverse: float  # of the temperature
    z: Tensor  # [R, G]: the largest of each group

    @staticmethod
    def of(scores: Tensor, temperature: float) -> "_Groups":
        quads = scores.view(len(scores), 4, -1).amax(1)
        maxima = quads.view(len(scores), -1, 4).amax(2)
        peak = maxima.amax(1, keepdim=True)
        inverse = 1 / (temperature or 1)
        return _Groups(scores, peak, inverse, (maxima - peak).mul_(inverse))

    @property
    def count(self) -> int:
        return self.z.shape[1]

    @property
    def width(self) -> int:
        return self.scores.shape[1]

    def reaching(self, least: Tensor) -> int:
        """How many groups have a finite z of at least `least` [R, 1], in the row with the most."""
        return max(1, int((self.z >= least.clamp_min(torch.finfo().min)).sum(1).max()))

    def quads(self, groups: Tensor) -> Tensor:
        """[R, n] -> [R, 4 n]"""
        steps = torch.arange(0, 4 * self.count, self.count, device=groups.device)
        return (groups[:, :, None] + steps).flatten(1)

    def highest(self, count: int) -> Tensor:
        """The tokens of the `count` groups with the largest logits, [R, 16 * count]."""
        return _tokens(self.quads(self.z.topk(count).indices))

    def z_of(self, tokens: Tensor) -> Tensor:
        """z at `tokens` [R, n]."""
        return self.scores.gather(1, tokens).sub_(self.peak).mul_(self.inverse)

    def all_z(self) -> Tensor:
        """z at all tokens, [R, 16 * G]."""
        return (self.scores - self.peak).mul_(self.inverse)

    def z_reaching(self, least: Tensor) -> Tensor:
        """z of the tokens in groups that reach `least` [R, 1], and perhaps of others."""
        count = self.reaching(least)
        if 4 * count > self.count:
            return self.all_z()
        return self.z_of(self.highest(count))


def _tokens(quads: Tensor) -> Tensor:
    """[R, n] -> [R, 4 n]"""
    return (quads[:, :, None] * 4 + torch.arange(4, device=quads.device)).flatten(1)


def _first_peaks(groups: _Groups) -> Tensor:
    """The first token with the largest logit, [R, 1]."""
    tokens = groups.highest(groups.reaching(torch.zeros_like(groups.peak)))
    last = groups.width - 1  # where nothing equals NaN
    return tokens.masked_fill_(groups.z_of(tokens) != 0, last).amin(1, keepdim=True)


def _cut(groups: _Groups, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """The smallest z that top_k and top_p keep, [R, 1]; and where rounding decides about top_p."""
    if 0 < top_k < groups.width:
        # The k-th largest token is at least the k-th largest maximum of a group.
        least = groups.z.new_full((len(groups.z), 1), -torch.inf)
        if top_k <= groups.count:
            least = groups.z.topk(top_k).values[:, -1:]
        z = groups.z_reaching(least)
        cut = z.topk(min(top_k, z.shape[1])).values[:, -1:]
        z.masked_fill_(z < cut, -torch.inf)
    else:
        # Whatever is further down has a probability below exp(-30) in total.
        deep = -30 - math.log(groups.width)
        z = groups.z_reaching(torch.full_like(groups.peak, deep))
    if top_p == 1:
        return cut, torch.zeros_like(cut[:, 0], dtype=torch.bool)
    weights = z.double().exp_()
    total = weights.sum(1, keepdim=True)
    spare = (1 - top_p) * total
    # Tokens less probable than (1 - top_p) / V add up to less than 1 - top_p: all are removed.
    likely = int((weights > 0.999 * spare / z.shape[1]).sum(1).max())
    ordered = _largest(z, max(1, likely))
    mass = ordered.double().exp_().cumsum(1)
    mass += total - mass[:, -1:]
    removed = (mass <= spare).sum(1, keepdim=True).clamp_(max=ordered.shape[1] - 1)
    unsure = ((mass - spare).abs_() <= TOP_P_ERROR * total).any(1)
    return ordered.gather(1, removed), unsure


def _largest(z: Tensor, count: int) -> Tensor:
    """The `count` largest of each row in ascending order; reorders `z`.

    On a CPU NumPy finds them: torch.sort takes 30 times as long.
    """
    if z.device.type != "cpu":
        return z.sort().values[:, -count:]
    rows = z.numpy()
    rows.partition(-count, axis=1)
    rows[:, -count:].sort(axis=1)
    return z[:, -count:]


def _winners(
    groups: _Groups, cut: Tensor, seeds: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """The token with the largest score, [R, 1]; and whether another's is close to it, [R]."""
    # The best token has z = 0 and a score of at least LEAST_NOISE.
    able = groups.reaching(cut.clamp_min(LEAST_NOISE - MOST_NOISE))
    words, noise = None, groups.z.new_full((1, 1), MOST_NOISE)
    if 4 * able > groups.count:
        able = FIRST_GROUPS
        quads = torch.arange(4 * groups.count, device=seeds.device)[None]
        words = words_of(quads, seeds, positions)
        noise = gumbel_(_least(words, groups.count).float())
    bound = (groups.z + noise).masked_fill_(groups.z < cut, -torch.inf)
    while True:
        highest, chosen = bound.topk(min(able + 1, groups.count))
        quads = groups.quads(chosen[:, :able])
        if words is None:
            drawn = words_of(quads, seeds, positions)
        else:
            drawn = tuple(word.gather(1, quads) for word in words)
        scores = gumbel_(torch.stack(drawn, dim=2).flatten(1).float())
        tokens = _tokens(quads)
        z = groups.z_of(tokens)
        scores.add_(z).masked_fill_(z < cut, -torch.inf)
        best, index = scores.topk(2)
        if not (highest[:, able:] >= best[:, :1] - CLOSE).any():
            return tokens.gather(1, index[:, :1]), best[:, 0] - best[:, 1] <= CLOSE
        able *= 4


def _least(words: Sequence[Tensor], count: int) -> Tensor:
    """The smallest word of each of `count` groups, [R, count]. (torch.amin is slow with int64.)"""
    of_quads = reduce(torch.minimum, words)
    return reduce(torch.minimum, of_quads.view(len(of_quads), 4, count).unbind(1))


def _logprobs(
    groups: _Groups, tokens: Tensor, cut: Tensor, temperature: float, logprobs: str
) -> Tensor:
    """The log-probabilities of `tokens` [R, 1], as `sample_ref` computes them."""
    if logprobs == "raw":
        return logprobs_of(tokens, groups.scores)
    if temperature == 0:
        return groups.z_of(tokens) * 0  # NaN where the row is no distribution
    z = groups.all_z()
    return logprobs_of(tokens, z.masked_fill_(z < cut, -torch.inf))
