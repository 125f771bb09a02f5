"""Splits a rollout's text, while it is generated, into reasoning, content and tool calls.

Reasoning is what `<think>` and `</think>` enclose, as in vLLM's parser deepseek_r1. Calls are in
Hermes' form, `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, which STEP3-VL-10B wraps
in `<tool_calls>` and `</tool_calls>`.
"""

import json
import re
from dataclasses import dataclass
from typing import TypeAlias

from model.text.files import parse_json

THINK, END_THINK = "<think>", "</think>"
CALLS, END_CALLS = "<tool_calls>", "</tool_calls>"
CALL, END_CALL = "<tool_call>", "</tool_call>"


@dataclass(frozen=True)
class Reasoning:
    text: str


@dataclass(frozen=True)
class Content:
    text: str


@dataclass(frozen=True)
class ToolCall:
    """`arguments` is the JSON text of an object."""

    name: str
    arguments: str


Piece: TypeAlias = Reasoning | Content | ToolCall


class Sections:
    """Incremental parser: the pieces of all `push` calls, then those of `finish`, in order.

    However the text is cut into pushes, the same text arrives in each section, and the same calls.
    Only what may still turn out to be a tag or a call is held back.

    `thinking`: the prompt ended with `<think>`, so the text begins inside the reasoning. Otherwise
    it does so if it begins with `<think>`. Tags `<think>` at the beginning are dropped, with the
    white space before them, however often they are repeated. Reasoning ends at the first
    `</think>`, or before a call. If a call ended it, the next `</think>` is dropped; any other is
    content. The white space around `</think>` is kept.

    `tools`: look for calls, in reasoning and content. White space around calls and around the tags
    of their wrapper is dropped, and so are these tags. What is not a call stays verbatim in the
    section where it is:

    - a tag `<tool_call>` without `{` or `[` after it, and a wrapper without a call, as in prose;
    - a call that is malformed (see `parse_calls`), or that the end of the text or `</think>` cuts
      short. A call that only lacks its last tag at the end of the text is complete.
    """

    def __init__(self, *, thinking: bool, tools: bool) -> None:
        self._reasoning, self._tools = thinking, tools
        self._beginning = True  # nothing but white space and `<think>` yet
        self._held: list[str] = []  # text of this section, unless a call or a tag follows
        self._opened = ""  # how far `_held` has come towards a call: a tag, or "{" for its JSON
        self._wrapped = False  # a wrapper is open
        self._after_call = False  # drop white space
        self._interrupted = False  # a call ended the reasoning
        self._tail = ""  # what may be the beginning of a tag
        self._tags = (THINK, END_THINK, *((CALLS, END_CALLS, CALL, END_CALL) if tools else ()))
        self._tag = re.compile("|".join(self._tags))
        self._pieces: list[Piece] = []

    def push(self, text: str) -> list[Piece]:
        """The pieces that `text`, the next part of the rollout's text, completes."""
        text, start = self._tail + text, 0
        for found in self._tag.finditer(text):
            self._take_text(text[start : found.start()])
            self._take_tag(found.group())
            start = found.end()
        at = text.rfind("<", start)
        tagged = self._tools or self._reasoning or self._beginning  # a tag may follow
        partial = tagged and at >= 0 and any(tag.startswith(text[at:]) for tag in self._tags)
        end = at if partial else len(text)
        self._take_text(text[start:end])
        self._tail = text[end:]
        return self._taken()

    def finish(self) -> list[Piece]:
        """The pieces of what was held back, at the end of the text."""
        complete = self._opened == "{" and END_CALL.startswith(self._tail)
        if not (complete and self._take_calls()):
            self._take_text(self._tail)
            self._release()
        return self._taken()

    def _take_text(self, text: str) -> None:
        """Text without a tag. White space at its end and the JSON of a call are held."""
        if self._opened == CALL and text.lstrip()[:1] in ("{", "["):
            self._opened = "{"
        if self._opened != "{":
            words = text.rstrip() if self._tools or self._beginning else text
            if words:
                self._release(words)
            text = text[len(words) :]
        self._held.append(text)

    def _take_tag(self, tag: str) -> None:
        if tag == THINK and self._beginning and not self._opened:
            self._held.clear()
            self._reasoning = True
        elif tag == END_THINK and self._reasoning:
            self._release()
            self._beginning = self._reasoning = False
        elif tag == END_CALL and self._opened == "{":
            if not self._take_calls():
                self._release(tag)
        elif self._opened == "{":
            self._held.append(tag)
        elif tag == END_THINK and self._interrupted:
            self._release()
            self._interrupted = False
        elif tag == END_CALLS and self._wrapped and not self._opened:
            self._held.clear()
            self._wrapped, self._after_call = False, True
        elif tag in (CALLS, CALL):
            if self._opened and (self._opened, tag) != (CALLS, CALL):
                text = "".join(self._held)
                words = text.rstrip()
                self._held[:] = [words]
                self._release()
                self._held.append(text[len(words) :])  # dropped if a call follows
            self._held.append(tag)
            self._opened = tag
        else:
            self._release(tag)

    def _take_calls(self) -> bool:
        """Replace the held text by the calls in it. False: it is malformed and still held."""
        before, _, body = "".join(self._held).partition(CALL)
        calls = parse_calls(body)
        if not calls:
            return False
        self._wrapped |= CALLS in before
        self._pieces += calls
        self._held.clear()
        self._opened = ""
        self._interrupted |= self._reasoning
        self._beginning = self._reasoning = False
        self._after_call = True
        return True

    def _release(self, text: str = "") -> None:
        """The held text and `text` are text of this section."""
        text = "".join(self._held) + text
        self._held.clear()
        self._opened = ""
        if self._after_call:
            text = text.lstrip()
        if text:
            self._pieces.append(Reasoning(text) if self._reasoning else Content(text))
            self._beginning = self._after_call = False

    def _taken(self) -> list[Piece]:
        pieces, self._pieces = self._pieces, []
        return pieces


def parse_calls(text: str) -> list[ToolCall]:
    """The call in a JSON text, or the calls if it is a list of them; [] if it is malformed.

    A call is an object with a name, which is a string, and arguments: an object, or a string that
    is the JSON text of one. They may be missing if there is nothing else than a name. Other keys
    are ignored. A list with one malformed call is malformed.
    """
    try:
        value = parse_json(text)
        calls = value if isinstance(value, list) else [value]
        return [_parsed_call(call) for call in calls]
    except ValueError:
        return []


def _parsed_call(call: object) -> ToolCall:
    """Raises ValueError for what is no call."""
    if not isinstance(call, dict) or not isinstance(name := call.get("name"), str) or not name:
        raise ValueError
    arguments = call.get("arguments", {} if len(call) == 1 else None)
    if isinstance(arguments, str):
        arguments = parse_json(arguments)
    if not isinstance(arguments, dict):
        raise ValueError
    return ToolCall(name, json.dumps(arguments, ensure_ascii=False, allow_nan=False))
