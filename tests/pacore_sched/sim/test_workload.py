"""Workloads: statistics of the generator, arrivals, and readers of public traces."""

from dataclasses import replace
from math import log

import numpy as np
import pytest

from model.errors import InputError
from pacore_sched.sim.workload import (
    WORKLOADS,
    SimProblem,
    bursty_arrivals,
    chat_requests,
    clipped_mean,
    find_workload,
    mu_of_clipped_mean,
    poisson_arrivals,
)


def test_the_four_workloads():
    """A changed size of a workload: all published results of the simulator depend on them."""
    shapes = {name: (w.problems, w.widths, w.mean_tokens) for name, w in WORKLOADS.items()}
    assert shapes == {
        "vqa": (96, (16,), 3_000),
        "vl": (48, (16,), 12_000),
        "math": (16, (16,), 32_000),
        "high": (16, (32, 4), 12_000),
    }


def test_rounds_and_limits():
    """A missing round or synthesis, or a length outside its limits."""
    for problem in replace(find_workload("high"), problems=40).draw(0):
        assert [len(lengths) for lengths in problem.lengths] == [32, 4, 1]
        assert all(1 <= length <= 65536 for lengths in problem.lengths for length in lengths)


@pytest.mark.parametrize("name", WORKLOADS)
@pytest.mark.parametrize("sigma_w", [0.35, 0.8])
def test_mean_is_kept_by_clipping_and_by_spread(name, sigma_w):
    """A sweep of sigma_w that changes the amount of work."""
    problems = replace(find_workload(name), problems=20_000 // 16, sigma_w=sigma_w).draw(1)
    per_problem = np.array([np.mean(problem.lengths[0]) for problem in problems])
    error = per_problem.std() / len(problems) ** 0.5
    assert abs(per_problem.mean() - WORKLOADS[name].mean_tokens) < 4 * error


def test_spreads_match_the_parameters():
    """Wrong spreads within or between problems, by analysis of variance without clipping."""
    workload = replace(find_workload("vqa"), problems=4000, max_tokens=10**9, sigma_w=0.4)
    logs = np.log([problem.lengths[0] for problem in workload.draw(0)])  # [problems, rollouts]
    within = logs.var(axis=1, ddof=1).mean()
    between = logs.mean(axis=1).var(ddof=1) - within / logs.shape[1]
    assert between**0.5 == pytest.approx(0.7, rel=0.04)
    assert within**0.5 == pytest.approx(0.4, rel=0.01)
    assert logs.mean() == pytest.approx(log(3000) - (0.7**2 + 0.4**2) / 2, abs=0.05)


def test_lengths_are_pinned():
    """Lengths that differ for the same seed, or that depend on the number of problems: policies
    could not be compared."""
    workload = find_workload("vl")
    assert workload.draw(3) == workload.draw(3)
    assert workload.draw(3) != workload.draw(4)
    assert replace(workload, problems=5).draw(3) == workload.draw(3)[:5]


def test_clipped_mean_by_sampling():
    """A wrong formula for the clipped mean, from which mu is computed."""
    values = np.exp(np.random.default_rng(0).normal(10, 0.9, 400_000)).clip(max=40_000)
    assert clipped_mean(10, 0.9, 40_000) == pytest.approx(values.mean(), rel=0.01)
    assert clipped_mean(mu_of_clipped_mean(30_000, 0.9, 40_000), 0.9, 40_000) == pytest.approx(
        30_000
    )
    assert mu_of_clipped_mean(500, 0, 1000) == pytest.approx(log(500))
    with pytest.raises(InputError, match="between 0 and the limit"):
        mu_of_clipped_mean(70_000, 0.9, 65_536)


def test_synthesis_prompt_grows_with_messages():
    """Later prompts that lack the question, the template or a message of an ended rollout."""
    problem = SimProblem(0.0, 800, 100, ((1000, 20), (5,)), template_tokens=50, message_tokens=300)
    assert problem.prompt_tokens() == 100
    messages = {1270: 300 + 20, 1200: 230 + 20, 1000: 20}  # with the image: 950 without any
    for limit, tokens in messages.items():
        assert problem.prompt_tokens([1000, 20], limit) == 100 + 50 + tokens
    assert problem.prompt_tokens([1000, 20], 960) == 100  # the question again
    assert problem.prompt_tokens([1000, 20]) == 100 + 50 + 300 + 20
    assert problem.tokens == 1025


def test_arrivals():
    """A wrong rate, or bursty arrivals with the same variation as Poisson ones."""
    even, bursty = poisson_arrivals(20_000, 0.5, 0), bursty_arrivals(20_000, 0.5, 0, variation=4.0)
    for times, variation in ((even, 1.0), (bursty, 4.0)):
        gaps = np.diff([0.0, *times])
        assert (gaps >= 0).all()
        assert gaps.mean() == pytest.approx(2.0, rel=0.1)
        assert gaps.std() / gaps.mean() == pytest.approx(variation, rel=0.1)
    with pytest.raises(InputError, match="rate"):
        poisson_arrivals(3, 0, 0)


def test_chat_requests_have_the_published_means():
    """Wrong parameters of the fit: mean output of 2,133 tokens, median input of 215."""
    problems = chat_requests(50_000, 0, [0.0] * 50_000)
    outputs = np.array([problem.tokens for problem in problems])
    assert outputs.mean() == pytest.approx(2133, rel=0.05)
    assert np.percentile(outputs, 99) == pytest.approx(15_063, rel=0.1)
    assert np.median([p.prompt_tokens() for p in problems]) == pytest.approx(215, rel=0.1)


def test_unknown_workload():
    """A traceback for a mistyped name."""
    with pytest.raises(InputError, match="unknown workload 'maths'.*math"):
        find_workload("maths")
