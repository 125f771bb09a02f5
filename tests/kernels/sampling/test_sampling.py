"""sample against its definition in NumPy and fp64, Philox's test vectors, and chi-square tests."""

import json
import math
import os
import subprocess
import sys
from itertools import accumulate, product

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch

from kernels.sampling import LOGPROBS, SampleOutput, philox4x32, sample

# The seeds are fixed: a correct sampler passes the chi-square tests always or never.
P_VALUE = 1e-3
LOGPROB_ERROR = 1e-6  # relative to max(1, |logprob|)

# Random123's kat_vectors for philox4x32-10: counter, key, output.
KNOWN_ANSWERS = """
00000000 00000000 00000000 00000000 00000000 00000000 6627e8d5 e169c58d bc57ac4c 9b00dbd8
ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff 408f276d 41c83b0e a20bc7c6 6d5451fd
243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0 d16cfe09 94fdcceb 5001e420 24126ea1
"""

TRITON_SCRIPT = """
import json, sys
import torch, triton
import triton.language as tl

@triton.jit
def philox_kernel(seeds, positions, out, N: tl.constexpr):
    row = tl.program_id(0)
    position = tl.load(positions + row)
    index = tl.arange(0, N)
    low = tl.zeros([N], tl.int32) + (position & 0xFFFFFFFF).to(tl.int32)
    high = tl.zeros([N], tl.int32) + (position >> 32).to(tl.int32)
    words = tl.philox(tl.load(seeds + row), index, low, high, tl.zeros([N], tl.int32))
    for i in tl.static_range(4):
        tl.store(out + (row * N + index) * 4 + i, words[i].to(tl.int64))

seeds, positions = torch.tensor(json.load(sys.stdin))
out = torch.empty(len(seeds), 32, dtype=torch.int64)
philox_kernel[(len(seeds),)](seeds, positions, out, N=8)
json.dump(out.tolist(), sys.stdout)
"""


