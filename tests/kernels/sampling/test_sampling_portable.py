"""The portable form of sample against its definition, bit by bit."""

import math
from itertools import product

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from kernels.sampling import LOGPROBS, portable, sample

SETTINGS = [
    {"temperature": temperature} | limits
    for temperature, limits in product(
        [0.2, 1.0, 3.0],
        [{}, {"top_k": 1}, {"top_k": 20}, {"top_p": 0.9}, {"top_k": 20, "top_p": 0.95}],
    )
] + [{"temperature": 0.0}]
VALUES = [0.0, -0.0, 0.5, 1.0, -1e-20, -30.0, 3e38, -3e38, math.inf, -math.inf, math.nan]


def assert_exact(logits, seeds, positions, **settings):
    """All results of the portable form are those of the definition."""
    calls = [
        sample(logits, seeds, positions, **settings, impl=impl) for impl in ("eager", "portable")
    ]
    (want, want_logprobs), (got, got_logprobs) = calls
    assert torch.equal(want, got)
    bits = [x.nan_to_num(nan=1.0).view(torch.int32) for x in (want_logprobs, got_logprobs)]
    assert torch.equal(*bits)


def rows_like(vocab, *, scales=(0.0, 0.01, 1.0, 3.0, 8.0), mean=0.0):
    """Rows of logits, from flat to peaked; with their seeds and positions."""
    generator = torch.Generator().manual_seed(vocab)
    rows = torch.randn(len(scales), vocab, generator=generator) * torch.tensor(scales)[:, None]
    seeds = torch.randint(-(2**62), 2**62, (len(scales),), generator=generator)
    return rows + mean, seeds, seeds.flip(0) // 7


@pytest.mark.parametrize("logprobs", LOGPROBS)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("vocab", [1, 15, 16, 17, 333, 4096, 10007])
def test_results_are_the_definitions(vocab, settings, logprobs):
    """Guards every bound: a group left out that holds the winner, a cut that is off by one token,
    tokens in another order, and the last group of a row."""
    assert_exact(*rows_like(vocab), **settings, logprobs=logprobs)


@hypothesis.settings(max_examples=150, deadline=None, derandomize=True)
@hypothesis.given(
    st.lists(st.lists(st.sampled_from(VALUES), min_size=1, max_size=3), min_size=1, max_size=4),
    st.integers(1, 70),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from([0.0, 2.0**-126, 1e-3, 0.7, 1.0, 2.0**126]),
    st.integers(0, 80),
    st.sampled_from([1e-9, 0.25, 0.5, 0.75, 1 - 2.0**-53, 1.0]),
    st.sampled_from(LOGPROBS),
    st.integers(0, 2**31),
)
def test_ties_and_rows_that_are_no_distribution(
    kinds, vocab, dtype, temperature, top_k, top_p, logprobs, seed
):
    """Guards ties within and between groups and at both limits, probabilities that equal top_p,
    -inf, NaN, infinities, temperatures that overflow, and rows next to such rows."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.stack(
        [
            torch.tensor(values)[torch.randint(len(values), (vocab,), generator=generator)]
            for values in kinds
        ]
    )
    draw = torch.randint(-(2**62), 2**62, (2, len(kinds)), generator=generator)
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "logprobs": logprobs}
    assert_exact(rows.to(dtype), *draw, **settings)


def test_tokens_far_below_the_best_count_for_top_p():
    """Guards the total against groups that are left out: 160 tokens at -3 have most of the mass."""
    logits = torch.full((2, 16384), -100.0)
    logits[:, 5] = 0
    logits[1, 100:4900:30] = -3.0
    seeds = torch.arange(2)
    for logprobs in LOGPROBS:
        assert_exact(logits, seeds, seeds, temperature=1.0, top_p=0.9, logprobs=logprobs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_16_bit_logits(settings, dtype):
    """Guards ties at the k-th token, which most rows of 16-bit logits have."""
    logits, seeds, positions = rows_like(5000)
    assert_exact(logits.to(dtype), seeds, positions, **settings)


@pytest.mark.parametrize("settings", [{"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.9}])
def test_blocks_of_rows(settings, monkeypatch):
    """Guards rows against the block that they are sampled in, and the settings of later blocks."""
    draw = rows_like(3000)
    whole = sample(*draw, **settings, impl="portable")
    monkeypatch.setattr(portable, "LOGIT_BLOCK", 6001)
    for want, got in zip(whole, sample(*draw, **settings, impl="portable"), strict=True):
        assert torch.equal(want, got)


def test_more_groups_are_scored_until_no_other_can_win(monkeypatch):
    """Guards the loop over groups: with one at a time, bounds decide when to stop."""
    monkeypatch.setattr(portable, "FIRST_GROUPS", 1)
    logits, seeds, positions = rows_like(2048, scales=[0.5] * 64)
    assert_exact(logits, seeds, positions, temperature=1.0)


def test_where_rounding_could_decide_the_definition_does(monkeypatch):
    """Guards the two doubts: two scores within CLOSE, and a probability that equals top_p."""
    logits, seeds, positions = rows_like(500, scales=[0.0] * 3)
    asked = []
    original = portable.sample_ref

    def recorded(rows, *rest):
        asked.append(len(rows))
        return original(rows, *rest)

    monkeypatch.setattr(portable, "sample_ref", recorded)
    assert_exact(logits, seeds, positions, temperature=1.0)
    assert asked == []
    assert_exact(logits, seeds, positions, temperature=1.0, top_p=0.5)  # of 250 equal tokens
    assert asked == [3]
    monkeypatch.setattr(portable, "CLOSE", 100.0)
    assert_exact(logits, seeds, positions, temperature=1.0)
    assert asked == [3, 3]


def test_a_view_of_logits_is_not_written_to():
    """Guards rows used in place: aligned ones, and ones at another address, keep their bits."""
    storage = torch.randn(4 * 512 + 1, generator=torch.Generator().manual_seed(1))
    before = storage.clone()
    seeds = torch.arange(4)
    for first in (0, 1):
        logits = storage[first : first + 4 * 512].view(4, 512)
        for settings in SETTINGS:
            assert_exact(logits, seeds, seeds, **settings, logprobs="processed")
    assert torch.equal(storage, before)


@torch.no_grad()
def test_logits_that_require_grad():
    """Guards NumPy, which takes no tensor that requires one, not even where none is recorded."""
    logits, seeds, positions = rows_like(500)
    settings = {"temperature": 1.0, "top_p": 0.9, "impl": "portable"}
    want = sample(logits, seeds, positions, **settings)[0]
    assert torch.equal(sample(logits.requires_grad_(), seeds, positions, **settings)[0], want)
