"""The Triton form of sample: kept sets and tokens exactly as defined, noise within a bound.

On a CPU the kernels are interpreted, so shapes are small and blocks smaller: 256 tokens, in groups
of 64, of which the search for the cut reads 8 at a time.
"""

import math
from contextlib import contextmanager
from itertools import product

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from kernels.runtime.configs import use_config
from kernels.sampling import LOGPROBS, SampleOutput, sample
from kernels.sampling import op as sampling
from kernels.sampling.noise import gumbel, rough_gumbel
from kernels.sampling.reference import _truncate

ULP = 2.0**-24
NOISE_ERROR = 5 * ULP  # of gumbel, relative to max(1, |noise|); 2.3 measured
LOGPROB_ERROR = 1e-6  # relative to max(1, |logprob|)

# 1; part of a group; a block minus one, a block, a block plus one; four blocks, the last with a
# partial group (997 is a prime).
VOCABS = (1, 7, 255, 256, 257, 997)
SEEDS = torch.tensor([0, 3, -1, 2**40 + 1, 12345, 2**63 - 1, -(2**63)])
POSITIONS = torch.tensor([0, 2**32 + 3, 2**33 + 1, 7, 2**31, -1, 9])
SETTINGS = [
    {"temperature": 0},
    {},
    {"temperature": 0.6},
    {"temperature": 2.0**126},
    {"temperature": 2.0**-126},
    {"top_k": 1},
    {"top_k": 5, "temperature": 1.5},
    {"top_p": 0.9},
    {"top_p": 1e-6},
    {"top_p": 0.8, "temperature": 2.0**-126},
    {"top_p": 0.8, "temperature": 2.0**126},
    {"top_k": 40, "top_p": 0.7, "temperature": 0.7},
    {"top_k": 900, "top_p": 0.99},
]


@pytest.fixture(autouse=True)
def small_configs():
    with (
        use_config("sample_scan", block=256, num_warps=1),
        use_config("sample_cut", tile=8, num_warps=1),
    ):
        yield


@contextmanager
def real_configs():
    with (
        use_config("sample_scan", block=4096, num_warps=4),
        use_config("sample_cut", tile=64, num_warps=16),
    ):
        yield


@pytest.fixture
def cuts(monkeypatch):
    """The depths of the cuts of every call, in order."""
    depths, find = [], sampling._cut

    def spy(*args):
        depths.append(find(*args))
        return depths[-1]

    monkeypatch.setattr(sampling, "_cut", spy)
    return depths


def randn(*shape, scale=3.0, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def both(device, logits, seeds=None, positions=None, **settings):
    """Tokens and log-probabilities of the eager and the Triton form, on the CPU."""
    batch = len(logits)
    seeds = torch.arange(batch) * 7 if seeds is None else seeds
    positions = torch.arange(batch) + 2**33 if positions is None else positions
    settings = {"temperature": 1.0, **settings}
    want = sample(logits, seeds, positions, impl="eager", **settings)
    moved = (x.to(device) for x in (logits, seeds, positions))
    got = sample(*moved, impl="triton", **settings)
    return want, tuple(x.cpu() for x in got)


def assert_same(want, got):
    assert torch.equal(want[0], got[0])
    known = want[0] >= 0
    error = (got[1] - want[1]).abs() / want[1].abs().clamp_min(1)
    assert got[1][~known].isnan().all() and (error[known] < LOGPROB_ERROR).all()


def kept(logits, cut, temperature):
    """A mask [B, V] of the tokens kept by the depths `cut`, and the scaled logits."""
    top = logits.float().amax(1, keepdim=True)
    z = (logits - top).mul_(1 / temperature)
    return z.abs().view(torch.int32) <= cut.cpu()[:, None], z


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("vocab", VOCABS)
def test_tokens_are_those_of_the_definition(vocab, settings, triton_device):
    """Guards the whole path: blocks, groups, words of noise, both halves of seed and position."""
    logits = randn(1, vocab, seed=vocab)
    at = torch.tensor([vocab % len(SEEDS)])
    assert_same(*both(triton_device, logits, SEEDS[at], POSITIONS[at], **settings))


@pytest.mark.parametrize("settings", [{}, {"top_k": 50, "top_p": 0.9}, {"top_p": 0.95}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, id="bf16")])
def test_full_vocabulary(dtype, settings, triton_device):
    """Guards the real configs: 38 blocks, 2,374 groups, and a flat row, whose cut takes many
    passes."""
    logits = randn(1, 151_936, scale=1.0).to(dtype)
    with real_configs():
        assert_same(*both(triton_device, logits, **settings))