def draw_logits(*shape, scale=3.0, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def ints(*values):
    return torch.tensor(values, dtype=torch.int64)


def draws(logits, count, *, seeds=None, positions=None, **settings):
    """Tokens of `count` rows with the same logits [V], as NumPy; by default only positions vary."""
    seeds = torch.full((count,), 7) if seeds is None else seeds
    positions = torch.arange(count) if positions is None else positions
    return sample(logits.expand(count, -1), seeds, positions, **settings)[0].numpy()


def random_words(vocab, seed, position):
    """The random words of tokens 0..vocab-1, from Python's unbounded integers."""
    words = []
    for index in range(-(-vocab // 4)):
        c = [index, position % 2**32, (position >> 32) % 2**32, 0]
        k = [seed % 2**32, (seed >> 32) % 2**32]
        for _ in range(10):
            a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
            c = [b >> 32 ^ c[1] ^ k[0], b % 2**32, a >> 32 ^ c[3] ^ k[1], a % 2**32]
            k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
        words += c
    return words[:vocab]


def kept_tokens(z, top_k, top_p):
    """The indices of `z` that top_k and then top_p keep, including ties with the last one kept."""
    ordered = sorted(z, reverse=True)
    if top_k:
        ordered = [x for x in ordered if x >= ordered[:top_k][-1]]
    last = ordered[-1]
    if top_p < 1:
        weights = [math.exp(x - ordered[0]) for x in ordered]
        enough = top_p * math.fsum(weights)
        short = sum(mass < enough for mass in accumulate(weights))
        last = ordered[min(short, len(ordered) - 1)]
    return {i for i, x in enumerate(z) if x >= last}


def expected_token(logits, seed, position, temperature, top_k, top_p):
    """The definition in fp64 on the host, with u rounded to fp32 as it is drawn."""
    words = np.array(random_words(len(logits), seed, position), dtype=np.float32)
    u = ((words + np.float32(0.5)) * np.float32(2**-32)).astype(np.float64)
    z = (np.array(logits) - max(logits)) / temperature
    scores = z - np.log(-np.log1p(-u))
    return max(kept_tokens(z.tolist(), top_k, top_p), key=lambda i: scores[i])


def test_philox_known_answers():
    """Guards Philox's rounds, constants, key schedule and the order of its words."""
    rows = [[int(word, 16) for word in line.split()] for line in KNOWN_ANSWERS.split("\n") if line]
    columns = torch.tensor(rows).unbind(1)
    for got, want in zip(philox4x32(columns[:4], columns[4:6]), columns[6:], strict=True):
        assert torch.equal(got, want)


@pytest.mark.cli
def test_philox_matches_triton(tmp_path):
    """Guards the halves of seed and position: Triton's Philox must draw the same words."""
    seeds = [0, 1, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF0]
    positions = [0, 5, 2**31, 2**32 + 3, 2**40, -1]
    script = tmp_path / "philox.py"
    script.write_text(TRITON_SCRIPT)
    result = subprocess.run(
        [sys.executable, str(script)],
        input=json.dumps([seeds, positions]),
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    want = [random_words(32, seed, at) for seed, at in zip(seeds, positions, strict=True)]
    assert json.loads(result.stdout) == want


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.6, 0, 1.0), (1.0, 5, 1.0), (1.0, 0, 0.9), (1.5, 40, 0.7), (1.0, 99, 0.01)],
)
@pytest.mark.parametrize("vocab", [1, 2, 7, 64, 101])
def test_tokens_match_the_definition(vocab, temperature, top_k, top_p, device):
    """Guards the whole path, also for vocabularies that are not multiples of 4."""
    seeds = ints(0, 3, -1, 2**40 + 1, 12345, 2**63 - 1)
    positions = ints(0, 3, 2**33 + 1, 7, 2**31, 9)
    logits = draw_logits(len(seeds), vocab)
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    tokens, _ = sample(*(x.to(device) for x in (logits, seeds, positions)), **settings)
    rows = zip(logits.tolist(), seeds.tolist(), positions.tolist(), strict=True)
    assert tokens.tolist() == [expected_token(*row, **settings) for row in rows]


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(
    st.lists(st.sampled_from([0.0, 0.5, 1.0, -math.inf]), min_size=1, max_size=9),
    st.integers(0, 10),
    st.sampled_from([0.05, 0.3, 0.5, 0.7, 0.9, 0.99, 1.0]),
)
def test_truncation_keeps_the_right_set(logits, top_k, top_p):
    """Guards ties at both limits, the order of the limits, and the renormalisation between them.

    The least likely of 9 tokens has a probability of 0.04, so 300 draws show every token that is
    kept.
    """
    hypothesis.assume(max(logits) > -math.inf)
    want = kept_tokens(logits, top_k, top_p)
    if top_p < 1:  # a sum that equals top_p may round either way
        nearby = [kept_tokens(logits, top_k, top_p + nudge) for nudge in (-1e-6, 1e-6)]
        hypothesis.assume(nearby == [want, want])
    tokens = draws(torch.tensor(logits), 300, temperature=1.0, top_k=top_k, top_p=top_p)
    assert set(tokens.tolist()) == {i for i in want if logits[i] > -math.inf}


def test_top_p_over_a_large_vocabulary():
    """Guards the shortcut that sorts only likely tokens, and sums that fall short of 1."""
    logits = torch.stack(
        (torch.zeros(3000), draw_logits(3000, seed=1), -2 * torch.arange(1.0, 3001).log())
    )
    seeds = positions = ints(1, 2, 3)
    for top_p in (0.01, 0.5, 0.999, math.nextafter(1, 0)):
        got = sample(logits, seeds, positions, temperature=1.0, top_p=top_p)[0].tolist()
        rows = zip(logits.tolist(), (1, 2, 3), (1, 2, 3), strict=True)
        assert got == [expected_token(*row, 1.0, 0, top_p) for row in rows]


def test_top_p_reached_exactly():
    """Guards 'reaches': exp(-1e-20) is 1 in fp64, so the first of two tokens has exactly half."""
    tokens = draws(torch.tensor([0.0, -1e-20]), 64, temperature=1.0, top_p=0.5)
    assert set(tokens.tolist()) == {0}


@pytest.mark.parametrize("settings", [{}, {"top_k": 6}, {"top_p": 0.8}, {"temperature": 0.7}])
def test_distribution_is_the_softmax(settings):
    """Guards the noise: frequencies of 3,000 draws, over positions and then over seeds."""
    from scipy.stats import chisquare

    settings = {"temperature": 1.0, **settings}
    logits = draw_logits(11, scale=1.0)
    z = (logits.double() / settings["temperature"]).tolist()
    kept = sorted(kept_tokens(z, settings.get("top_k", 0), settings.get("top_p", 1.0)))
    probability = torch.softmax(torch.tensor(z, dtype=torch.float64)[kept], 0).numpy()
    for seeds, positions in ((None, None), (torch.arange(3000) * 2**20, torch.full((3000,), 3))):
        tokens = draws(logits, 3000, seeds=seeds, positions=positions, **settings)
        counts = np.bincount(tokens, minlength=11)
        assert counts.sum() == counts[kept].sum()
        assert chisquare(counts[kept], probability * 3000).pvalue > P_VALUE


def test_positions_and_seeds_are_independent():
    """Guards against correlation of a token with the next one and with the next seed's."""
    from scipy.stats import chi2_contingency

    logits, count = draw_logits(6, scale=0.5), 3000
    here = draws(logits, count + 1, temperature=1.0)
    neighbour = draws(logits, count, seeds=torch.full((count,), 8), temperature=1.0)
    for other in (here[1:], neighbour):
        table = np.zeros((6, 6))
        np.add.at(table, (here[:count], other), 1)
        assert chi2_contingency(table).pvalue > P_VALUE


@pytest.mark.parametrize(("batch", "vocab"), [(9, 1003), (5, 150001)])
def test_a_row_does_not_depend_on_its_batch(batch, vocab, device):
    """Guards bits against row index, batch size, blocking of rows, and a broken neighbour."""
    logits = draw_logits(batch, vocab).to(device)
    seeds, positions = torch.arange(batch).to(device) * 11, torch.arange(batch).to(device) + 100
    settings = {"temperature": 0.9, "top_p": 0.95}
    tokens, logprobs = sample(logits, seeds, positions, **settings)
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(1)).to(device)
    subsets = [order, order[: batch // 2], *torch.arange(batch).to(device).split(1)]
    for rows in subsets:
        got = sample(logits[rows], seeds[rows], positions[rows], **settings)
        assert torch.equal(got[0], tokens[rows])
        assert torch.equal(got[1], logprobs[rows])
    logits[0] = torch.nan
    got = sample(logits, seeds, positions, **settings)
    assert torch.equal(got[0][1:], tokens[1:]) and torch.equal(got[1][1:], logprobs[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logprob_is_of_the_logits_as_given(dtype):
    """Guards against log-probabilities after temperature or truncation, and 16-bit sums."""
    logits = draw_logits(8, 4999).to(dtype)
    seeds = torch.arange(8)
    want = torch.log_softmax(logits.double(), -1)
    for settings in ({"temperature": 0.0}, {"temperature": 2.0, "top_k": 50, "top_p": 0.9}):
        tokens, logprobs = sample(logits, seeds, seeds, **settings)
        expected = want.gather(1, tokens[:, None])[:, 0]
        error = ((logprobs - expected).abs() / expected.abs().clamp_min(1)).max().item()
        assert logprobs.dtype == torch.float32 and error < LOGPROB_ERROR
        assert torch.equal(tokens, sample(logits.float(), seeds, seeds, **settings)[0])


def test_temperature_zero_and_tiny():
    """Guards argmax, which takes the lowest index on ties, and overflow of logits / temperature."""
    logits = draw_logits(5, 100, scale=30)
    logits[:, 90] = logits[:, 40] = 200.0
    seeds = torch.arange(5)
    assert sample(logits, seeds, seeds, temperature=0)[0].tolist() == [40] * 5
    tied = draws(logits[0], 64, temperature=2.0**-126)
    assert set(tied.tolist()) == {40, 90}
    logits[:, 90] = 0
    for temperature in (0.0, 1e-30, 1e-3):
        assert sample(logits, seeds, seeds, temperature=temperature)[0].tolist() == [40] * 5


def test_huge_temperature_is_uniform():
    """Guards scores that all vanish: only a logit of -inf is excluded."""
    from scipy.stats import chisquare

    logits = draw_logits(8, scale=100)
    logits[3] = -torch.inf
    counts = np.bincount(draws(logits, 4000, temperature=2.0**126), minlength=8)
    assert counts[3] == 0
    assert chisquare(np.delete(counts, 3)).pvalue > P_VALUE


def test_minus_infinity_is_never_drawn():
    """Guards the mask: one finite logit among -inf, at every index."""
    logits = torch.full((13, 13), -torch.inf).fill_diagonal_(-50.0)
    seeds = torch.arange(13)
    for settings in ({}, {"top_k": 5}, {"top_p": 0.5}, {"temperature": 1e6}):
        tokens, logprobs = sample(logits, seeds, seeds, **{"temperature": 1.0, **settings})
        assert torch.equal(tokens, seeds)
        assert torch.equal(logprobs, torch.zeros(13))


def test_uniform_stays_between_zero_and_one():
    """Guards u against 1, with which a token could never win, and 0, with which it would always
    win.

    Token 48 of the first position has the word 2^32 - 29, token 10 of the second the word 0.
    """
    high, low = 58585, 81904568
    assert random_words(49, 0, high)[48] == 0xFFFFFFE3 and random_words(11, 0, low)[10] == 0
    logits = torch.full((1, 49), -torch.inf)
    logits[0, 48] = 0
    assert sample(logits, ints(0), ints(high), temperature=1.0)[0].item() == 48
    logits = torch.zeros(1, 11)
    logits[0, 10] = -30
    assert sample(logits, ints(0), ints(low), temperature=1.0)[0].item() != 10


def test_rows_that_are_no_distribution():
    """Guards rows with NaN, +inf or only -inf: every mode reports them instead of drawing."""
    logits = draw_logits(5, 20)
    logits[0, 3], logits[1, 4], logits[2], logits[3] = torch.nan, torch.inf, -torch.inf, torch.nan
    seeds = torch.arange(5)
    modes = ({"temperature": 0}, {"temperature": 0.6}, {"top_k": 3}, {"top_p": 0.5}, {"top_k": 1})
    for kind, mode in product(LOGPROBS, modes):
        settings = {"temperature": 1.0, "logprobs": kind, **mode}
        tokens, logprobs = sample(logits, seeds, seeds, **settings)
        assert tokens[:4].tolist() == [-1] * 4 and logprobs[:4].isnan().all()
        assert tokens[4] >= 0 and logprobs[4].isfinite()


def test_shapes_and_strides():
    """Guards the empty batch, strided rows, and against writing into the logits."""
    tokens, logprobs = sample(torch.zeros(0, 9), ints(), ints(), temperature=1.0)
    assert tokens.shape == logprobs.shape == (0,) and tokens.dtype == torch.int32
    logits, seeds = draw_logits(17, 6), torch.arange(12)[::2]
    before = logits.clone()
    strided = sample(logits.t(), seeds, seeds, temperature=1.0)
    packed = sample(logits.t().contiguous(), seeds.clone(), seeds.clone(), temperature=1.0)
    assert torch.equal(strided[0], packed[0]) and torch.equal(strided[1], packed[1])
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    ("field", "tensor"),
    [
        ("results", torch.zeros(2, 2)),
        ("results", torch.zeros(2, 3, dtype=torch.int32)),
        ("results", torch.zeros(2, 2, dtype=torch.int32).t()),
        ("ids", torch.zeros(2, dtype=torch.int32)),
        ("ids", ints(1, 2, 3)),
        ("last", torch.zeros(9)),
        ("last", ints(*range(9))[::2]),
        ("batch_indices", ints(1)),
        ("batch_indices", None),
        ("batch_indices", torch.zeros(2, dtype=torch.int64, device="meta")),
    ],
)
def test_bad_outputs_are_named(field, tensor):
    """Guards the kernel, which writes through these pointers without checking them."""
    good = {
        "results": torch.zeros(2, 2, dtype=torch.int32),
        "ids": ints(0, 0),
        "last": ints(*range(9)),
        "batch_indices": ints(3, 4),
    }
    logits, seeds = torch.zeros(2, 8), ints(1, 2)
    sample(logits, seeds, seeds, temperature=0, out=SampleOutput(**good))
    with pytest.raises(ValueError, match=rf"out\.{field}"):
        sample(logits, seeds, seeds, temperature=0, out=SampleOutput(**good | {field: tensor}))


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("temperature", {"temperature": -1.0}),
        ("temperature", {"temperature": math.nan}),
        ("temperature", {"temperature": math.inf}),
        ("temperature", {"temperature": 1e-40}),
        ("top_p", {"top_p": 0.0}),
        ("top_p", {"top_p": 1.1}),
        ("top_p", {"top_p": math.nan}),
        ("top_k", {"top_k": -1}),
        ("top_k", {"top_k": 2.5}),
        ("logprobs must be 'raw' or 'processed', not 'both'", {"logprobs": "both"}),
        ("logits", {"logits": torch.zeros(8)}),
        ("logits", {"logits": torch.zeros(2, 0)}),
        ("logits", {"logits": torch.zeros(2, 8, dtype=torch.int64)}),
        ("logits", {"logits": torch.zeros(2, 8, dtype=torch.float64)}),
        ("seeds", {"seeds": ints(1)}),
        ("seeds", {"seeds": torch.zeros(2)}),
        ("seeds", {"seeds": torch.zeros(2, dtype=torch.int64, device="meta")}),
        ("positions", {"positions": ints(1, 2, 3)}),
        ("positions", {"positions": torch.zeros(2, dtype=torch.int32)}),
    ],
)
def test_bad_arguments_are_named(message, change):
    """Guards the launcher's checks: each mistake raises a ValueError that names the argument."""
    good = {"logits": torch.zeros(2, 8), "seeds": ints(1, 2), "positions": ints(1, 2)}
    with pytest.raises(ValueError, match=message):
        sample(**{**good, "temperature": 1.0, **change})
