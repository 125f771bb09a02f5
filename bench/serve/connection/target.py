"""The server under load: its model and tokenizer, as it tells them."""

import sys

from bench.serve.connection.client import Client
from bench.serve.workloads.prompts import WORDS, Prompts
from model.errors import InputError, shown


async def find_model(client: Client, name: str | None) -> str:
    """The model of this name, or the first that the server has.

    Raises InputError if the server cannot be reached, or does not have it.
    """
    listed = await client.json("/v1/models")
    names = [model.get("id") for model in (listed or {}).get("data", ())]
    if name is None:
        if not names:
            raise InputError(f"{client.url}/v1/models lists no model: give its name with --model")
        return names[0]
    if names and name not in names:
        raise InputError(f"the server has no model {shown(name)}; it has {', '.join(names)}")
    return name


async def prompts(client: Client, model: str) -> Prompts:
    """Prompts by the server's tokenizer. Without /tokenize, every word is taken for a token."""
    tokens = {}
    for word in WORDS:
        body = {"model": model, "prompt": f" {word}", "add_special_tokens": False}
        answer = await client.json("/tokenize", body)
        if answer is None:
            print(
                "the server has no /tokenize: a word of a prompt is taken for a token;"
                " the rows have the tokens of its usage",
                file=sys.stderr,
            )
            return Prompts(dict.fromkeys(WORDS, 1))
        tokens[word] = max(1, answer["count"])
    return Prompts(tokens)
