"""Simulated workloads: problems with pinned lengths, which are the same for every policy.

A rollout's length is clip(exp(mu + b + w), 1, max_tokens); b ~ N(0, sigma_b) is common to a problem
and w ~ N(0, sigma_w) is drawn per rollout, so lengths in a problem are correlated. mu gives the
workload's mean after clipping. The lengths of parts are assumed, because no figures are public: an
image of 836 tokens (a photo of 1920 x 1080: 8 crops and the global view), questions of 64 to 192
tokens, 256 tokens of a synthesis prompt's own text, and messages (a rollout's text after
`</think>`) of 512 tokens, or the whole of a shorter rollout.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import erf, exp, log, sqrt

import numpy as np

from model.errors import InputError
from pacore_sched.answers.message_budget import tokens_kept
from pacore_sched.answers.rounds import round_widths

SIGMA_B, SIGMA_W = 0.7, 0.55
MAX_TOKENS = 65536
TEMPLATE_TOKENS, MESSAGE_TOKENS = 256, 512


@dataclass(frozen=True)
class Photo:
    """An image: the pixels of its file, its tokens in a prompt, and the crops that it is cut into
    besides the global view."""

    pixels: int
    tokens: int
    crops: int


PHOTO_1080P = Photo(1920 * 1080, 836, 8)
PHOTO_720P = Photo(1280 * 720, 670, 6)


@dataclass(frozen=True)
class SimProblem:
    """A simulated problem: rollout i of round r generates `lengths[r][i]` tokens."""

    arrival_s: float
    image_tokens: int  # at the start of every round's prompt; 0 without an image
    question_tokens: int
    lengths: tuple[tuple[int, ...], ...]
    template_tokens: int = TEMPLATE_TOKENS
    message_tokens: int = MESSAGE_TOKENS  # upper limit per rollout
    photos: tuple[Photo, ...] = ()  # encoded before the image tokens are prefilled

    @property
    def tokens(self) -> int:
        """Number of tokens generated in all rounds."""
        return sum(map(sum, self.lengths))

    def prompt_tokens(self, ended: Sequence[int] | None = None, limit: int | None = None) -> int:
        """Prompt tokens after the image: of the first round, or of a round whose previous round's
        rollouts ended with the lengths `ended`.

        Messages are cut and dropped, as in answers/message_budget.py, until the image and the
        prompt have at most `limit` tokens. Unfinished rollouts are not told from others.
        """
        if ended is None:
            return self.question_tokens
        messages = [min(length, self.message_tokens) for length in ended]
        fixed = self.question_tokens + self.template_tokens
        if limit is not None:
            messages = tokens_kept(messages, limit - self.image_tokens - fixed)
        return fixed + sum(messages) if any(messages) else self.question_tokens


@dataclass(frozen=True)
class Workload:
    """A distribution of problems. `widths` are the exploring rounds; the mean is over rollouts."""

    name: str
    problems: int
    widths: tuple[int, ...]
    mean_tokens: float
    photos: tuple[Photo, ...]
    question_tokens: int
    sigma_b: float = SIGMA_B
    sigma_w: float = SIGMA_W
    max_tokens: int = MAX_TOKENS

    def draw(self, seed: int, arrivals: Sequence[float] | None = None) -> list[SimProblem]:
        """The problems of one seed; they all arrive at 0, or at the times `arrivals`.

        A problem's lengths depend only on the seed and its number.
        """
        sigma = sqrt(self.sigma_b**2 + self.sigma_w**2)
        mu = mu_of_clipped_mean(self.mean_tokens, sigma, self.max_tokens)
        times = arrivals if arrivals is not None else [0.0] * self.problems
        return [
            SimProblem(
                float(times[number]),
                sum(photo.tokens for photo in self.photos),
                self.question_tokens,
                self._lengths(mu, np.random.default_rng([seed, number])),
                photos=self.photos,
            )
            for number in range(self.problems)
        ]

    def _lengths(self, mu: float, rng: np.random.Generator) -> tuple[tuple[int, ...], ...]:
        common = mu + rng.normal(0, self.sigma_b)
        rounds = (
            np.exp(common + rng.normal(0, self.sigma_w, width))
            for width in round_widths(self.widths)
        )
        return tuple(tuple(_whole(values, self.max_tokens)) for values in rounds)


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("vqa", 96, (16,), 3_000, (PHOTO_1080P,), 64),
        Workload("vl", 48, (16,), 12_000, (PHOTO_1080P,), 192),
        Workload("math", 16, (16,), 32_000, (), 192),
        Workload("high", 16, (32, 4), 12_000, (PHOTO_1080P,), 192),
    )
}


def find_workload(name: str) -> Workload:
    """The workload called `name`. Raises InputError for an unknown name, listing known ones."""
    if name not in WORKLOADS:
        raise InputError(f"unknown workload {name!r}; choose one of {', '.join(WORKLOADS)}")
    return WORKLOADS[name]


def chat_requests(count: int, seed: int, arrivals: Sequence[float]) -> list[SimProblem]:
    """Single-rollout problems with the lengths of ServeGen's fit of deepseek-r1 traffic.

    Log-normal: output mu 7.020, sigma 1.111 (mean 2,133), input mu 5.370, sigma 1.955.
    """
    rng = np.random.default_rng(seed)
    inputs = _whole(rng.lognormal(5.370, 1.955, count), MAX_TOKENS // 2)
    outputs = _whole(rng.lognormal(7.020, 1.111, count), MAX_TOKENS // 2)
    triples = zip(arrivals, inputs, outputs, strict=True)
    return [SimProblem(float(time), 0, read, ((written,),)) for time, read, written in triples]


def photo_requests(count: int, seed: int, arrivals: Sequence[float]) -> list[SimProblem]:
    """Single-rollout problems of two 720p images and 128 text tokens, with 1 to 1,024 new tokens.

    Lengths are uniform, as sglang.bench_serving draws them with --random-range-ratio 0.
    """
    photos = (PHOTO_720P,) * 2
    image_tokens = sum(photo.tokens for photo in photos)
    lengths = np.random.default_rng(seed).integers(1, 1025, count).tolist()
    return [
        SimProblem(float(time), image_tokens, 128, ((length,),), photos=photos)
        for time, length in zip(arrivals, lengths, strict=True)
    ]


def mu_of_clipped_mean(mean: float, sigma: float, limit: float) -> float:
    """mu for which min(exp(N(mu, sigma)), limit) has this mean. Raises InputError if none does."""
    if not 0 < mean < limit:
        raise InputError(f"the mean of {mean:g} tokens must be between 0 and the limit, {limit:g}")
    low, high = log(mean) - sigma**2, log(limit) + 10 * sigma + 1
    for _ in range(200):
        middle = (low + high) / 2
        if clipped_mean(middle, sigma, limit) < mean:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def clipped_mean(mu: float, sigma: float, limit: float) -> float:
    """The mean of min(exp(N(mu, sigma)), limit)."""
    if sigma == 0:
        return min(exp(mu), limit)
    z = (log(limit) - mu) / sigma
    return exp(mu + sigma**2 / 2) * _normal_cdf(z - sigma) + limit * _normal_cdf(-z)


def poisson_arrivals(count: int, rate: float, seed: int) -> list[float]:
    """`count` arrival times in seconds, at `rate` per second."""
    return bursty_arrivals(count, rate, seed, variation=1.0)


def bursty_arrivals(count: int, rate: float, seed: int, variation: float = 4.0) -> list[float]:
    """Arrival times with gamma-distributed gaps of this coefficient of variation (1: Poisson)."""
    if rate <= 0:
        raise InputError(f"the rate must be positive, not {rate:g} problems per second")
    shape = 1 / variation**2
    gaps = np.random.default_rng([seed, count]).gamma(shape, 1 / (rate * shape), count)
    return np.cumsum(gaps).tolist()


def _whole(values: np.ndarray, limit: int) -> list[int]:
    return np.clip(np.rint(values), 1, limit).astype(int).tolist()


def _normal_cdf(z: float) -> float:
    return (1 + erf(z / sqrt(2))) / 2
