"""A thousand requests on our server, some of which misbehave: `python -m bench serve soak`.

Clients leave before their answer and within it, bodies are malformed, and there is too little KV
for all. No page may leak, no answer may be lost, doubled or another request's, and memory may not
grow.
"""

import asyncio
import json
import time
from collections.abc import Callable
from types import SimpleNamespace

import torch

from bench.measure.origin import origin
from bench.serve.connection.client import Client, Exchange
from bench.serve.connection.own_server import OwnServer
from bench.serve.connection.target import find_model
from bench.serve.connection.timeline import timeline
from bench.serve.soak_checks import Seen, rows
from bench.serve.workloads import mix
from model.errors import InputError
from model.terminal import progress

PATH = "/v1/chat/completions"
# Too little KV for all that are sent at once. /debug/integrity needs --debug.
SERVER = ("--debug", "--kv-tokens", "1536", "--max-running", "16")
CHECK_EVERY = 100  # requests
SAMPLE = 25  # requests that are sent again, alone
HEALTH_S, RSS_S, POLL_S = 0.05, 0.2, 0.05  # between probes
IDLE_S = 60.0


async def run(server: OwnServer, options: SimpleNamespace, device: torch.device) -> list[dict]:
    """A row per check."""
    async with Client(server.url) as client:
        name = await find_model(client, None)
        with progress("soak", options.num_prompts) as advance:
            seen = await soak(
                client,
                name,
                options.num_prompts,
                options.max_concurrency,
                options.seed,
                rss=server.rss_bytes,
                advance=advance,
            )
    case = f"{options.model} {options.num_prompts} requests"
    case += f", at most {options.max_concurrency} at once"
    return [
        {"op": "serve_soak", "case": case, "dtype": "none", **row, **origin(device)}
        for row in rows(seen)
    ]


async def soak(
    client: Client,
    model: str,
    count: int,
    max_concurrency: int,
    seed: int,
    *,
    rss: Callable[[], int] = lambda: 0,
    advance: Callable[[int], None] = lambda n: None,
) -> Seen:
    """Send `count` requests to a server with /debug/integrity, then a sample of them alone.

    rss: the memory of the server's process in bytes, if it has one
    """
    seen = Seen(mix.kinds(count, seed))
    await _integrity(client)  # before the load, if the server has none
    gate, ended = asyncio.Semaphore(max_concurrency), 0

    async def one(number: int) -> None:
        nonlocal ended
        async with gate:
            await _send(client, model, number, seen)
        ended += 1
        advance(1)
        if ended % CHECK_EVERY == 0:
            seen.integrity.append(await _integrity(client))

    probes = [asyncio.create_task(_probe_health(client, seen))]
    probes.append(asyncio.create_task(_probe_memory(rss, seen)))
    begin = time.perf_counter()
    try:
        await asyncio.gather(*map(one, range(count)))
    finally:
        seen.seconds = time.perf_counter() - begin
        for probe in probes:
            probe.cancel()
        ends = await asyncio.gather(*probes, return_exceptions=True)
    for end in ends:
        if isinstance(end, Exception):  # no CancelledError, which is their right end
            raise end
    seen.integrity.append(await _idle(client))
    for number in seen.of("plain", "stream", "image", "n")[:: max(1, count // SAMPLE)]:
        await _compare_alone(client, model, number, seen)
    return seen


async def _send(client: Client, model: str, number: int, seen: Seen) -> None:
    kind, id = seen.kinds[number], f"soak-{number}"
    if kind == "malformed":
        data = mix.MALFORMED[number % len(mix.MALFORMED)]
    else:
        data = json.dumps(mix.body(number, kind, model)).encode()
    if kind == "leave before":
        try:
            async with asyncio.timeout(0.02 * (number % 7)):
                exchange = await client.send(PATH, data, request_id=id)
        except TimeoutError:
            seen.left.append(number)
        else:
            seen.statuses[number] = exchange.status
        return
    reads = 1 + number % 5  # of a stream, before its client leaves
    leave = (lambda e: len(e.reads) >= reads) if kind == "leave within" else (lambda e: False)
    exchange = await client.send(PATH, data, request_id=id, leave=leave)
    if exchange.left:
        seen.statuses[number] = exchange.status
        seen.left.append(number)
    else:
        _note(exchange, number, kind, seen)


def _note(exchange: Exchange, number: int, kind: str, seen: Seen) -> None:
    seen.statuses[number] = exchange.status
    seen.timelines[number] = timeline(exchange, stream=kind in mix.STREAMED)
    if exchange.request_id != f"soak-{number}":
        seen.wrong_ids.append(number)


async def _probe_health(client: Client, seen: Seen) -> None:
    while True:
        begin = time.perf_counter()
        try:
            status, _ = await client.get("/health")
        except InputError:  # no answer
            status = 0
        seen.health_ms.append(1e3 * (time.perf_counter() - begin))
        seen.unhealthy += status != 200
        await asyncio.sleep(HEALTH_S)


async def _probe_memory(rss: Callable[[], int], seen: Seen) -> None:
    while True:
        seen.rss.append(rss())
        await asyncio.sleep(RSS_S)


async def _integrity(client: Client) -> dict:
    """What the engine says of its state. Raises InputError if the server does not tell."""
    found = await client.json("/debug/integrity")
    if found is None:
        raise InputError("the server has no /debug/integrity: start it with --debug")
    return found


async def _idle(client: Client) -> dict:
    """The state when nothing is left to do, or after a minute."""
    deadline = time.monotonic() + IDLE_S
    while True:
        found = await _integrity(client)
        if not (found["jobs"] or found["groups"]) or time.monotonic() > deadline:
            return found
        await asyncio.sleep(POLL_S)


async def _compare_alone(client: Client, model: str, number: int, seen: Seen) -> None:
    """Note a request whose answer alone, on the same server, is not that among the others."""
    data = json.dumps(mix.alone(number, seen.kinds, model)).encode()
    alone = timeline(await client.send(PATH, data), stream=False)
    seen.alone += 1
    if number not in seen.timelines or alone.texts != seen.timelines[number].texts:
        seen.differing.append(number)
