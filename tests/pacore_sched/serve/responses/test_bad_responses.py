"""Bodies of /v1/responses that are wrong: refused by name, never ignored, never a status of 500."""

import json
from collections.abc import Iterator

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai import OpenAI
from pydantic import ValidationError

from pacore_sched.serve.api.responses.body import MAX_ITEMS, ResponsesRequest
from pacore_sched.serve.api.responses.conversion import chat_request
from tests.pacore_sched.serve.serving import Running, answering, running, scripted


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(scripted(answering)) as found:
        yield found
        found.wait_idle()


def item(**fields: object) -> dict:
    return {"input": [{"role": "user", "content": "Hi"}, fields]}


def image(**fields: object) -> dict:
    return item(role="user", content=[{"type": "input_image", **fields}])


TOOL = {"type": "function", "name": "f"}
BAD = {
    "unknown model": ({"model": "gpt-4o"}, "model"),
    "unknown parameter": ({"messages": []}, "messages"),
    "an earlier response": ({"previous_response_id": "resp_1"}, "previous_response_id"),
    "a conversation": ({"conversation": "conv_1"}, "conversation"),
    "a stored prompt": ({"prompt": {"id": "pmpt_1"}}, "prompt"),
    "store": ({"store": True}, "store"),
    "background": ({"background": True}, "background"),
    "truncation": ({"truncation": "auto"}, "truncation"),
    "one call at a time": ({"parallel_tool_calls": False}, "parallel_tool_calls"),
    "structured output": ({"text": {"format": {"type": "json_object"}}}, "text.format"),
    "verbosity": ({"text": {"verbosity": "low"}}, "text.verbosity"),
    "effort": ({"reasoning": {"effort": "high"}}, "reasoning.effort"),
    "a summary": ({"reasoning": {"summary": "detailed"}}, "reasoning.summary"),
    "logprobs": ({"include": ["message.output_text.logprobs"]}, "include[0]"),
    "top_logprobs": ({"top_logprobs": 2}, "top_logprobs"),
    "max_tokens": ({"max_tokens": 5}, "max_tokens"),
    "n": ({"n": 2}, "n"),
    "max_output_tokens": ({"max_output_tokens": 10**6}, "max_output_tokens"),
    "no output": ({"max_output_tokens": 0}, "max_output_tokens"),
    "penalty": ({"frequency_penalty": 1}, "frequency_penalty"),
    "stream_options alone": ({"stream_options": {"include_obfuscation": False}}, None),
    "obfuscation": (
        {"stream": True, "stream_options": {"include_obfuscation": True}},
        "stream_options.include_obfuscation",
    ),
    "metadata": ({"metadata": {"a": "\ud800"}}, "metadata.a"),
    "too much metadata": ({"metadata": {str(i): "" for i in range(65)}}, "metadata"),
    "built-in tool": ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    "a tool as in chat": (
        {"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools[0].function",
    ),
    "a forced tool": ({"tools": [TOOL], "tool_choice": "required"}, "tool_choice"),
    "a named tool": ({"tools": [TOOL], "tool_choice": TOOL}, "tool_choice"),
    "tools with pacore": ({"tools": [TOOL], "pacore": {}}, "tools"),
    "too wide": ({"pacore": {"widths": [129]}}, "pacore.widths"),
    "no input": ({"input": None}, "input"),
    "empty input": ({"input": []}, "input"),
    "a number": ({"input": 5}, "input"),
    "half a pair": ({"input": "\ud800"}, "input"),
    "half a pair in instructions": ({"instructions": "\ud800"}, "instructions"),
    "a long prompt": ({"input": "x" * 9000}, "input"),
    "many items": ({"input": [{"role": "user", "content": "a"}] * (MAX_ITEMS + 1)}, "input"),
    "a reference": (item(type="item_reference", id="msg_1"), "input[1]"),
    "a type that is no text": (item(type=["message"]), "input[1]"),
    "a role": (item(role="bot", content="x"), "input[1]"),
    "no content": (item(role="user"), "input[1].content"),
    "a file": (item(role="user", content=[{"type": "input_file"}]), "input[1].content[0]"),
    "chat's parts": (
        item(role="user", content=[{"type": "text", "text": "x"}]), "input[1].content[0]",
    ),
    "an image for the system": (
        item(role="system", content=[{"type": "input_image", "image_url": "data:,"}]),
        "input[1].content[0].image_url",
    ),
    "a citation": (
        item(role="assistant", content=[
            {"type": "output_text", "text": "x", "annotations": [{"type": "url_citation"}]}]),
        "input[1].content[0].annotations",
    ),
    "a reasoning summary": (
        item(type="reasoning", summary=[{"type": "summary_text", "text": "x"}]),
        "input[1].summary",
    ),
    "hidden reasoning": (
        item(type="reasoning", summary=[], encrypted_content="x"), "input[1].encrypted_content",
    ),
    "no call_id": (item(type="function_call_output", output="x"), "input[1].call_id"),
    "an empty call_id": (
        item(type="function_call_output", call_id="", output="x"), "input[1].call_id",
    ),
    "an empty call_id of a call": (
        item(type="function_call", call_id="", name="f", arguments="{}"), "input[1].call_id",
    ),
    "an empty name": (
        item(type="function_call", call_id="c", name="", arguments="{}"), "input[1].name",
    ),
    "no JSON": (item(type="function_call", call_id="c", name="f", arguments="x"), "input"),
    "a remote image": (
        image(image_url="https://example.com/a.png"), "input[1].content[0].image_url",
    ),
    "a broken image": (
        image(image_url="data:image/png;base64,AAAA"), "input[1].content[0].image_url",
    ),
    "a stored image": (image(file_id="file-1"), "input[1].content[0].file_id"),
    "low detail": (image(image_url="data:,", detail="low"), "input[1].content[0].detail"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_requests(server: Running, case: str):
    fields, param = BAD[case]
    reply = server.post("/v1/responses", {"model": "scripted", "input": "Hi", **fields})
    error = reply.json["error"]
    assert reply.status == (404 if param == "model" else 400) and error["param"] == param, error
    assert "\n" not in error["message"] and "Traceback" not in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


def test_the_client_reads_errors(server: Running):
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.BadRequestError, match="store is not implemented") as raised:
        client.responses.create(model="scripted", input="Hi", store=True)
    assert raised.value.param == "store"


HOSTILE = {
    "items": {"input": [{}] * 10_000},
    "types": {"input": [{"type": "x"}] * 10_000},
    "parts": {"input": [{"role": "user", "content": [5] * 10_000}]},
    "outputs": {"input": [{"role": "assistant", "content": [5] * 10_000}]},
    "reasoning": {"input": [{"type": "reasoning", "content": [5] * 10_000}]},
    "results": {
        "input": [{"type": "function_call_output", "call_id": "c", "output": [5] * 10_000}]
    },
    "tools": {"tools": [5] * 10_000},
    "include": {"include": [5] * 10_000},
    "keys": {f"key {i}": i for i in range(10_000)},
}


@pytest.mark.parametrize("case", HOSTILE)
def test_the_first_error_ends_the_check(case: str):
    """A body with an error in every element, which keeps the event loop for minutes."""
    with pytest.raises(ValidationError) as raised:
        ResponsesRequest.model_validate({"model": "m", "input": "Hi"} | HOSTILE[case])
    assert raised.value.error_count() <= 2


def test_deep(server: Running):
    """Nesting that ends in a RecursionError."""
    schema: dict = {}
    for _ in range(200):
        schema = {"properties": {"a": schema}}
    for fields in ({"tools": [TOOL | {"parameters": schema}]}, {"include": schema}):
        body = {"model": "scripted", "input": "Hi", **fields}
        assert server.post("/v1/responses", body).status == 400
    for body in (b'{"input": ' + b"[" * 100_000, b"[]", b'"input"', b""):
        assert server.post("/v1/responses", body).status == 400


def test_the_most_items():
    """As many items as may be are no more messages than chat may have."""
    items = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * MAX_ITEMS
    body = {"model": "m", "instructions": "c", "input": items[:MAX_ITEMS]}
    assert len(chat_request(ResponsesRequest.model_validate(body)).chat.messages) == MAX_ITEMS + 1


TEXTS = st.text(max_size=3)
NAMES = st.text(min_size=1, max_size=3)
ITEMS = st.one_of(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system"]),
                           "content": TEXTS}),
    st.fixed_dictionaries({"type": st.just("reasoning")}, optional={"content": st.lists(
        st.fixed_dictionaries({"type": st.just("reasoning_text"), "text": TEXTS}), max_size=2)}),
    st.fixed_dictionaries({"type": st.just("function_call"), "call_id": NAMES, "name": NAMES,
                           "arguments": TEXTS}),
    st.fixed_dictionaries({"type": st.just("function_call_output"), "call_id": NAMES,
                           "output": TEXTS}),
)  # fmt: skip


@given(st.lists(ITEMS, min_size=1, max_size=8))
@settings(max_examples=50, deadline=None, derandomize=True, database=None)
def test_any_items_are_a_chat(items: list[dict]):
    """Items in an order that chat's models refuse, which is a status of 500; text that is lost, or
    moved to another place or role."""
    body = ResponsesRequest.model_validate({"model": "m", "input": items})
    messages = [m.model_dump(exclude_none=True) for m in chat_request(body).chat.messages]
    said, expected = [], []
    for message in messages:
        texts = [message.get("reasoning_content", ""), message.get("content", "")]
        calls = [call["function"]["arguments"] for call in message.get("tool_calls", ())]
        said += [(message["role"], char) for char in sorted("".join(texts + calls))]
    for one in items:
        role = one.get("role") or ("tool" if one["type"].endswith("output") else "assistant")
        parts = one.get("content", one.get("output", one.get("arguments", "")))
        text = parts if isinstance(parts, str) else "".join(part["text"] for part in parts)
        expected += [(role, char) for char in text]
    key = json.dumps
    assert sorted(said, key=key) == sorted(expected, key=key)
