"""From a Responses body to the chat request that answers it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from pacore_sched.serve.api.requests import ChatRequest
from pacore_sched.serve.api.responses.body import (
    Assistant,
    FunctionCall,
    FunctionCallOutput,
    InputImage,
    InputText,
    OutputText,
    Reasoning,
    ResponsesRequest,
    System,
    User,
)
from pacore_sched.serve.errors import ApiError

SAME = (
    *("model", "stream", "stop", "seed", "temperature", "top_p", "top_k", "ignore_eos"),
    *("cache_salt", "pacore"),
)


@dataclass(frozen=True)
class Converted:
    """`places` has the names, in the Responses body, of what errors of the chat request name."""

    chat: ChatRequest
    places: dict[str, str]

    @contextmanager
    def errors(self) -> Iterator[None]:
        """ApiErrors raised inside name the fields of the Responses body."""
        try:
            yield
        except ApiError as error:
            error.param = self.places.get(error.param or "", error.param)
            raise


def chat_request(body: ResponsesRequest) -> Converted:
    """The same request as a body of /v1/chat/completions."""
    messages, places = _messages(body)
    tools = [
        {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)}
        for tool in body.tools or ()
    ]
    fields = {name: getattr(body, name) for name in SAME} | {
        "messages": messages,
        "max_tokens": body.max_output_tokens,
        "tools": tools or None,
        # "auto" without tools is an error in chat; here it is what clients write.
        "tool_choice": body.tool_choice if tools else None,
    }
    places |= {"messages": "input", "max_tokens": "max_output_tokens"}
    return Converted(ChatRequest.model_validate(fields), places)


def _messages(body: ResponsesRequest) -> tuple[list[dict], dict[str, str]]:
    """The messages, and the places of their images.

    What the assistant wrote in one turn, which is one message in chat, is several items here: its
    reasoning, its text and its calls.
    """
    messages: list[dict] = []
    places: dict[str, str] = {}
    if body.instructions is not None:
        messages.append({"role": "system", "content": body.instructions})
    items = [User(role="user", content=body.input)] if isinstance(body.input, str) else body.input
    before: object = None
    for number, item in enumerate(items):
        match item:
            case Reasoning():
                text = "".join(part.text for part in item.content or ())
                messages.append({"role": "assistant", "reasoning_content": text})
            case Assistant():
                turn = _turn(messages, isinstance(before, Reasoning | FunctionCall))
                turn["content"] = turn.get("content", "") + _text(item.content)
            case FunctionCall():
                function = {"name": item.name, "arguments": item.arguments}
                call = {"id": item.call_id, "type": "function", "function": function}
                follows = isinstance(before, Reasoning | Assistant | FunctionCall)
                _turn(messages, follows).setdefault("tool_calls", []).append(call)
            case FunctionCallOutput():
                result = {"tool_call_id": item.call_id, "content": _text(item.output)}
                messages.append({"role": "tool", **result})
            case User():
                parts = [] if isinstance(item.content, str) else item.content
                for index, part in enumerate(parts):
                    if isinstance(part, InputImage):
                        name = f"messages[{len(messages)}].content[{index}].image_url.url"
                        places[name] = f"input[{number}].content[{index}].image_url"
                content = [_part(part) for part in parts] if parts else item.content
                messages.append({"role": "user", "content": content})
            case System():
                messages.append({"role": item.role, "content": _text(item.content)})
        before = item
    return messages, places


def _turn(messages: list[dict], follows: bool) -> dict:
    """The assistant's message that an item belongs to: the last one if it `follows`, or a new
    one."""
    if not follows:
        messages.append({"role": "assistant"})
    return messages[-1]


def _text(content: str | list[InputText] | list[OutputText]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


def _part(part: InputText | InputImage) -> dict:
    if isinstance(part, InputImage):
        return {"type": "image_url", "image_url": {"url": part.image_url}}
    return {"type": "text", "text": part.text}
