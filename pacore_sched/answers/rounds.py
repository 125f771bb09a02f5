"""The text of PaCoRe's rounds: widths, compacted messages and the next round's prompt.

The algorithm is that of the PaCoRe report (arXiv 2601.05593) and its released client. The prompts
are run by engine/engine.py. A conversation is a list of OpenAI-style chat messages.
"""

import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from model.errors import InputError
from model.text.files import read_text
from model.text.jinja import render, variable_names

MAX_WIDTH = 65_536  # rollouts of a round; they are created before any of them runs

# The released template's variable names: its text works unchanged with `--template`.
TEMPLATE_VARIABLES = {"original_prompt", "ref_responses"}


def parse_widths(widths: str | Sequence[int]) -> tuple[int, ...]:
    """Rollouts of each exploring round, from "32,4" or [32, 4]; "" or [] means no such round.

    Raises InputError for anything but positive integers.
    """
    values = widths
    if isinstance(widths, str):
        values = [_integer(part) for part in widths.split(",")] if widths.strip() else []
    if not isinstance(values, list | tuple) or not all(
        type(value) is int and 1 <= value <= MAX_WIDTH for value in values
    ):
        raise InputError(
            f"widths {widths!r} must be integers from 1 to {MAX_WIDTH}:"
            " the number of rollouts of each round, such as 16 or 32,4"
        )
    return tuple(values)


def round_widths(widths: Sequence[int]) -> tuple[int, ...]:
    """Rollouts of every round: the exploring rounds, then one for the synthesis."""
    return (*widths, 1)


def compact(text: str) -> str:
    """A rollout's message: the text after its last `</think>`, or the whole text without one."""
    return text.rpartition("</think>")[2]


def order_messages(texts: Sequence[str], seed: int = 42) -> list[str]:
    """Messages in the order in which the next round reads them, without empty ones.

    As in the released client, they are first sorted by length, then shuffled by a generator that is
    seeded with `seed` again for every round, and then empty ones are dropped: the order does not
    depend on other problems. Messages of equal length are sorted by text; the released client keeps
    their order of arrival.
    """
    messages = sorted(texts, key=lambda text: (len(text), text))
    random.Random(seed).shuffle(messages)
    return [message for message in messages if message]


@dataclass(frozen=True)
class SynthesisTemplate:
    """The jinja2 source of a synthesis prompt; `name` is what errors call it."""

    name: str
    source: str

    def render(self, problem: str, messages: Sequence[str]) -> str:
        """Raises InputError if the template fails on these or exceeds the limits of templates."""
        variables = {"original_prompt": problem, "ref_responses": list(messages)}
        return render(self.name, self.source, variables)


def load_template(path: str | Path) -> SynthesisTemplate:
    """Read a synthesis template: jinja2 with the variables `original_prompt` and `ref_responses`.

    Raises InputError for a file that cannot be read or rendered, or uses other variables.
    """
    source = read_text(Path(path))
    if source is None:
        raise InputError(f"template {path}: No such file")
    template = SynthesisTemplate(f"template {path}", source)
    names = variable_names(template.name, source)
    if names != TEMPLATE_VARIABLES:
        raise InputError(
            f"template {path} uses the variables {', '.join(sorted(names)) or '(none)'};"
            f" it must use {' and '.join(sorted(TEMPLATE_VARIABLES))} and no others"
        )
    prompt = template.render("271828", ["314159"])  # fail now, not after a round of rollouts
    if not ("271828" in prompt and "314159" in prompt):
        warnings.warn(
            f"template {path} leaves out the problem or the responses: it should write"
            " {{ original_prompt }} and all of ref_responses",
            stacklevel=2,
        )
    return template


def synthesis_prompt(
    problem: str, messages: Sequence[str], template: SynthesisTemplate | None = None
) -> str:
    """The prompt with a problem and the previous round's messages, all verbatim.

    Raises InputError if the template fails on them.
    """
    return (template or _default_template()).render(problem, messages)


def round_messages(
    conversation: Sequence[dict],
    messages: Sequence[str],
    *,
    template: SynthesisTemplate | None = None,
    seed: int = 42,
) -> list[dict]:
    """The next round's conversation, from the first round's and the last round's `messages`.

    Messages are compacted texts, "" for a rollout without one. The synthesis prompt replaces the
    text of the last user message (several text parts are one problem, joined by newlines); its
    other parts, the images, come first, where all rounds can share their KV. Without any message,
    the conversation is returned unchanged. `conversation` itself is not modified.
    Raises InputError if there is no user message, its content is not text or a list of parts, or
    the template fails on it.
    """
    index = last_user_message(conversation)
    references = order_messages(messages, seed)
    if not references:
        return list(conversation)
    last = conversation[index]
    problem, images = _split_content(last.get("content"))
    prompt = synthesis_prompt(problem, references, template)
    content = [*images, {"type": "text", "text": prompt}] if images else prompt
    following = {**last, "content": content}
    return [*conversation[:index], following, *conversation[index + 1 :]]


def last_user_message(conversation: Sequence[dict]) -> int:
    """The index of the message that later rounds replace. Raises InputError if there is none."""
    for index in reversed(range(len(conversation))):
        if conversation[index].get("role") == "user":
            return index
    raise InputError("the conversation has no user message")


def _integer(text: str) -> int:
    """The integer in `text`; 0, which is not a valid width, for any other text."""
    try:
        return int(text)
    except ValueError:
        return 0


@cache
def _default_template() -> SynthesisTemplate:
    return load_template(Path(__file__).with_name("synthesis.jinja"))


def _split_content(content: object) -> tuple[str, list[dict]]:
    """The text of a message, and its other parts."""
    if isinstance(content, str):
        return content, []
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        texts = [part.get("text") for part in content if part.get("type") == "text"]
        if all(isinstance(text, str) for text in texts):
            return "\n".join(texts), [part for part in content if part.get("type") != "text"]
    raise InputError("the last user message's content must be text or a list of text/image parts")
