"""OpenAI-style messages and tools, checked, as what a chat template renders.

Texts that would encode to control tokens are marked, wherever they are in a message or a tool.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from model.errors import InputError, shown
from model.text.chat_template import BEGIN, CLOSE, END, IMAGE, OPEN, Turn
from model.text.files import parse_json

# The keys that a message may have besides role and content.
KEYS: dict[str, tuple[str, ...]] = {
    "system": (),
    "developer": (),
    "user": (),
    "assistant": ("reasoning_content", "tool_calls"),
    "tool": ("tool_call_id", "name"),
}
OTHER_KEYS = tuple(key for keys in KEYS.values() for key in keys)
LEVELS = 100  # how deep tools and arguments may be nested
TOOL = '{"type": "function", "function": {"name": "...", "description": "...", "parameters": {}}}'
CALL = '{"id": "...", "type": "function", "function": {"name": "...", "arguments": "{}"}}'


def read_turn(message: Mapping, reserved: re.Pattern) -> Turn:
    """The message with its images and its matches of `reserved` marked.

    Adjacent text parts become one text, so that none can hold half of a reserved text. An assistant
    that calls tools may have no content. Raises InputError if the message is malformed.
    """
    role = message.get("role") if isinstance(message, Mapping) else None
    if not isinstance(role, str) or role not in KEYS:
        raise InputError(f"a message needs a role, one of {', '.join(KEYS)}: {shown(message)}")
    given = {str(key): value for key, value in message.items() if value is not None}
    if others := given.keys() - {"role", "content", *KEYS[role]}:
        more = "".join(f", {key}" for key in KEYS[role])
        raise InputError(
            f"a message of role {role} may have a role and a content{more}; "
            f"{', '.join(sorted(others)):.80} is not implemented"
        )
    calls = _tool_calls(given.pop("tool_calls", []), reserved)
    content = given.pop("content", None)
    texts = () if calls and content in (None, "", []) else _content(content, message, reserved)
    if role == "tool" and IMAGE in texts:
        raise InputError(f"a tool's result must be text, without images: {shown(message)}")
    if role == "tool" and "tool_call_id" not in given:
        raise InputError(f"a message of role tool needs a tool_call_id: {shown(message)}")
    fields = {key: _text(given[key], key, reserved) for key in KEYS[role] if key in given}
    return Turn("system" if role == "developer" else role, texts, calls, fields)


def read_tools(tools: Sequence[Mapping], reserved: re.Pattern) -> list[dict]:
    """The tools with their matches of `reserved` marked.

    Raises InputError if one is malformed: other keys than those of `TOOL` are passed on.
    """
    if not isinstance(tools, list | tuple):
        raise InputError(f"tools must be a list, not {shown(tools)}")
    for tool in tools:
        function = _function(tool)
        if not (
            function
            and isinstance(function.get("description", ""), str | None)
            and isinstance(function.get("parameters"), Mapping | None)
        ):
            raise InputError(f"a tool must be {TOOL}, not {shown(tool)}")
    return [_protected_json(tool, reserved) for tool in tools]


def strings(value: object) -> Iterator[str]:
    """All strings in a value that is like JSON, and its keys."""
    rest = [value]
    while rest:
        item = rest.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, Mapping):
            rest += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple):
            rest += item


def without_surrogates(text: str) -> str:
    """The text with U+FFFD for surrogates, which UTF-8 cannot encode."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def _content(content: object, message: Mapping, reserved: re.Pattern) -> tuple[str, ...]:
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list | tuple):
        raise InputError(
            f"a message's content must be a string or a list of parts: {shown(message)}"
        )
    texts: list[str] = []
    for is_image, group in groupby(map(_part, parts), IMAGE.__eq__):
        run = list(group)
        texts += run if is_image else [_protected("".join(run), reserved)]
    return tuple(texts)


def _part(part: Mapping) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "image":
        return IMAGE
    if kind == "text" and isinstance(part.get("text"), str):
        return _without_marks(part["text"])
    raise InputError(
        'a content part must be {"type": "text", "text": "..."} or {"type": "image"}, not '
        f"{shown(part)}"
    )


def _tool_calls(calls: object, reserved: re.Pattern) -> tuple[dict, ...]:
    """The calls with their arguments as objects, which templates expect."""
    if not isinstance(calls, list | tuple):
        raise InputError(f"tool_calls must be a list, not {shown(calls)}")
    read = []
    for call in calls:
        function = _function(call)
        if (
            not function
            or call.keys() - {"id", "type", "function"}
            or function.keys() - {"name", "arguments"}
            or not isinstance(call.get("id"), str)
        ):
            raise InputError(f"a tool call must be {CALL}, not {shown(call)}")
        arguments = _arguments(function.get("arguments"), function["name"])
        parsed = {"name": function["name"], "arguments": arguments}
        read.append(_protected_json({**call, "function": parsed}, reserved))
    return tuple(read)


def _arguments(text: object, name: str) -> dict:
    try:
        arguments = parse_json(text) if isinstance(text, str) else None
    except ValueError:
        arguments = None
    if not isinstance(arguments, dict):
        raise InputError(
            f"the arguments of a call of {shown(name)} must be a JSON object in a string, not"
            f" {shown(text)}"
        )
    return arguments


def _function(item: object) -> Mapping | None:
    """The function of a tool or of a call, None if there is none with a name."""
    if not isinstance(item, Mapping) or item.get("type") != "function":
        return None
    function = item.get("function")
    if not isinstance(function, Mapping):
        return None
    name = function.get("name")
    return function if isinstance(name, str) and name else None


def _text(value: object, key: str, reserved: re.Pattern) -> str:
    if not isinstance(value, str):
        raise InputError(f"a message's {key} must be a string, not {shown(value)}")
    return _protected(value, reserved)


def _protected_json(value: object, reserved: re.Pattern, levels: int = LEVELS) -> Any:  # noqa: ANN401
    if isinstance(value, str):
        return _protected(value, reserved)
    if not levels:
        raise InputError(f"tools and arguments may be nested {LEVELS} levels deep, not deeper")
    if isinstance(value, Mapping):
        return {
            _text(key, "key", reserved): _protected_json(item, reserved, levels - 1)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_protected_json(item, reserved, levels - 1) for item in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    raise InputError(f"tools must have JSON values, not {shown(value)}")


def _protected(text: str, reserved: re.Pattern) -> str:
    return reserved.sub(rf"{OPEN}\g<0>{CLOSE}", _without_marks(text))


def _without_marks(text: str) -> str:
    return re.sub(f"[{IMAGE}{OPEN}{CLOSE}{BEGIN}{END}]", "", without_surrogates(text))
