"""What HTTP costs: `python -m bench serve engine`.

The same prompts run through our server, as streams that all begin at once, and on an engine with
the same options in this process, without texts. The forms take turns and each turn has new prompts,
so neither a slow minute of the machine nor a prefix cache favours one. All answers have full
length. While one form runs, the other is idle.
"""

import argparse
import asyncio
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch

from bench.measure.origin import origin
from bench.serve import metrics
from bench.serve.connection import load, target
from bench.serve.connection.client import Client
from bench.serve.connection.own_server import own_server
from bench.serve.workloads.requests import CHAT, PATHS, Bodies, Lengths, Request, random_requests
from kernels.runtime.dtypes import dtype_name
from model.terminal import Parser, progress
from pacore_sched.answers.pacore import Pacore
from pacore_sched.answers.problem_run import Problem
from pacore_sched.cli import serve
from pacore_sched.sched.request import Sampling

if TYPE_CHECKING:
    from pacore_sched.serve.api.context import Context

TARGET = 0.95  # of the engine's throughput
ENGINE, HTTP = "engine", "HTTP"
ROOM = 512  # tokens of a request for its chat template and its last page


@dataclass(frozen=True)
class Turn:
    """One run of all prompts."""

    seconds: float
    tokens: int
    failure: str | None = None

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


def run(
    options: SimpleNamespace, device: torch.device, server_words: Sequence[str]
) -> Iterator[dict]:
    """A row per form."""
    count = options.num_prompts
    kv_tokens = count * (options.random_input_len + options.random_output_len + ROOM)
    words = ["--max-running", str(count), "--kv-tokens", str(kv_tokens)]
    words += [*server_words, *options.server_options]
    turns: dict[str, list[Turn]] = {ENGINE: [], HTTP: []}
    with own_server(options.model, words) as server:
        context = _context(options.model, words)

        async def measure() -> None:
            async with Client(server.url) as client:
                name = await target.find_model(client, None)
                prompts = await target.prompts(client, name)
                extra = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
                bodies = Bodies(CHAT, name, prompts, options.seed, extra=extra)
                lengths = Lengths(options.random_input_len, options.random_output_len)
                with progress("engine", 2 * (options.repeats + 1)) as advance:
                    for repeat in range(options.repeats + 1):  # the first does not count
                        numbers = range(repeat * count, (repeat + 1) * count)
                        requests = random_requests(bodies, numbers, lengths)
                        for form in (ENGINE, HTTP) if repeat % 2 else (HTTP, ENGINE):
                            if form == HTTP:
                                turn = await through_http(client, requests)
                            else:
                                # The loop goes on, and sees which connections are closed.
                                turn = await asyncio.to_thread(on_engine, context, requests)
                            if repeat:
                                turns[form].append(turn)
                            advance(1)

        asyncio.run(measure())
        dtype = dtype_name(context.service.model.dtype)
    tokens = count * options.random_output_len
    lengths = f"{options.random_input_len}+{options.random_output_len}"
    for row in rows(f"{options.model} {lengths} x {count} at once", turns, tokens):
        yield {**row, "dtype": dtype, **origin(device)}


def _context(model: str, words: Sequence[str]) -> "Context":
    """The model and engine that `serve` makes of its options."""
    parser = Parser()
    serve.add_arguments(parser)
    options: argparse.Namespace = parser.parse_args(["--model", model, *words])
    return serve.make_context(options)


async def through_http(client: Client, requests: Sequence[Request]) -> Turn:
    """All requests at once; the time is from the first sending to the last end."""
    done = (await load.run(client, PATHS[CHAT], requests)).timelines
    if failure := metrics.failures(done):
        return Turn(1.0, 0, failure)
    begin = min(timeline.sent_s for timeline in done)
    end = max(timeline.sent_s + timeline.end_s for timeline in done)
    return Turn(end - begin, sum(timeline.output for timeline in done))


def on_engine(context: "Context", requests: Sequence[Request]) -> Turn:
    """The same without a server."""
    model, engine = context.service.model, context.service.engine
    sampling = Sampling(requests[0].body["max_tokens"], ignore_eos=True)
    pacore = Pacore(model, engine, (), sampling)
    problems = [Problem(r.body["messages"], id=str(n)) for n, r in enumerate(requests)]
    before, begin = engine.stats.generated, time.perf_counter()
    errors = [answer.error for answer in pacore.answers(problems) if answer.error]
    seconds = time.perf_counter() - begin
    return Turn(seconds, engine.stats.generated - before, errors[0] if errors else None)


def rows(case: str, turns: dict[str, list[Turn]], tokens: int) -> list[dict]:
    """A row per form; entry i of both forms belongs to one repeat. Every turn must have generated
    `tokens`."""
    made = []
    for form, done in turns.items():
        rates = [turn.rate for turn in done]
        failure = next((turn.failure for turn in done if turn.failure), None)
        if wrong := [turn.tokens for turn in done if turn.tokens != tokens]:
            failure = failure or f"{wrong[0]} tokens were generated, not {tokens}"
        row = {
            "op": "serve_overhead",
            "case": case,
            "impl": form,
            "tokens_per_second": median(rates),
            "tokens_per_second_min": min(rates),
            "tokens_per_second_max": max(rates),
            "repeats": len(done),
            "failure": failure,
        }
        if form == HTTP:
            shares = [
                http.rate / engine.rate for http, engine in zip(done, turns[ENGINE], strict=True)
            ]
            row |= {"share": median(shares), "share_min": min(shares), "share_max": max(shares)}
            row["target"] = TARGET
        made.append(row)
    return made
