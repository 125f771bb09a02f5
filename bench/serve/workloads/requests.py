"""Workloads: the bodies of requests and their times of arrival. Equal seeds, equal workloads."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.serve.workloads.images import data_url
from bench.serve.workloads.prompts import Prompts
from model.errors import InputError
from pacore_sched.sim.trace import Request as TraceRequest
from pacore_sched.sim.trace import read_trace
from pacore_sched.sim.workload import bursty_arrivals

BLOCK_TOKENS = 512  # of a block of a prompt, which a Mooncake trace names in `hash_ids`
CHAT, COMPLETIONS = "openai-chat", "openai"  # the backends, as vLLM calls them
PATHS = {CHAT: "/v1/chat/completions", COMPLETIONS: "/v1/completions"}
FIRST, LATER = "first of a prefix", "later of a prefix"


@dataclass(frozen=True)
class Request:
    """A body to send `arrival_s` seconds after the start. `group` tells requests apart whose times
    are also shown on their own."""

    body: dict[str, Any]
    arrival_s: float = 0.0
    group: str = ""

    @property
    def has_one_text(self) -> bool:
        """Whether the answer is one text, which has all tokens of the usage."""
        return one_text(self.body)


def one_text(body: Mapping[str, Any]) -> bool:
    """Whether a body asks for one text: no `n`, and no rollouts of PaCoRe."""
    pacore = body.get("pacore") or ":pacore-" in str(body.get("model"))
    return body.get("n") in (None, 1) and not pacore


@dataclass(frozen=True)
class Lengths:
    """Tokens of prompts and answers: uniform in [1 - ratio, 1 + ratio] times these."""

    input: int
    output: int
    ratio: float = 0.0

    def draw(self, draw: random.Random) -> tuple[int, int]:
        low, high = 1 - self.ratio, 1 + self.ratio
        first, second = (
            max(1, draw.randint(round(mean * low), round(mean * high)))
            for mean in (self.input, self.output)
        )
        return first, second


@dataclass(frozen=True)
class Bodies:
    """Makes bodies for one server and endpoint. `extra` fields replace those of the workload."""

    backend: str
    model: str
    prompts: Prompts
    seed: int
    stream: bool = True
    ignore_eos: bool = True
    extra: dict[str, Any] | None = None

    def body(
        self, number: int, text: str, output: int, images: Sequence[str] = (), **fields: object
    ) -> dict[str, Any]:
        """The body of request `number`, with `text` and images in its prompt."""
        content: object = text
        if images:
            parts = [{"type": "image_url", "image_url": {"url": url}} for url in images]
            content = [*parts, {"type": "text", "text": text}]
        chat = {"messages": [{"role": "user", "content": content}]}
        return {
            "model": self.model,
            **(chat if self.backend == CHAT else {"prompt": text}),
            "max_tokens": output,
            "seed": self.seed + number,
            **({"stream": True, "stream_options": {"include_usage": True}} if self.stream else {}),
            **({"ignore_eos": True} if self.ignore_eos else {}),
            **fields,
            **(self.extra or {}),
        }

    def draw(self, number: int) -> random.Random:
        """What request `number` draws from, whatever the others draw."""
        return random.Random(f"{self.seed} {number}")


def random_requests(
    bodies: Bodies,
    numbers: Sequence[int],
    lengths: Lengths,
    *,
    images: int = 0,
    size: tuple[int, int] = (0, 0),
    widths: Sequence[int] | None = None,
) -> list[Request]:
    """Requests with random texts; with images, or as PaCoRe problems of these widths."""
    made = []
    fields = {} if widths is None else {"pacore": {"widths": list(widths)}}
    for number in numbers:
        draw = bodies.draw(number)
        prompt, output = lengths.draw(draw)
        text = bodies.prompts.text(draw, prompt)
        urls = [data_url(draw, size) for _ in range(images)]
        made.append(Request(bodies.body(number, text, output, urls, **fields)))
    return made


def prefix_repetition(
    bodies: Bodies, numbers: Sequence[int], prefix: int, suffix: int, prefixes: int, output: int
) -> list[Request]:
    """Requests that begin with one of several prefixes, such as a system prompt, in turn, and go on
    with a text of their own."""
    made = []
    for at, number in enumerate(numbers):
        which = at % prefixes
        first = bodies.prompts.text(random.Random(f"{bodies.seed} prefix {which}"), prefix)
        text = f"{first} {bodies.prompts.text(bodies.draw(number), suffix)}"
        group = FIRST if at < prefixes else LATER
        made.append(Request(bodies.body(number, text, output), group=group))
    return made


def trace_requests(
    bodies: Bodies, path: Path, count: int | None, rate: float | None
) -> list[Request]:
    """The first `count` requests of a trace, at its own times, or with these scaled to a mean rate.

    Prompts with equal `hash_ids` at their beginnings begin with equal blocks.
    """
    lines = read_trace(path)[:count]
    scale = 1.0
    if rate is not None:
        if not (last := lines[-1].arrival_s):
            raise InputError(f"trace {path}: all requests arrive at once: leave out --request-rate")
        scale = (len(lines) - 1) / rate / last
    return [
        Request(
            bodies.body(number, _trace_text(bodies, number, line), line.output_tokens),
            line.arrival_s * scale,
        )
        for number, line in enumerate(lines)
    ]


def _trace_text(bodies: Bodies, number: int, line: TraceRequest) -> str:
    texts, left = [], line.input_tokens
    for block in line.hash_ids:
        size = min(BLOCK_TOKENS, left)
        if size > 0:
            texts.append(bodies.prompts.text(random.Random(f"{bodies.seed} block {block}"), size))
        left -= size
    if left > 0 or not texts:
        texts.append(bodies.prompts.text(bodies.draw(number), left))
    return " ".join(texts)


def arrivals(count: int, rate: float | None, burstiness: float, seed: int) -> list[float]:
    """Times of arrival at `rate` per second, all at once if it is None. Gaps have a gamma
    distribution of shape `burstiness`: 1 is a Poisson process, less comes in bursts."""
    if rate is None:
        return [0.0] * count
    return bursty_arrivals(count, rate, seed, variation=burstiness**-0.5)
