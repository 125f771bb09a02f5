"""Sending a workload: each request at its time, whatever has become of those before it."""

import asyncio
import gc
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.serve.connection.client import Client, Exchange
from bench.serve.connection.timeline import Timeline, timeline
from bench.serve.workloads.requests import Request


@dataclass(frozen=True)
class Load:
    """What a workload has led to: a timeline per request, and this process's share of a CPU."""

    timelines: list[Timeline]
    cpu: float


async def run(
    client: Client,
    path: str,
    requests: Sequence[Request],
    *,
    max_concurrency: int | None = None,
    advance: Callable[[int], None] = lambda n: None,
) -> Load:
    """Send all requests, at most `max_concurrency` at a time. A request that waits for another to
    end is not late, and its latencies begin when it is sent."""
    bodies = [json.dumps(request.body).encode() for request in requests]  # not while it is timed
    gate = asyncio.Semaphore(max_concurrency or len(requests) or 1)
    gc.collect()
    gc.freeze()  # or collections of what the process has imported would show as latencies
    begin, cpu = time.perf_counter(), time.process_time()

    async def one(request: Request, body: bytes) -> Exchange:
        ready = time.perf_counter()
        async with gate:
            exchange = await client.send(path, body)
        exchange.due_s = begin + request.arrival_s + (exchange.sent_s - ready)
        advance(1)
        return exchange

    tasks = []
    for request, body in zip(requests, bodies, strict=True):
        wait = begin + request.arrival_s - time.perf_counter()
        if wait > 0:
            await asyncio.sleep(wait)
        tasks.append(asyncio.create_task(one(request, body)))
    exchanges = await asyncio.gather(*tasks)
    share = (time.process_time() - cpu) / (time.perf_counter() - begin)
    gc.unfreeze()
    timelines = [
        timeline(e, stream=bool(r.body.get("stream")), shows_all=r.has_one_text)
        for e, r in zip(exchanges, requests, strict=True)
    ]
    return Load(timelines, share)
