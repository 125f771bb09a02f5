"""The figures of a run, from its requests' timelines. Failed requests count in no time or rate."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bench.serve.connection.timeline import Timeline

PERCENTILES = (90.0, 99.0)
SLO = ("ttft", "tpot", "e2el")  # what an objective may limit, in ms


def times(done: Sequence[Timeline]) -> dict[str, list[float]]:
    """Seconds of each latency, over all requests; for ITL over all intervals."""
    return {
        "TTFT": [t.ttft_s for t in done if t.ttft_s is not None],
        "TPOT": [t.tpot_s for t in done if t.tpot_s is not None],
        "ITL": [seconds for t in done for seconds in t.itl_s],
        "E2EL": [t.end_s for t in done],
    }


def distribution(seconds: Sequence[float], percentiles: Sequence[float]) -> dict[str, float]:
    """Mean, median and percentiles (linear between ranks) in milliseconds."""
    values = 1e3 * np.array(seconds)
    named = {f"p{p:g}_ms": float(np.percentile(values, p)) for p in percentiles}
    mean, median = float(values.mean()), float(np.median(values))
    return {"count": len(values), "mean_ms": mean, "median_ms": median, **named}


def totals(timelines: Sequence[Timeline], objective: Mapping[str, float]) -> dict[str, Any]:
    """Counts, rates and concurrency. Rates are over the time from the first sending to the last end
    of the requests that succeeded.

    objective: milliseconds that a good request's latencies do not exceed, by the names in SLO
    """
    done = [t for t in timelines if t.failure is None]
    if not done:
        return {"requests": len(timelines), "failed": len(timelines)}
    begin = min(t.sent_s for t in done)
    seconds = max(t.sent_s + t.end_s for t in done) - begin
    prompt, output = sum(t.prompt for t in done), sum(t.output for t in done)
    chunks = sum(len(t.chunk_s) for t in done) if all(t.shows_all for t in done) else 0
    good = sum(meets(t, objective) for t in done)
    return {
        "requests": len(timelines),
        "failed": len(timelines) - len(done),
        "seconds": seconds,
        "concurrency": sum(t.end_s for t in done) / seconds,
        "concurrency_max": most_at_once(done),
        "requests_per_second": len(done) / seconds,
        "tokens_per_second": output / seconds,
        "total_tokens_per_second": (prompt + output) / seconds,
        "prompt_tokens": prompt,
        "output_tokens": output,
        "cached_tokens": sum(t.cached for t in done),
        "tokens_per_chunk": output / chunks if chunks else None,
        "goodput_per_second": good / seconds if objective else None,
        "good_share": good / len(timelines) if objective else None,
    }


def meets(done: Timeline, objective: Mapping[str, float]) -> bool:
    """Whether a request's latencies are within an objective. The TPOT of one token is; an answer
    without text has no latencies that are."""
    tpot = 0.0 if done.output < 2 else done.tpot_s
    found = {"ttft": done.ttft_s, "tpot": tpot, "e2el": done.end_s}
    values = {name: math.inf if value is None else 1e3 * value for name, value in found.items()}
    return all(values[name] <= limit for name, limit in objective.items())


def most_at_once(done: Sequence[Timeline]) -> int:
    """The largest number of requests that ran at a time; one that ends as another begins does not
    overlap it."""
    events = sorted(
        [(t.sent_s, 1) for t in done] + [(t.sent_s + t.end_s, -1) for t in done],
    )
    running = most = 0
    for _, change in events:
        running += change
        most = max(most, running)
    return most


def failures(timelines: Sequence[Timeline]) -> str | None:
    """What failed how often, with the first message of each kind; None if nothing did."""
    kinds = Counter(t.failure for t in timelines if t.failure)
    if not kinds:
        return None
    texts = []
    for kind, count in kinds.most_common():
        detail = next((t.detail for t in timelines if t.failure == kind and t.detail), "")
        detail = " ".join(detail.split())[:200]  # one line
        texts.append(f"{count} x {kind}" + (f" ({detail})" if detail else ""))
    return f"{sum(kinds.values())} of {len(timelines)} requests failed: {'; '.join(texts)}"
