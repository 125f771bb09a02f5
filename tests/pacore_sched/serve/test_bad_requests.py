"""Bodies that are wrong: what is refused, and how the client is told."""

import json
from collections.abc import Iterator

import openai
import pytest
from openai import OpenAI
from pydantic import ValidationError

from pacore_sched.serve.api.requests import ChatRequest, CompletionRequest, DetokenizeRequest
from tests.pacore_sched.serve.serving import Running, answering, running, scripted
from tests.pacore_sched.serve.test_chat import WEATHER, ask


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(scripted(answering)) as found:
        yield found
        found.wait_idle()


BAD = {
    "unknown model": ({"model": "gpt-4o"}, 404, "model"),
    "another name with widths": ({"model": "other:pacore-2"}, 404, "model"),
    "bad widths in a name": ({"model": "scripted:pacore-0"}, 404, "model"),
    "widths twice": (
        {"model": "scripted:pacore-2", "pacore": {"widths": [3]}}, 400, "pacore.widths",
    ),
    "too wide": ({"pacore": {"widths": [129]}}, 400, "pacore.widths"),
    "many rounds": ({"pacore": {"widths": [1] * 9}}, 400, "pacore.widths"),
    "n with pacore": ({"n": 2, "pacore": {}}, 400, "n"),
    "no user message with pacore": (
        {"messages": [{"role": "system", "content": "x"}], "pacore": {"widths": [2]}}, 400,
        "messages",
    ),
    "tools with pacore": ({"tools": [WEATHER], "pacore": {}}, 400, "tools"),
    "not implemented": ({"frequency_penalty": 0.5}, 400, "frequency_penalty"),
    "logit_bias": ({"logit_bias": {"5": 1}}, 400, "logit_bias"),
    "unknown parameter": ({"guided_regex": "a"}, 400, "guided_regex"),
    "nested unknown": ({"pacore": {"width": 3}}, 400, "pacore.width"),
    "a string for a number": ({"n": "4"}, 400, "n"),
    "a bool for a number": ({"n": True}, 400, "n"),
    "n too large": ({"n": 129}, 400, "n"),
    "temperature": ({"temperature": 1e-9}, 400, "temperature"),
    "top_p": ({"top_p": 0}, 400, "top_p"),
    "stream_options alone": ({"stream_options": {"include_usage": True}}, 400, None),
    "half a surrogate pair": ({"messages": ask("\ud800")}, 400, "messages[0].content"),
    "half a pair in a tool": (
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"a": "\ud800"}}}]},
        400,
        "tools[0].function.parameters",
    ),
    "a long unknown key": ({"x" * 1000: 1}, 400, "x" * 80 + "..."),
    "many stops": ({"stop": ["a"] * 17}, 400, "stop"),
    "empty stop": ({"stop": ""}, 400, "stop"),
    "max_tokens": ({"max_tokens": 10**6}, 400, "max_tokens"),
    "two limits": ({"max_tokens": 5, "max_completion_tokens": 6}, 400, "max_tokens"),
    "top_logprobs alone": ({"top_logprobs": 3}, 400, "top_logprobs"),
    "no messages": ({"messages": []}, 400, "messages"),
    "a role": ({"messages": [{"role": "bot", "content": "x"}]}, 400, "messages[0]"),
    "a content": ({"messages": [{"role": "user", "content": 5}]}, 400, "messages[0].content"),
    "a part": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]},
        400,
        "messages[0].content[0].text",
    ),
    "tool_choice required": ({"tools": [WEATHER], "tool_choice": "required"}, 400, "tool_choice"),
    "tool_choice alone": ({"tool_choice": "auto"}, 400, "tool_choice"),
    "a long prompt": ({"messages": ask("x" * 9000)}, 400, "messages"),
    "a remote image": (
        {"messages": [{"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}]}]},
        400,
        "messages[0].content[0].image_url.url",
    ),
    "a broken image": (
        {"messages": [{"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]}]},
        400,
        "messages[0].content[0].image_url.url",
    ),
    "low detail": (
        {"messages": [{"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": "data:,", "detail": "low"}}]}]},
        400,
        "messages[0].content[0].image_url.detail",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_requests(server: Running, case: str):
    """A parameter that is ignored, a status 500, an error that does not name the field."""
    fields, status, param = BAD[case]
    reply = server.chat(**fields)
    error = reply.json["error"]
    assert (reply.status, error["param"]) == (status, param), error
    assert "\n" not in error["message"] and "Traceback" not in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


def test_neutral_values(server: Running):
    """Clients send parameters that change nothing, and nulls."""
    fields = {
        "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "best_of": 1,
        "response_format": {"type": "text"}, "parallel_tool_calls": True, "user": "me",
        "guided_json": None, "store": False, "metadata": {"a": "b"}, "n": None, "stream": None,
        "logprobs": None, "ignore_eos": None, "temperature": None,
        # As lm-evaluation-harness writes messages.
        "messages": [{"role": "user", "content": "Hi", "type": "text", "name": None}],
    }  # fmt: skip
    assert server.chat(**fields).status == 200


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"nonsense", b'{"a": NaN}', b"[" * 100_000, b"\xff"]
)
def test_malformed_bodies(server: Running, body: bytes):
    """A traceback or a status 500 for what is no JSON object."""
    reply = server.post("/v1/chat/completions", body)
    assert reply.status == 400 and reply.json["error"]["message"]


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded"])
def test_content_type(server: Running, kind: str):
    """A right body that is called wrong, for a header that is missing."""
    body = json.dumps({"model": "scripted", "messages": ask("Hi")}).encode()
    reply = server.post("/v1/chat/completions", body, Content_Type=kind)
    assert reply.status == 400
    assert "Content-Type: application/json" in reply.json["error"]["message"]


HOSTILE = {
    "ids": (DetokenizeRequest, {"tokens": [-1] * 10_000}),
    "prompt ids": (CompletionRequest, {"model": "m", "prompt": [-1] * 10_000}),
    "prompts": (CompletionRequest, {"model": "m", "prompt": [5, *["a"] * 10_000]}),
    "texts": (CompletionRequest, {"model": "m", "prompt": ["a", *[5] * 10_000]}),
    "messages": (ChatRequest, {"model": "m", "messages": [{}] * 10_000}),
    "parts": (ChatRequest, {"model": "m", "messages": [{"role": "user", "content": [5] * 10_000}]}),
    "keys": (ChatRequest, {"model": "m"} | {f"key {i}": i for i in range(10_000)}),
    "stops": (ChatRequest, {"model": "m", "messages": ask("a"), "stop": [5] * 10_000}),
    "widths": (ChatRequest, {"model": "m", "messages": ask("a"), "pacore": {"widths": [0] * 9999}}),
    "tools": (ChatRequest, {"model": "m", "messages": ask("a"), "tools": [5] * 10_000}),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_the_first_error_ends_the_check(case: str):
    """A body with an error in every element, which keeps the event loop for minutes."""
    kind, body = HOSTILE[case]
    with pytest.raises(ValidationError) as raised:
        kind.model_validate(body)
    assert raised.value.error_count() <= 2  # a union has one for each member


def test_the_client_reads_errors(server: Running):
    """The official client finds the message and the field."""
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.BadRequestError, match="frequency_penalty is not implemented") as e:
        client.chat.completions.create(model="scripted", messages=ask("Hi"), frequency_penalty=1)
    assert e.value.param == "frequency_penalty"
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4o'"):
        client.chat.completions.create(model="gpt-4o", messages=ask("Hi"))
