"""Log-probabilities of sample, raw and processed: the definition against fp64 brute force and
transformers, the Triton form against the definition."""

import math

import pytest
import torch

from kernels.sampling import sample
from tests.kernels.sampling.test_sampling import LOGPROB_ERROR, draw_logits, kept_tokens
from tests.kernels.sampling.test_sampling_triton import (
    POSITIONS,
    ROWS,
    SEEDS,
    SETTINGS,
    VOCABS,
    assert_same,
    both,
    randn,
    real_configs,
    small_configs,  # noqa: F401 - for all tests here
)

PROCESSED = {"temperature": 1.0, "logprobs": "processed"}
# Every kind of distribution: all tokens at a temperature, and each limit alone and with the other.
DRAWN_FROM = [
    {"temperature": 0.3},
    {"temperature": 2.5},
    {"top_k": 3},
    {"top_k": 1},
    {"top_p": 0.8},
    {"top_p": 1e-6},
    {"top_k": 6, "temperature": 0.7},
    {"top_p": 0.55, "temperature": 1.8},
    {"top_k": 5, "top_p": 0.75, "temperature": 0.6},
    {"top_k": 100, "top_p": 0.999},
]
NO_LIMITS = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}


def hard_rows(vocab: int) -> torch.Tensor:
    """Rows of logits with ties, also at a cut, with -inf, and with one token that is likely."""
    rows = draw_logits(5, vocab, seed=vocab)
    rows[1] = rows[1].round()
    rows[2, ::2] = -torch.inf
    rows[2, -1] = 1.0
    rows[3] = 0.0
    rows[4, vocab // 2] = 20.0
    return rows


def expected_logprob(row, token, temperature, top_k, top_p):
    """The fp64 log-probability of `token` among the tokens that are kept."""
    z = [x / temperature for x in row]
    kept = [z[i] for i in kept_tokens(z, top_k, top_p)]
    assert z[token] in kept
    return z[token] - max(kept) - math.log(math.fsum(math.exp(x - max(kept)) for x in kept))


@pytest.mark.parametrize("settings", DRAWN_FROM, ids=str)
@pytest.mark.parametrize("vocab", [1, 2, 7, 64, 101])
def test_processed_is_of_the_distribution_drawn_from(vocab, settings, device):
    """Guards the temperature, both limits and the renormalisation over what they keep."""
    logits, seeds = hard_rows(vocab), torch.arange(5) * 3
    moved = (x.to(device) for x in (logits, seeds, seeds))
    tokens, logprobs = sample(*moved, **PROCESSED | settings)
    rows = zip(logits.tolist(), tokens.tolist(), strict=True)
    want = [expected_logprob(*row, **NO_LIMITS | settings) for row in rows]
    errors = [abs(got - x) / max(1, abs(x)) for got, x in zip(logprobs.tolist(), want, strict=True)]
    assert max(errors) < LOGPROB_ERROR


@pytest.mark.parametrize("impl", ["eager", "triton"])
@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-6}], ids=str)
def test_the_only_token_has_log_probability_0(settings, impl, triton_device):
    """Guards against the raw value, or a rounded one, or -0.0 in JSON, where a draw is certain."""
    logits, seeds = randn(4, 300).to(triton_device), torch.arange(4, device=triton_device)
    logits[1, 5:] = -torch.inf
    settings = {"temperature": 1.0, "impl": impl, **settings}
    assert str(sample(logits, seeds, seeds, **settings, logprobs="processed")[1].tolist()) == str(
        [0.0] * 4
    )
    assert (sample(logits, seeds, seeds, **settings)[1] < -0.1).all()


