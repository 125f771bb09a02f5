"""The output of a response: items for reasoning, text and calls, and the events of a stream."""

import secrets
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """Of an item with text: the names of its type, its part and its events."""

    prefix: str
    item: str
    part: str
    item_fields: dict
    part_fields: dict
    event_fields: dict


REASONING = Kind("rs", "reasoning", "reasoning_text", {"summary": []}, {}, {})
MESSAGE = Kind(
    "msg",
    "message",
    "output_text",
    {"role": "assistant"},
    {"annotations": [], "logprobs": []},
    {"logprobs": []},
)


class Output:
    """Makes items of the deltas of a chat choice, in their order. `items` are those that are
    complete; the methods return events, as yet without sequence numbers."""

    def __init__(self) -> None:
        self.items: list[dict] = []
        self._kind: Kind | None = None  # of the item that is being written
        self._id = ""
        self._texts: list[str] = []

    def take(self, delta: dict) -> Iterator[dict]:
        if text := delta.get("reasoning_content"):
            yield from self._text(REASONING, text)
        if text := delta.get("content"):
            yield from self._text(MESSAGE, text)
        for call in delta.get("tool_calls", ()):
            yield from self._call(call["id"], **call["function"])

    def end(self, status: str) -> Iterator[dict]:
        """Ends the item that is being written, if there is one."""
        if self._kind is None:
            return
        kind, text = self._kind, "".join(self._texts)
        self._kind = None
        part = self._part(kind, text)
        yield self._event(f"response.{kind.part}.done", content_index=0, text=text,
                          **kind.event_fields)  # fmt: skip
        yield self._event("response.content_part.done", content_index=0, part=part)
        yield from self._done(self._item(kind, [part], status))

    def _text(self, kind: Kind, text: str) -> Iterator[dict]:
        if self._kind is not kind:
            yield from self.end("completed")
            self._kind, self._id, self._texts = kind, _id(kind.prefix), []
            yield self._added(self._item(kind, [], "in_progress"))
            part = self._part(kind, "")
            yield self._event("response.content_part.added", content_index=0, part=part)
        self._texts.append(text)
        yield self._event(f"response.{kind.part}.delta", content_index=0, delta=text,
                          **kind.event_fields)  # fmt: skip

    def _call(self, call_id: str, name: str, arguments: str) -> Iterator[dict]:
        """A call is known only as a whole."""
        yield from self.end("completed")
        self._id = _id("fc")
        item = {"id": self._id, "type": "function_call", "call_id": call_id, "name": name}
        event = "response.function_call_arguments"
        yield self._added(item | {"arguments": "", "status": "in_progress"})
        yield self._event(f"{event}.delta", delta=arguments)
        yield self._event(f"{event}.done", name=name, arguments=arguments)
        yield from self._done(item | {"arguments": arguments, "status": "completed"})

    def _item(self, kind: Kind, content: list[dict], status: str) -> dict:
        item = {"id": self._id, "type": kind.item, "status": status, "content": content}
        return item | kind.item_fields

    def _part(self, kind: Kind, text: str) -> dict:
        return {"type": kind.part, "text": text, **kind.part_fields}

    def _event(self, type: str, **fields: object) -> dict:
        return {"type": type, "item_id": self._id, "output_index": len(self.items), **fields}

    def _added(self, item: dict) -> dict:
        return {"type": "response.output_item.added", "output_index": len(self.items), "item": item}

    def _done(self, item: dict) -> Iterator[dict]:
        index = len(self.items)
        self.items.append(item)
        yield {"type": "response.output_item.done", "output_index": index, "item": item}


def _id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(12)}"
