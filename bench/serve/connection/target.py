"""The server under load: its address, and its model and tokenizer, as it tells them."""

import sys
from urllib.parse import urlsplit

from bench.serve.connection.client import Client
from bench.serve.workloads.prompts import WORDS, Prompts
from model.errors import InputError, shown


def address(url: str) -> str:
    """HOST:PORT of a --base-url. Raises InputError if it is none, or holds a password, which would
    be in rows and messages."""
    if "@" in url:
        raise InputError("--base-url: it may hold no user or password (@); see --api-key")
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises, too
    except ValueError as error:
        raise InputError(f"--base-url {url[:80]}: {str(error)[:80]}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InputError(
            f"--base-url {url[:80]}: it must begin with http:// or https:// and a host"
        )
    return parts.netloc


async def find_model(client: Client, name: str | None) -> str:
    """The model of this name, or the first that the server has.

    Raises InputError if the server cannot be reached, or does not have it.
    """
    listed = await client.json("/v1/models")
    models = listed.get("data") if isinstance(listed, dict) else None
    found = [m.get("id") for m in models if isinstance(m, dict)] if isinstance(models, list) else []
    names = [name for name in found if isinstance(name, str)]
    if name is None:
        if not names:
            raise InputError(f"{client.url}/v1/models lists no model: give its name with --model")
        return names[0]
    if names and name not in names:
        raise InputError(f"the server has no model {shown(name)}; it has {', '.join(names)}")
    return name


async def prompts(client: Client, model: str) -> Prompts:
    """Prompts by the server's tokenizer. Without /tokenize, or one that tells no `count`, every
    word is taken for a token."""
    tokens = {}
    for word in WORDS:
        body = {"model": model, "prompt": f" {word}", "add_special_tokens": False}
        answer = await client.json("/tokenize", body)
        count = answer.get("count") if isinstance(answer, dict) else None
        if not isinstance(count, int):
            print(
                "the server has no /tokenize: a word of a prompt is taken for a token;"
                " the rows have the tokens of its usage",
                file=sys.stderr,
            )
            return Prompts(dict.fromkeys(WORDS, 1))
        tokens[word] = max(1, count)
    return Prompts(tokens)
