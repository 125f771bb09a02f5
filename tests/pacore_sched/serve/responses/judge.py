"""Checks of responses and their events against the types of the official client."""

import json
from collections.abc import Iterator

from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

# What OpenAI's types do not have: of OpenAI's service, of its earlier clients, of ours.
EXTRAS = {"store", "name", "pacore"}
EVENT = TypeAdapter(ResponseStreamEvent)


def checked(data: dict) -> Response:
    """A response, all of whose fields are those of the client's types."""
    response = Response.model_validate(data)
    assert set(extras(response)) <= EXTRAS
    return response


def checked_events(body: bytes) -> list[BaseModel]:
    """The events of a stream: of known types, and numbered."""
    *frames, last = body.decode().split("\n\n")
    assert not last, "a stream without its end"
    events = []
    for number, frame in enumerate(frames):
        name, line = frame.split("\n")
        data = json.loads(line.removeprefix("data: "))
        event = EVENT.validate_python(data)
        assert set(extras(event)) <= EXTRAS
        assert name == f"event: {event.type}" == f"event: {data['type']}"
        assert event.sequence_number == number
        events.append(event)
    return events


def extras(value: object) -> Iterator[str]:
    """Names of the fields, at any depth, that a type does not have."""
    if isinstance(value, BaseModel):
        yield from value.model_extra or ()
        for name in type(value).model_fields:
            yield from extras(getattr(value, name))
    elif isinstance(value, list):
        for item in value:
            yield from extras(item)


def comparable(response: Response) -> dict:
    """A response without its ids and times, and without what other requests had cached."""
    data = response.model_dump(exclude={"id", "created_at", "completed_at"})
    del data["usage"]["input_tokens_details"]
    for item in data["output"]:
        item.pop("id"), item.pop("call_id", None)
    return data
