"""Streams of /v1/responses: events that the official client's types accept and can follow."""

import json
from collections.abc import Iterator
from itertools import groupby

import pytest
from openai import OpenAI
from openai.types.responses import ResponseCompletedEvent, ResponseFailedEvent

from tests.pacore_sched.serve.responses.judge import checked, checked_events, comparable
from tests.pacore_sched.serve.responses.test_responses import TOOL
from tests.pacore_sched.serve.serving import Running, endless, running, scripted
from tests.pacore_sched.serve.test_chat import script

BODY = {"model": "scripted", "stream": True}
BEGIN = ["response.created", "response.in_progress"]
TEXT = [
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
]
REASONING = [name.replace("output_text", "reasoning_text") for name in TEXT]
CALL = [
    "response.output_item.added",
    "response.function_call_arguments.delta",
    "response.function_call_arguments.done",
    "response.output_item.done",
]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(scripted(script)) as found:
        yield found
        found.wait_idle()


@pytest.fixture(scope="module")
def client(server: Running) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def events_of(server: Running, **fields: object) -> list:
    reply = server.post("/v1/responses", BODY | fields)
    assert reply.headers["content-type"].startswith("text/event-stream")
    return checked_events(reply.body)


STREAMS = {
    "text": ({"input": "Hi"}, [*BEGIN, *REASONING, *TEXT, "response.completed"]),
    "cut": (
        {"input": "long", "max_output_tokens": 9},
        [*BEGIN, *REASONING, "response.incomplete"],
    ),
    "calls": (
        {"input": "weather?", "tools": [TOOL]},
        [*BEGIN, *REASONING, *TEXT, *CALL, *CALL, "response.completed"],
    ),
}


@pytest.mark.parametrize("case", STREAMS)
def test_events(server: Running, case: str):
    """An event that is missing, doubled, out of order, of another item, or unlike the items of the
    response; a stream whose response is not that of the request without `stream`."""
    fields, types = STREAMS[case]
    events = events_of(server, **fields)
    assert [kind for kind, _ in groupby(event.type for event in events)] == types
    final = events[-1].response
    assert all(event.response.id == final.id for event in (*events[:2], events[-1]))
    assert all(event.response.output == [] for event in events[:2])
    ids = [item.id for item in final.output]
    texts: dict[int, str] = {}
    for event in events[2:-1]:
        index, kind = event.output_index, event.type
        if "output_item" in kind:
            assert event.item.id == ids[index]
        else:
            assert event.item_id == ids[index]
        if kind.endswith(".delta"):
            texts[index] = texts.get(index, "") + event.delta
        if kind.endswith(("text.done", "arguments.done")):
            assert (event.arguments if "arguments" in kind else event.text) == texts[index]
        if kind == "response.output_item.done":
            item = event.item
            assert item == final.output[index]
            text = item.arguments if item.type == "function_call" else item.content[0].text
            assert text == texts[index]
    whole = checked(server.post("/v1/responses", BODY | fields | {"stream": False}).json)
    assert comparable(final) == comparable(whole)


def test_the_clients_own_stream(client: OpenAI):
    """The client's helper, which keeps a response of its own."""
    with client.responses.stream(model="scripted", input="Hi") as stream:
        deltas = [event for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert deltas[-1].snapshot == final.output_text == "answer 0 é"
    with client.responses.stream(model="scripted", input="weather?", tools=[TOOL]) as stream:
        calls = [item for item in stream.get_final_response().output if item.type.endswith("call")]
    assert [call.parsed_arguments["city"] for call in calls] == ["Paris", "Köln"]


def test_failure():
    """A stream that ends as if the answer were whole, or with a frame that is no event."""
    with running(scripted(endless)) as server:
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        executor, events = server.service.engine.executor, []
        for event in client.responses.create(model="scripted", input="Hi", stream=True):
            events.append(event)
            executor.step = lambda: 1 / 0
        failed = events[-1]
        assert isinstance(failed, ResponseFailedEvent)
        assert failed.response.status == "failed" and failed.response.error.code == "server_error"
        assert "ZeroDivisionError" in failed.response.error.message
        assert [event.sequence_number for event in events] == [*range(len(events))]
        assert failed.response.id == events[0].response.id
        server.wait_idle()


def test_pacore_events(server: Running, client: OpenAI):
    """Rounds that are missing; events with which the client cannot go on."""
    pacore = {"widths": [2], "events": True}
    body = {"model": "scripted", "input": "Hi", "stream": True, "pacore": pacore}
    frames = server.post("/v1/responses", body).body.decode().split("\n\n")[:-1]
    data = [json.loads(frame.split("\ndata: ")[1]) for frame in frames]
    assert [event["sequence_number"] for event in data] == [*range(len(data))]
    names = [event["type"] for event in data if event["type"].startswith("pacore.")]
    finished = "pacore.rollout_finished"
    assert names == ["pacore.round_started", finished, finished, "pacore.synthesis_started"]
    messages = {event["message"] for event in data if event["type"] == finished}
    assert messages == {"answer 0 é", "answer 1 é"}
    with client.responses.stream(
        model="scripted", input="Hi", extra_body={"pacore": pacore}
    ) as stream:
        final = stream.get_final_response()
    assert final.output_text == "best of 2"
    assert [round_["rollouts"] for round_ in final.pacore["rounds"]] == [2, 1]
    plain = events_of(server, input="Hi", pacore={"widths": [2]})
    assert isinstance(plain[-1], ResponseCompletedEvent)