@pytest.mark.parametrize("settings", DRAWN_FROM, ids=str)
def test_probabilities_add_up_to_1(settings):
    """Guards the denominator: over all tokens that occur in 2,000 draws."""
    row = torch.tensor([0.5, -1.0, 0.5, 1.2, -0.3, -torch.inf, 0.1])
    positions = torch.arange(2000)
    drawn = sample(row.expand(2000, -1), positions * 0, positions, **PROCESSED | settings)
    of_tokens = set(zip(drawn[0].tolist(), drawn[1].tolist(), strict=True))
    assert len(of_tokens) == len({token for token, _ in of_tokens})
    assert math.fsum(math.exp(logprob) for _, logprob in of_tokens) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_raw_and_processed_are_equal_without_temperature_and_limits(impl, triton_device):
    """Guards the promise that at temperature 1 either may be used, to the last bit."""
    logits, seeds = randn(6, 997).to(triton_device), torch.arange(6, device=triton_device)
    for settings in ({}, {"top_k": 997}):
        calls = [
            sample(logits, seeds, seeds, temperature=1.0, logprobs=kind, impl=impl, **settings)
            for kind in ("raw", "processed")
        ]
        assert torch.equal(calls[0][0], calls[1][0]) and torch.equal(calls[0][1], calls[1][1])


@pytest.mark.judge
@pytest.mark.parametrize(
    "settings",
    [{"temperature": 0.6}, {"top_k": 40}, {"top_p": 0.9},
     {"temperature": 1.4, "top_k": 50, "top_p": 0.8}],
    ids=str,
)  # fmt: skip
def test_processed_agrees_with_transformers(settings):
    """Guards the meaning of the settings, and their order: temperature, top-k, top-p."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits, seeds = draw_logits(16, 4999), torch.arange(16)
    scores = logits.double()
    for name, warper in (
        ("temperature", TemperatureLogitsWarper),
        ("top_k", TopKLogitsWarper),
        ("top_p", TopPLogitsWarper),
    ):
        if name in settings:
            scores = warper(settings[name])(None, scores)
    tokens, logprobs = sample(logits, seeds, seeds, **PROCESSED | settings)
    want = scores.log_softmax(-1).gather(1, tokens[:, None].long())[:, 0]
    assert ((logprobs - want).abs() / want.abs().clamp_min(1)).max() < LOGPROB_ERROR


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("vocab", VOCABS)
def test_triton_agrees_with_the_definition(vocab, settings, triton_device):
    """Guards the sums of each mode: blocks past the cut, the last block, sums without a temperature
    or relative to another maximum."""
    logits = randn(1, vocab, seed=vocab)
    at = torch.tensor([vocab % len(SEEDS)])
    draw = SEEDS[at], POSITIONS[at]
    assert_same(*both(triton_device, logits, *draw, **settings, logprobs="processed"))


@pytest.mark.parametrize(
    "settings", [{"temperature": 0.6}, {"top_k": 333}, {"top_k": 20, "top_p": 0.58}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_triton_on_hard_rows(dtype, settings, triton_device):
    """Guards ties at the cut, blocks of -inf, and logits of any size, in every dtype."""
    rows = torch.stack([make(499) for make in ROWS.values()]).clamp_min(-60000.0)
    rows[list(ROWS).index("one"), :240] = -torch.inf
    want, got = both(triton_device, rows.to(dtype), **settings, logprobs="processed")
    assert_same(want, got)


@pytest.mark.parametrize("settings", [{"temperature": 0.6}, {"top_p": 0.9}], ids=str)
def test_triton_on_the_full_vocabulary(settings, triton_device):
    """Guards the real configs, against fp64: torch's own sum of 151,936 exponentials is worse."""
    logits = randn(1, 151_936)
    with real_configs():
        _, (token, logprob) = both(triton_device, logits, **settings, logprobs="processed")
    z = logits[0].double() / settings.get("temperature", 1.0)
    ordered = z.sort(descending=True).values
    mass = ordered.softmax(0).cumsum(0)
    kept = ordered[: int((mass < settings.get("top_p", 1.0)).sum()) + 1]
    assert logprob.item() == pytest.approx((z[token] - kept.logsumexp(0)).item(), abs=LOGPROB_ERROR)
