"""The requests of the soak: of every kind that a server sees, also those that misbehave."""

import random
from collections.abc import Sequence
from typing import Any

from bench.serve.workloads.images import data_url

# Shares in percent. "leave before" closes the connection while it waits, "leave within" in the
# middle of its stream.
SHARES = {
    "plain": 50,
    "stream": 20,
    "leave before": 5,
    "leave within": 5,
    "malformed": 5,
    "image": 5,
    "n": 5,
    "pacore": 5,
}
LEAVE = ("leave before", "leave within")
STREAMED = ("stream", "leave within")
CHOICES = {"n": 3}  # of an answer, where it is not one
MALFORMED = (b"{", b"[]", b'{"model": "tiny"}', b'{"model": 5}', b'{"messages": []}', b"\xff")
SIZE = (300, 200)  # of an image


def kinds(count: int, seed: int) -> list[str]:
    """The kinds of `count` requests in random order, by their shares."""
    total = sum(SHARES.values())
    names = [name for name, share in SHARES.items() for _ in range(count * share // total)]
    names += ["plain"] * (count - len(names))
    random.Random(seed).shuffle(names)
    return names


def body(number: int, kind: str, model: str) -> dict[str, Any]:
    """A request of a kind. Its number is in its prompt and is its seed, so no other has its
    answer."""
    text = f"request {number} " + "x" * (number % 40)
    content: object = text
    if kind == "image":
        image = {"type": "image_url", "image_url": {"url": data_url(random.Random(number), SIZE)}}
        content = [image, {"type": "text", "text": text}]
    fields = {
        "model": f"{model}:pacore-3" if kind == "pacore" else model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 4 + number * 7 % 40,
        "seed": number,
    }
    if kind == "n":
        fields["n"] = CHOICES["n"]
    if kind in STREAMED:
        fields |= {"stream": True, "stream_options": {"include_usage": True}}
    return fields


def alone(number: int, kinds: Sequence[str], model: str) -> dict[str, Any]:
    """The request whose answer alone is that of request `number`."""
    return body(number, "plain" if kinds[number] == "stream" else kinds[number], model)
