"""The figures of a run, computed by hand."""

import pytest

from bench.serve import metrics
from bench.serve.connection.timeline import Timeline

# Three requests that were answered, and one that failed.
FIRST = Timeline(10.0, 4.0, chunk_s=(1.0, 2.0, 4.0), prompt=100, output=4, cached=60)
SECOND = Timeline(12.0, 6.0, chunk_s=(3.0, 5.0), prompt=50, output=3)
THIRD = Timeline(14.0, 2.0, prompt=10, output=1)  # not streamed
FAILED = Timeline(0.0, 90.0, failure="status 429", detail="too\n\nmany\n", output=999)
RUN = (FIRST, SECOND, THIRD, FAILED)


def test_totals():
    """Rates over a time that includes failed requests, or the sum of latencies; tokens of failed
    requests; a concurrency that counts a request which ends as another begins."""
    found = metrics.totals(RUN, {})
    assert (found["requests"], found["failed"]) == (4, 1)
    assert found["seconds"] == 8.0  # 10 to 18
    assert found["concurrency"] == (4 + 6 + 2) / 8
    assert found["concurrency_max"] == 2
    assert found["requests_per_second"] == 3 / 8
    assert found["tokens_per_second"] == (4 + 3 + 1) / 8
    assert found["total_tokens_per_second"] == (160 + 8) / 8
    assert (found["prompt_tokens"], found["output_tokens"], found["cached_tokens"]) == (160, 8, 60)
    assert found["tokens_per_chunk"] == 8 / 5
    assert found["goodput_per_second"] is found["good_share"] is None


def test_all_failed():
    assert metrics.totals([FAILED], {"ttft": 1.0}) == {"requests": 1, "failed": 1}


@pytest.mark.parametrize(
    ("objective", "good"),
    [
        ({"ttft": 1000.0}, 1),  # FIRST is at the limit; THIRD has no TTFT
        ({"ttft": 999.0}, 0),
        ({"tpot": 1000.0}, 2),  # FIRST (4 - 1) / 3, SECOND (6 - 3) / 2
        ({"tpot": 1500.0, "e2el": 5999.0}, 2),
        ({"tpot": 1500.0, "e2el": 6000.0}, 3),
        ({"e2el": 1.0}, 0),
    ],
)
def test_goodput(objective: dict[str, float], good: int):
    """Requests that meet one limit of several; failed ones that are good; a share of those that
    succeeded."""
    found = metrics.totals(RUN, objective)
    assert found["goodput_per_second"] == good / 8
    assert found["good_share"] == good / 4


def test_answers_without_text_are_not_good():
    """A stream without text that meets every limit on its times."""
    empty = Timeline(0.0, 1.0, output=2)
    assert not metrics.meets(empty, {"ttft": 1e9})
    assert not metrics.meets(empty, {"tpot": 1e9})
    assert metrics.meets(empty, {"e2el": 1e9})


def test_chunks_that_show_some_tokens():
    some = Timeline(10.0, 4.0, chunk_s=(1.0, 2.0), output=40, shows_all=False)
    assert metrics.totals([FIRST, some], {})["tokens_per_chunk"] is None


def test_times():
    """ITL as one mean per request, which hides long intervals."""
    found = metrics.times([FIRST, SECOND, THIRD])
    assert found == {
        "TTFT": [1.0, 3.0],
        "TPOT": [1.0, 1.5],
        "ITL": [1.0, 2.0, 2.0],
        "E2EL": [4.0, 6.0, 2.0],
    }


def test_distribution():
    """Seconds as milliseconds; a percentile that is not interpolated as NumPy does."""
    found = metrics.distribution([0.001, 0.002, 0.003, 0.004, 0.1], (50.0, 75.0, 99.9))
    assert found["count"] == 5
    assert found["mean_ms"] == pytest.approx(22.0)
    assert found["median_ms"] == found["p50_ms"] == pytest.approx(3.0)
    assert found["p75_ms"] == pytest.approx(4.0)
    assert found["p99.9_ms"] == pytest.approx(4.0 + 0.996 * 96.0)


def test_failures():
    other = Timeline(0.0, 1.0, failure="timeout")
    assert metrics.failures([FIRST]) is None
    assert metrics.failures([FAILED, other, FAILED, FIRST]) == (
        "3 of 4 requests failed: 2 x status 429 (too many); 1 x timeout"
    )
