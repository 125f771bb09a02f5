"""A workload on a server: `python -m bench serve`."""

import os
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from bench.measure.origin import origin
from bench.serve import metrics
from bench.serve.connection import load, target
from bench.serve.connection.client import Client
from bench.serve.connection.load import Load
from bench.serve.connection.own_server import OwnServer
from bench.serve.connection.timeline import Timeline
from bench.serve.workloads.requests import (
    CHAT,
    FIRST,
    LATER,
    PATHS,
    Bodies,
    Lengths,
    Request,
    arrivals,
    prefix_repetition,
    random_requests,
    trace_requests,
)
from model.errors import InputError
from model.terminal import progress

KEY_VARIABLE = "OPENAI_API_KEY"
BUSY, LATE_MS = 0.7, 50.0  # beyond these, the client limits the load
CACHED = 0.1  # of prompt tokens; beyond it, prompts came again


async def run(server: OwnServer | None, options: SimpleNamespace, device: torch.device) -> list:
    """The rows of one run; `server` is ours, or None for the one at `base_url`.

    Raises InputError if the server cannot be reached, does not have the model, or refuses the
    first request.
    """
    url = server.url if server else options.base_url
    where = "" if server else f"{target.address(url)} "
    key = options.api_key or (None if server else os.environ.get(KEY_VARIABLE))
    async with Client(url, key) as client:
        name = await target.find_model(client, None if server else options.model)
        requests, warmups = await workload(client, name, options)
        path = PATHS[options.backend]
        limit = options.max_concurrency
        for done in (await load.run(client, path, warmups, max_concurrency=limit)).timelines:
            if done.failure:
                what = "the warm-up failed"
                if done.failure.startswith("status "):
                    what = "the server refused the warm-up"
                detail = f": {done.detail}" if done.detail else ""
                raise InputError(f"{what}: {done.failure}{detail}")
        with progress("serve", len(requests)) as advance:
            result = await load.run(client, path, requests, max_concurrency=limit, advance=advance)
    case = f"{where}{name} {case_text(options, len(requests))}"
    at = origin(device)
    if not server:  # whose machine and code are not known
        at["device"] = f"client: {at['device']}"
    return [row | at for row in rows(case, options, requests, result)]


async def workload(
    client: Client, name: str, options: SimpleNamespace
) -> tuple[list[Request], list[Request]]:
    """The requests that count, with their times, and those of the warm-up."""
    if options.backend != CHAT and options.dataset_name in ("image", "pacore"):
        raise InputError(f"--dataset-name {options.dataset_name} needs --backend {CHAT}")
    bodies = Bodies(
        options.backend,
        name,
        await target.prompts(client, name),
        options.seed,
        stream=not options.disable_stream,
        ignore_eos=options.ignore_eos,
        extra=options.extra_request_body,
    )
    count, extra = options.num_prompts, options.num_warmups
    if options.dataset_name == "trace":
        limit = count if options.num_prompts_given else None
        requests = trace_requests(bodies, options.dataset_path, limit, options.request_rate)
        # No copies of requests that count: a prefix cache would have them.
        short = replace(bodies, seed=bodies.seed + 1)
        return requests, random_requests(short, range(-extra, 0), Lengths(64, 8))
    made = _made(bodies, range(count), options)
    times = arrivals(count, options.request_rate, options.burstiness, options.seed)
    requests = [replace(r, arrival_s=at) for r, at in zip(made, times, strict=True)]
    return requests, _made(replace(bodies, seed=bodies.seed + 1), range(-extra, 0), options)


def _made(bodies: Bodies, numbers: Sequence[int], options: SimpleNamespace) -> list[Request]:
    dataset = options.dataset_name
    if dataset == "prefix_repetition":
        return prefix_repetition(
            bodies,
            numbers,
            options.prefix_repetition_prefix_len,
            options.prefix_repetition_suffix_len,
            options.prefix_repetition_num_prefixes,
            options.prefix_repetition_output_len,
        )
    lengths = Lengths(
        options.random_input_len, options.random_output_len, options.random_range_ratio
    )
    if dataset == "image":
        images, size = options.image_count, options.image_resolution
        return random_requests(bodies, numbers, lengths, images=images, size=size)
    widths = options.pacore_widths if dataset == "pacore" else None
    return random_requests(bodies, numbers, lengths, widths=widths)


