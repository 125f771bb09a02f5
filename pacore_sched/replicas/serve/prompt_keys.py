"""What a request's body says about where it should run: its prompt's prefixes, and its weight."""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

CHUNK = 1024  # characters, or token ids
MAX_KEYS = 256  # a longer common prefix tells no more


@dataclass(frozen=True)
class PromptKeys:
    """Of one request.

    keys: one for every prefix of the prompt, from short to long: equal keys are equal prefixes
    sizes: of these prefixes, in characters
    rollouts: that run at a time
    """

    keys: tuple[bytes, ...] = ()
    sizes: tuple[int, ...] = ()
    rollouts: int = 1


def prompt_keys(body: bytes) -> PromptKeys:
    """The keys of the body of a request for a completion; none for a body that is wrong, which any
    replica can refuse."""
    try:
        request = json.loads(body)
        keys: list[bytes] = []
        sizes: list[int] = []
        digest, size = _json(request.get("cache_salt")), 0
        for unit in _units(request):
            if len(keys) == MAX_KEYS:
                break
            digest = hashlib.blake2b(digest + unit, digest_size=16).digest()
            size += len(unit)
            keys.append(digest)
            sizes.append(size)
        return PromptKeys(tuple(keys), tuple(sizes), _rollouts(request))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return PromptKeys()


def _units(request: dict) -> Iterator[bytes]:
    """The prompt in pieces; two prompts have as many in common as they have prefixes."""
    if "messages" not in request and "input" not in request:
        yield from _chunks(request["prompt"])
        return
    if request.get("tools"):  # at the beginning of the prompt
        yield _json(request["tools"])
    for message in request["messages"] if "messages" in request else _messages(request):
        content = message.get("content")
        parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
        # The role, with the first piece: all prompts begin with the same few roles.
        head = _json({name: value for name, value in message.items() if name != "content"})
        for part in parts:
            is_text = isinstance(part, dict) and isinstance(part.get("text"), str)
            for piece in _chunks(part["text"]) if is_text else [_json(part)]:
                yield head + piece
                head = b""
        if head:
            yield head


def _messages(request: dict) -> list:
    """The instructions and the items of a Responses body; a text is a message of the user's."""
    instructions, items = request.get("instructions"), request["input"]
    system = [{"role": "system", "content": instructions}] if instructions else []
    return system + ([{"role": "user", "content": items}] if isinstance(items, str) else items)


def _chunks(text: str | list) -> Iterator[bytes]:
    for start in range(0, len(text), CHUNK):
        yield _json(text[start : start + CHUNK])


def _json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


def _rollouts(request: dict) -> int:
    widths = re.findall(r"\d+", str(request.get("model", "")).rpartition(":pacore-")[2])
    if isinstance(request.get("pacore"), dict):
        widths = request["pacore"].get("widths", [16])
    elif ":pacore-" not in str(request.get("model", "")):
        widths = [request.get("n") or 1]
    return max(1, *map(int, widths)) if widths else 1