def test_many_draws(triton_device):
    """Guards the noise: many different tokens win, and exactly where they should."""
    want, got = both(triton_device, randn(1, 97, scale=0.5).expand(50, -1))
    assert torch.equal(want[0], got[0]) and len(want[0].unique()) > 30


ROWS = {
    "equal": lambda n: torch.zeros(n),
    "one": lambda n: torch.full((n,), -torch.inf).index_fill_(0, torch.tensor(n // 2), 3.0),
    "one of many": lambda n: torch.zeros(n).index_fill_(0, torch.tensor(n // 3), 40.0),
    "levels": lambda n: torch.randint(6, (n,), generator=torch.Generator().manual_seed(5)) * 0.7,
    "half": lambda n: torch.where(torch.arange(n) % 2 == 0, randn(n, scale=2.0), -torch.inf),
    "flat": lambda n: randn(n, scale=0.3),
    "ramp": lambda n: -torch.arange(n) * 0.01,
    "power": lambda n: -2 * torch.arange(1.0, n + 1).log(),
    "one group": lambda n: torch.where(torch.arange(n) // 64 == 3, randn(n), randn(n) - 30),
    "close": lambda n: 1 + torch.arange(n) * 2.0**-23,  # neighbours in fp32
    "near 0": lambda n: -(2.0 ** -(torch.arange(n) % 120.0)),
    "far": lambda n: -(2.0 ** (torch.arange(n) % 120.0)),
}


@pytest.mark.parametrize(
    "settings",
    [
        {"top_k": 3},
        {"top_k": 333},  # more than there are groups
        {"top_k": 498},
        {"top_p": 0.03},
        {"top_p": 0.9},
        {"top_k": 20, "top_p": 0.58, "temperature": 0.7},  # between the masses of 11 and of 12
    ],
    ids=str,
)
def test_the_kept_set(settings, triton_device, cuts):
    """Guards the search for the cut: ties at it, plateaus, padding, and depths of any size."""
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, **settings}
    logits = torch.stack([make(499) for make in ROWS.values()])
    both(triton_device, logits, **settings)
    got, z = kept(logits, cuts[0], settings["temperature"])
    for name, row, finite, mask in zip(ROWS, z, z > -torch.inf, got, strict=True):
        _truncate(row, settings["top_k"], settings["top_p"])
        assert torch.equal((row > -torch.inf), mask & finite), name


def test_the_cut_does_not_depend_on_the_config(triton_device, cuts):
    """Guards lists that shrink while they are read, and reads beyond their ends."""
    logits = torch.stack((randn(997, scale=0.5), randn(997, scale=5.0)))
    for tile in (2, 16):
        with use_config("sample_cut", tile=tile):
            both(triton_device, logits, top_k=200, top_p=0.9)
    assert all(torch.equal(cuts[0], other) for other in cuts[1:])


def test_rows_that_are_no_distribution(triton_device):
    """Guards rows with NaN, +inf or only -inf, anywhere: every mode must report them."""
    logits = randn(6, 300)
    logits[0, 3], logits[1, 299], logits[2], logits[3, 280] = (
        torch.nan,
        torch.inf,
        -torch.inf,
        torch.nan,
    )
    logits[4, :290] = -torch.inf
    for kind, mode in product(
        LOGPROBS, ({"temperature": 0}, {"temperature": 0.6}, {"top_k": 3}, {"top_p": 0.5})
    ):
        want, got = both(triton_device, logits, logprobs=kind, **mode)
        assert got[0][:4].tolist() == [-1] * 4
        assert_same(want, got)


def test_ties_go_to_the_lowest_index(triton_device):
    """Guards temperature 0 within and between blocks, next to a logit that rounds to the same z."""
    logits = randn(2, 997).clamp_max(5)
    logits[0, [300, 301, 900]], logits[1, [996, 50, 51]] = 7.0, 7.0
    logits[0, 10] = 7 - 2.0**-21
    assert both(triton_device, logits, temperature=0)[1][0].tolist() == [300, 50]


@pytest.mark.parametrize("logprobs", ["raw", "processed"])
@pytest.mark.parametrize("settings", [{}, {"top_k": 9, "top_p": 0.9}], ids=str)
def test_a_row_does_not_depend_on_its_batch(settings, logprobs, triton_device):
    """Guards bits against the row's index, the batch size, all strides, and a broken neighbour."""
    logits = randn(5, 600).to(triton_device)
    seeds, positions = (torch.arange(n, n + 5).to(triton_device) for n in (3, 100))
    settings = {"temperature": 0.9, "logprobs": logprobs, "impl": "triton", **settings}
    want = sample(logits, seeds, positions, **settings)
    wide = torch.full((10, 640), torch.nan, device=triton_device)
    wide[1::2, 20:620] = logits.flip(0)
    twice = (x.flip(0).repeat_interleave(2)[::2] for x in (seeds, positions))
    got = sample(wide[1::2, 20:620], *twice, **settings)
    assert torch.equal(got[0].flip(0), want[0]) and torch.equal(got[1].flip(0), want[1])
    one = sample(logits[2:3], seeds[2:3], positions[2:3], **settings)
    assert torch.equal(one[0], want[0][2:3]) and torch.equal(one[1], want[1][2:3])
    got = sample(wide[:2, 20:620], seeds[3:], positions[3:], **settings)
    assert got[0].tolist() == [-1, want[0][4].item()] and torch.equal(got[1][1], want[1][4])


def test_the_token_does_not_depend_on_the_block(triton_device):
    """Guards that the block size affects speed only."""
    logits = randn(2, 700)
    for block in (64, 1024):
        with use_config("sample_scan", block=block):
            assert_same(*both(triton_device, logits, temperature=0.8))
            assert_same(*both(triton_device, logits, temperature=0.8, top_k=30))


@pytest.mark.parametrize("impl", ["eager", "triton"])
@pytest.mark.parametrize(
    "fields", [(), ("ids",), ("last", "batch_indices"), ("ids", "last", "batch_indices")]
)
def test_where_tokens_are_written(impl, fields, triton_device):
    """Guards the next step's input: a token goes to its row and to its owner's entry, 0 for a
    broken row, and no other entry changes; and results whose number of rows gives no alignment."""
    logits = randn(3, 300).to(triton_device)
    logits[1] = torch.nan
    seeds = torch.arange(3).to(triton_device)
    settings = {"temperature": 1.0, "impl": impl}
    tokens, logprobs = sample(logits, seeds, seeds, **settings)
    assert tokens[1] == -1 and tokens[0] != tokens[2] and min(tokens[0], tokens[2]) > 0
    every = {
        "ids": torch.full((3,), 7),
        "last": torch.full((6,), 7),
        "batch_indices": torch.tensor([4, 0, 3]),
    }
    feeds = {name: every[name].to(triton_device) for name in fields}
    out = SampleOutput.of(3, seeds.device, **feeds)
    got = sample(logits, seeds, seeds, out=out, **settings)
    for x, want in zip(got, (tokens, logprobs), strict=True):
        assert torch.equal(x.view(torch.int32), want.view(torch.int32))
    assert got[0].data_ptr() == out.results.data_ptr()
    first, last = tokens[0].item(), tokens[2].item()
    if "ids" in feeds:
        assert feeds["ids"].tolist() == [first, 0, last]
    if "last" in feeds:
        assert feeds["last"].tolist() == [0, 7, 7, last, first, 7]


@triton.jit
def gumbel_kernel(words, out, N: tl.constexpr):
    index = tl.program_id(0) * N + tl.arange(0, N)
    drawn = tl.load(words + index).to(tl.uint32)
    high, slack = rough_gumbel(drawn)
    tl.store(out + 3 * index, gumbel(drawn))
    tl.store(out + 3 * index + 1, high)
    tl.store(out + 3 * index + 2, slack)


def test_noise_is_accurate(triton_device):
    """Guards both logarithms, with u near 0, near 1 and at the seams between their ranges; and the
    rough noise, which rules out most tokens and so must be a true bound."""
    rng, half = np.random.default_rng(0), 1 << 16
    seams = [2**32 // 3, 2**32 * 2 // 3, int(2**32 * (1 - math.exp(-1))), 2**31, 2**32 - 2**7]
    words = np.concatenate(
        [
            np.arange(4096),
            2**32 - 1 - np.arange(4096),
            (2.0 ** rng.uniform(0, 32, half)).astype(np.int64),
            2**32 - 1 - (2.0 ** rng.uniform(0, 32, half)).astype(np.int64) % 2**32,
            *(seam + np.arange(-1024, 1024) for seam in seams),
        ]
    )
    words = np.minimum(words[: len(words) // 2048 * 2048], 2**32 - 1)
    out = torch.full((len(words), 3), torch.nan, device=triton_device)
    moved = torch.from_numpy(words).to(triton_device)
    gumbel_kernel[(len(words) // 2048,)](moved, out, N=2048, enable_fp_fusion=False)
    u = (words.astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32)
    want = -np.log(-np.log1p(-np.minimum(u, np.float32(1 - ULP)).astype(np.float64)))
    noise, high, slack = out.double().cpu().numpy().T
    assert (np.abs(noise - want) / np.maximum(np.abs(want), 1)).max() < NOISE_ERROR
    assert (high - want).min() > 2e-5 and (high - slack - want).max() < -2e-5


def test_empty_batch_and_strided_logits(triton_device):
    """Guards the empty batch, and the message for logits that are not contiguous."""
    none = torch.zeros(0, dtype=torch.int64, device=triton_device)
    tokens, logprobs = sample(
        torch.zeros(0, 9, device=triton_device), none, none, temperature=1.0, top_k=3, impl="triton"
    )
    assert tokens.shape == logprobs.shape == (0,) and tokens.dtype == torch.int32
    seeds = torch.arange(4, device=triton_device)
    with pytest.raises(ValueError, match="contiguous"):
        sample(
            torch.zeros(9, 4, device=triton_device).t(),
            seeds,
            seeds,
            temperature=1.0,
            impl="triton",
        )


@pytest.mark.gpu
@pytest.mark.parametrize("logprobs", ["raw", "processed"])
@pytest.mark.parametrize(
    "settings", [{"temperature": 0.0}, {}, {"top_k": 50, "top_p": 0.9}], ids=str
)
def test_replay_of_a_graph(settings, logprobs):
    """Guards CUDA graphs: the host never waits, and no launch depends on the logits."""
    logits, seeds = randn(64, 151_936).cuda(), torch.arange(64).cuda()
    settings = {"temperature": 0.8, "logprobs": logprobs, "impl": "triton", **settings}
    with real_configs():
        sample(logits, seeds, seeds, **settings)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = sample(logits, seeds, seeds, **settings)
        logits.copy_(randn(64, 151_936, seed=1))
        graph.replay()
        want = sample(logits, seeds, seeds, **settings)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