def case_text(options: SimpleNamespace, count: int) -> str:
    """What was sent, such as "random 1024+128 x 1000, 4/s"."""
    dataset = options.dataset_name
    parts = [dataset]
    if dataset == "trace":
        parts.append(options.dataset_path.name)
    elif dataset == "prefix_repetition":
        parts.append(
            f"{options.prefix_repetition_num_prefixes} x {options.prefix_repetition_prefix_len}"
            f"+{options.prefix_repetition_suffix_len}+{options.prefix_repetition_output_len}"
        )
    else:
        ratio = f" +-{options.random_range_ratio:g}" if options.random_range_ratio else ""
        parts.append(f"{options.random_input_len}+{options.random_output_len}{ratio}")
    if dataset == "image":
        parts.append(f"{options.image_count} x {'x'.join(map(str, options.image_resolution))}")
    if dataset == "pacore":
        parts.append(f"widths {options.pacore_widths}")
    text = f"{' '.join(parts)} x {count}"
    if options.request_rate:
        text += f", {options.request_rate:g}/s"
        text += f" burstiness {options.burstiness:g}" if options.burstiness != 1 else ""
    if options.max_concurrency:
        text += f", at most {options.max_concurrency} at once"
    text += ", completions" if options.backend != CHAT else ""
    return text + (", not streamed" if options.disable_stream else "")


def rows(
    case: str, options: SimpleNamespace, requests: Sequence[Request], result: Load
) -> list[dict[str, Any]]:
    """A row of totals, and one per latency that was seen."""
    timelines = result.timelines
    timed = options.dataset_name == "trace" or options.request_rate
    late = float(np.percentile([1e3 * t.late_s for t in timelines], 99)) if timed else None
    totals = metrics.totals(timelines, options.goodput)
    row = {
        "op": "serve",
        "case": case,
        "impl": "load",
        "dtype": "none",
        **totals,
        "goodput": options.goodput or None,
        "late_p99_ms": late,
        "client_cpu": result.cpu,
        "warnings": warnings(result.cpu, late) + seen_before(options.dataset_name, totals),
        "failure": metrics.failures(timelines),
    }
    named: dict[str, list[float]] = {}
    done = [t for t in timelines if t.failure is None]
    named |= metrics.times(done)
    for group in (FIRST, LATER):
        named[f"TTFT, {group}"] = _ttft_of(group, requests, timelines)
    if options.dataset_name == "pacore":
        named["E2EL (time to answer)"] = named.pop("E2EL")
    return [row] + [
        {
            "op": "serve_latency",
            "case": case,
            "impl": name,
            "dtype": "none",
            **metrics.distribution(seconds, options.metric_percentiles),
            "failure": None,
        }
        for name, seconds in named.items()
        if seconds
    ]


def _ttft_of(group: str, requests: Sequence[Request], done: Sequence[Timeline]) -> list[float]:
    return [
        timeline.ttft_s
        for request, timeline in zip(requests, done, strict=True)
        if request.group == group and timeline.failure is None and timeline.ttft_s is not None
    ]


def seen_before(dataset: str, totals: dict[str, Any]) -> list[str]:
    """A warning if prompts that all begin differently were in the server's prefix cache."""
    share = totals.get("cached_tokens", 0) / max(1, totals.get("prompt_tokens", 0))
    if dataset not in ("random", "image") or share <= CACHED:
        return []
    return [
        f"{100 * share:.0f} % of the prompts' tokens were cached: the server has seen these"
        " prompts: use another --seed"
    ]


def warnings(cpu: float, late_ms: float | None) -> list[str]:
    """What makes the figures those of the client."""
    found = []
    if cpu > BUSY:
        found.append(f"the client used {100 * cpu:.0f} % of a core: latencies include its own")
    if late_ms is not None and late_ms > LATE_MS:
        found.append(f"requests were sent late (p99 {late_ms:.0f} ms): the rate was not reached")
    return found
