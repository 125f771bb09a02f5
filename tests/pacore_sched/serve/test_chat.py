"""Chat completions through the official client, on scripted rollouts."""

import json
from collections.abc import Iterator
from functools import partial

import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel

from pacore_sched.sched.request import Rollout
from tests.pacore_sched.serve.serving import Running, prompt_text, running, scripted

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALLS = (
    "I need the weather.</think>\n\nLet me look.\n<tool_calls>\n<tool_call>\n"
    '{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>\n<tool_call>\n'
    '{"name": "get_weather", "arguments": {"city": "Köln"}}\n</tool_call>\n</tool_calls>'
)


def script(rollout: Rollout) -> str:
    """What the "model" says: by words in the prompt. The prompt opens `<think>`."""
    text = prompt_text(rollout)
    if "Reference Responses" in text:
        return f"comparing</think>best of {text.count('Reference ') - 1}"
    if "weather" in text:
        return CALLS
    if "stop" in text:
        return "hm</think>one ENDING two"
    if "long" in text:
        return "x" * 500
    return f"I am {rollout.index}</think>answer {rollout.index} é"


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(scripted(script)) as found:
        yield found
        found.wait_idle()


@pytest.fixture(scope="module")
def client(server: Running) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def ask(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def test_chat(client: OpenAI):
    """Reasoning apart from content, no end-of-turn token in either, and the tokens of both."""
    answer = client.chat.completions.create(model="scripted", messages=ask("Hi"))
    message = answer.choices[0].message
    assert message.content == "answer 0 é"
    assert message.reasoning_content == "I am 0"
    assert answer.choices[0].finish_reason == "stop"
    said = len("I am 0</think>answer 0 é".encode()) + 1  # a byte per token, and the end of turn
    assert answer.usage.completion_tokens == said
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + said
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


def test_n(client: OpenAI):
    """Choices swapped, or the prompt counted once per choice."""
    one = client.chat.completions.create(model="scripted", messages=ask("Hi"))
    four = client.chat.completions.create(model="scripted", messages=ask("Hi"), n=4)
    contents = [choice.message.content for choice in four.choices]
    assert contents == [f"answer {index} é" for index in range(4)]
    assert [choice.index for choice in four.choices] == [0, 1, 2, 3]
    assert four.usage.prompt_tokens == one.usage.prompt_tokens
    assert four.usage.completion_tokens == 4 * one.usage.completion_tokens


def test_stream(client: OpenAI):
    """A stream that differs from the whole answer: tags in a delta, half a character, a lost or
    doubled piece, more than one finish reason per choice."""
    stream = client.chat.completions.create(
        model="scripted", messages=ask("Hi"), n=2, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    texts = [{"content": "", "reasoning_content": ""} for _ in range(2)]
    reasons, usages = [[], []], []
    for chunk in stream:
        assert chunk.object == "chat.completion.chunk"
        if chunk.usage:
            usages.append(chunk.usage)
        for choice in chunk.choices:
            assert not reasons[choice.index], "a chunk after the finish reason"
            texts[choice.index]["content"] += choice.delta.content or ""
            reasoning = getattr(choice.delta, "reasoning_content", None)
            texts[choice.index]["reasoning_content"] += reasoning or ""
            if choice.finish_reason:
                reasons[choice.index].append(choice.finish_reason)
    for index in range(2):
        expected = {"content": f"answer {index} é", "reasoning_content": f"I am {index}"}
        assert texts[index] == expected
    assert reasons == [["stop"], ["stop"]]
    whole = client.chat.completions.create(model="scripted", messages=ask("Hi"), n=2)
    assert [usage.model_dump() for usage in usages] == [whole.usage.model_dump()]


def test_usage_so_far(client: OpenAI):
    """A stream whose chunks have no usage, one that goes back, or one that counts tokens twice when
    a rollout ends: load generators ask for it."""
    options = {"include_usage": True, "continuous_usage_stats": True}
    bodies = (
        (client.chat.completions, {"messages": ask("Hi"), "n": 2}),
        (client.completions, {"prompt": ["Hi", "Ho"], "max_tokens": 9}),
    )
    for endpoint, fields in bodies:
        create = partial(endpoint.create, model="scripted", **fields)
        usages = [chunk.usage for chunk in create(stream=True, stream_options=options)]
        tokens = [usage.completion_tokens for usage in usages]
        assert tokens == sorted(tokens)
        assert len(set(tokens)) > 5
        assert usages[-1] == create().usage
        only = create(stream=True, stream_options={"continuous_usage_stats": True})
        assert not any(chunk.usage for chunk in only)


@pytest.mark.parametrize("stream", [False, True])
def test_stop_string(client: OpenAI, stream: bool):
    """The stop string, or its beginning, in what the client gets."""
    answer = client.chat.completions.create(
        model="scripted", messages=ask("stop"), stop=["ENDING"], stream=stream
    )
    if stream:
        choices = [choice for chunk in answer for choice in chunk.choices]
        content = "".join(choice.delta.content or "" for choice in choices)
        reason = choices[-1].finish_reason
    else:
        content, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
    assert (content, reason) == ("one ", "stop")


def test_length(client: OpenAI):
    """Reasoning that was cut off is not content."""
    answer = client.chat.completions.create(model="scripted", messages=ask("long"), max_tokens=9)
    choice = answer.choices[0]
    assert choice.finish_reason == "length"
    assert choice.message.content is None
    assert choice.message.reasoning_content == "x" * 9


@pytest.mark.parametrize("stream", [False, True])
def test_tools(client: OpenAI, stream: bool):
    """Calls in the content or the reasoning, with their tags; arguments that are no JSON; calls
    that lose their place in a stream."""
    answer = client.chat.completions.create(
        model="scripted", messages=ask("weather?"), tools=[WEATHER], stream=stream
    )
    content = reasoning = ""
    calls: dict[int, dict] = {}
    if stream:
        for chunk in answer:
            for choice in chunk.choices:
                content += choice.delta.content or ""
                reasoning += getattr(choice.delta, "reasoning_content", None) or ""
                for call in choice.delta.tool_calls or ():
                    assert call.id and call.index not in calls
                    calls[call.index] = call.function.model_dump()
                reason = choice.finish_reason or ""
    else:
        message, reason = answer.choices[0].message, answer.choices[0].finish_reason
        content, reasoning = message.content, message.reasoning_content
        calls = dict(enumerate(call.function.model_dump() for call in message.tool_calls))
    assert reason == "tool_calls"
    assert content.strip() == "Let me look." and reasoning == "I need the weather."
    assert {index: call["name"] for index, call in calls.items()} == dict.fromkeys(
        (0, 1), "get_weather"
    )
    cities = [json.loads(call["arguments"])["city"] for call in calls.values()]
    assert cities == ["Paris", "Köln"]


def test_the_clients_own_tool_helper(client: OpenAI):
    """OpenAI's client makes tools of pydantic models, with `strict`."""

    class GetWeather(BaseModel):
        city: str

    tool = openai.pydantic_function_tool(GetWeather, name="get_weather")
    answer = client.chat.completions.create(
        model="scripted", messages=ask("weather?"), tools=[tool]
    )
    assert len(answer.choices[0].message.tool_calls) == 2


def test_tool_round_trip(client: OpenAI):
    """A client that cannot send back what it received: the message with calls, and the results."""
    first = client.chat.completions.create(
        model="scripted", messages=ask("weather?"), tools=[WEATHER]
    )
    message = first.choices[0].message
    results = [
        {"role": "tool", "tool_call_id": call.id, "content": "rain in wether"}
        for call in message.tool_calls
    ]
    sent = message.model_dump()
    sent["tool_calls"][0]["index"] = 0  # as clients keep it that read a stream
    sent["tool_calls"][1]["function"]["arguments"] = ""  # of a function without parameters
    messages = [*ask("weather?"), sent, *results]
    second = client.chat.completions.create(model="scripted", messages=messages, tools=[WEATHER])
    assert second.usage.prompt_tokens > first.usage.prompt_tokens


def test_an_answer_goes_back(client: OpenAI):
    """A client that cannot send back an answer that was cut in its reasoning, without content."""
    cut = client.chat.completions.create(model="scripted", messages=ask("long"), max_tokens=5)
    message = cut.choices[0].message.model_dump()
    assert message["content"] is None
    following = [*ask("long"), message, *ask("Hi")]
    assert client.chat.completions.create(model="scripted", messages=following).choices


def test_no_tools_no_calls(client: OpenAI):
    """A call in the text of a request without tools, or with tool_choice none, is text."""
    for options in ({}, {"tools": [WEATHER], "tool_choice": "none"}):
        answer = client.chat.completions.create(
            model="scripted", messages=ask("weather?"), **options
        )
        assert "<tool_call>" in answer.choices[0].message.content
        assert answer.choices[0].message.tool_calls is None


def test_logprobs(client: OpenAI):
    """An entry per token, whose bytes are the text."""
    answer = client.chat.completions.create(model="scripted", messages=ask("Hi"), logprobs=True)
    entries = answer.choices[0].logprobs.content
    assert len(entries) == answer.usage.completion_tokens
    data = b"".join(bytes(entry.bytes) for entry in entries[:-1])
    assert data.decode() == "I am 0</think>answer 0 é"
    assert entries[-1].token == "<|im_end|>" and entries[0].logprob == -0.5


def test_pacore(client: OpenAI):
    """The answer is the last round's, and usage counts all rollouts and what they shared."""
    answer = client.chat.completions.create(model="scripted:pacore-3", messages=ask("Hi"))
    assert answer.choices[0].message.content == "best of 3"
    assert answer.choices[0].message.reasoning_content == "comparing"
    rounds = answer.pacore["rounds"]
    assert [round_["rollouts"] for round_ in rounds] == [3, 1]
    assert all(round_["cut"] == round_["dropped"] == [] for round_ in rounds)
    first, last = (round_["prompt_tokens"] for round_ in rounds)
    assert answer.usage.prompt_tokens == 3 * first + last
    assert answer.usage.prompt_tokens_details.cached_tokens == 2 * (first - 1)


def test_pacore_events(client: OpenAI, server: Running):
    """Events out of order, missing, or with choices, which ordinary clients would read."""
    body = {
        "model": "scripted",
        "messages": ask("Hi"),
        "pacore": {"widths": [2, 3], "events": True},
        "stream": True,
    }
    frames = server.post("/v1/chat/completions", body).body.decode().split("\n\n")
    named = [frame.split("\n") for frame in frames if frame.startswith("event: ")]
    names = [name.removeprefix("event: ") for name, _ in named]
    finished = "pacore.rollout_finished"
    assert names == [
        "pacore.round_started", finished, finished,
        "pacore.round_started", finished, finished, finished,
        "pacore.synthesis_started",
    ]  # fmt: skip
    data = [json.loads(line.removeprefix("data: ")) for _, line in named]
    assert all(chunk["choices"] == [] for chunk in data)
    assert sorted(chunk["pacore"]["message"] for chunk in data[1:3]) == ["answer 0 é", "answer 1 é"]
    assert data[0]["pacore"]["width"] == 2 and data[3]["pacore"]["width"] == 3
    assert frames[-2:] == ["data: [DONE]", ""]
    content = ""
    extra = {"pacore": body["pacore"]}
    for chunk in client.chat.completions.create(
        model="scripted", messages=ask("Hi"), stream=True, extra_body=extra
    ):
        content += "".join(choice.delta.content or "" for choice in chunk.choices)
    assert content == "best of 3"


def test_min_messages(client: OpenAI):
    """The round goes on with 2 of 4; the cancelled ones are counted."""
    answer = client.chat.completions.create(
        model="scripted", messages=ask("Hi"),
        extra_body={"pacore": {"widths": [4], "min_messages": 2, "events": True}},
    )  # fmt: skip
    reasons = [r["finish_reason"] for r in answer.pacore["rounds"][0]["rollouts"]]
    assert reasons.count("stop") >= 2 and len(reasons) == 4
