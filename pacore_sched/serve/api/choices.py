"""A choice of a chat completion: a rollout's text as reasoning, content and tool calls."""

import secrets
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pacore_sched.answers.journal_lines import RolloutResult
from pacore_sched.sched.request import Sampling
from pacore_sched.serve.jobs import NewTokens
from pacore_sched.serve.text.rollout_text import RolloutText
from pacore_sched.serve.text.sections import Content, Piece, Reasoning, Sections, ToolCall

if TYPE_CHECKING:
    from model.step3vl import Step3VL


class ChatChoice:
    """Takes a rollout's tokens as they come, or only its result; `message` is what it has so far.

    Its methods return the `delta`s of a stream.
    """

    def __init__(self, text: RolloutText, *, thinking: bool, tools: bool) -> None:
        self._text = text
        self._sections = Sections(thinking=thinking, tools=tools)
        self._reasoning: list[str] = []
        self._content: list[str] = []
        self._calls: list[dict] = []
        self.finish_reason = ""

    def take(self, new: NewTokens) -> list[dict]:
        return list(self._deltas(self._sections.push(self._text.push(new.tokens))))

    def end(self, result: RolloutResult) -> list[dict]:
        """The rest, after the rollout has ended."""
        pieces = self._sections.push(self._text.finish(result.text)) + self._sections.finish()
        deltas = list(self._deltas(pieces))
        ended = result.finish_reason
        self.finish_reason = "tool_calls" if self._calls and ended == "stop" else ended
        return deltas

    @property
    def message(self) -> dict:
        """The whole message. `content` is null where there is only reasoning, or only calls."""
        reasoning, content = "".join(self._reasoning), "".join(self._content)
        message: dict = {"role": "assistant", "content": content or None}
        if not (reasoning or self._calls):
            message["content"] = content
        message["reasoning_content"] = reasoning or None
        if self._calls:
            message["tool_calls"] = self._calls
        return message

    def _deltas(self, pieces: list[Piece]) -> Iterator[dict]:
        for piece in pieces:
            match piece:
                case Reasoning(text):
                    self._reasoning.append(text)
                    yield {"reasoning_content": text}
                case Content(text):
                    self._content.append(text)
                    yield {"content": text}
                case ToolCall(name, arguments):
                    call = {
                        "id": f"call_{secrets.token_hex(12)}",
                        "type": "function",
                        "function": {"name": name, "arguments": arguments},
                    }
                    yield {"tool_calls": [{"index": len(self._calls), **call}]}
                    self._calls.append(call)


def rollout_text(model: "Step3VL", sampling: Sampling) -> RolloutText:
    """The text of a rollout with these sampling parameters, while it is generated."""
    eos = () if sampling.ignore_eos else model.config.tokens.eos
    return RolloutText(model.tokenizer.token_bytes, eos, sampling.stop)
