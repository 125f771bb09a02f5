"""/v1/responses through the official client, on scripted rollouts."""

import json
from collections.abc import Iterator

import pytest
from openai import OpenAI

from pacore_sched.sched.request import Rollout
from pacore_sched.serve.api.responses.body import ResponsesRequest
from pacore_sched.serve.api.responses.conversion import chat_request
from tests.pacore_sched.serve.responses.judge import checked
from tests.pacore_sched.serve.serving import Running, prompt_text, running, scripted
from tests.pacore_sched.serve.test_chat import WEATHER, script

TOOL = {"type": "function", "strict": True, **WEATHER["function"]}
PROMPTS: list[str] = []  # that rollouts were given


def noting(rollout: Rollout) -> str:
    PROMPTS.append(prompt_text(rollout))
    return "<think>h</think>yes" if "again" in PROMPTS[-1] else script(rollout)


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(scripted(noting)) as found:
        yield found
        found.wait_idle()


@pytest.fixture(scope="module")
def client(server: Running) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def respond(server: Running, **fields: object):
    reply = server.post("/v1/responses", {"model": "scripted", "input": "Hi", **fields})
    assert reply.status == 200, reply.body
    return checked(reply.json)


def test_text(client: OpenAI, server: Running):
    """A response that the client's types refuse; reasoning in the text; tokens that are miscounted,
    of which the reasoning's go up to the end of its tag."""
    answer = client.responses.create(model="scripted", input="Hi")
    assert answer.output_text == "answer 0 é"
    reasoning, message = answer.output
    assert (reasoning.type, message.type) == ("reasoning", "message")
    assert [part.text for part in reasoning.content] == ["I am 0"]
    assert answer.status == message.status == "completed"
    said = "I am 0</think>answer 0 é"
    assert answer.usage.output_tokens == len(said.encode()) + 1  # a byte per token, and the end
    assert answer.usage.output_tokens_details.reasoning_tokens == len("I am 0</think>")
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    assert respond(server).store is False
    again = respond(server, input="again").usage.output_tokens_details  # the prompt has a tag
    assert again.reasoning_tokens == len("<think>h</think>")
    chat = client.chat.completions.create(
        model="scripted", messages=[{"role": "user", "content": "Hi"}]
    )
    assert chat.usage.prompt_tokens == answer.usage.input_tokens


def test_fields(server: Running):
    """Options that are lost on their way, or not told."""
    answer = respond(
        server, instructions="Be brief.", temperature=0.5, top_p=0.7, max_output_tokens=4,
        metadata={"a": "b"}, user="me", safety_identifier="s", prompt_cache_key="k", tools=[TOOL],
    )  # fmt: skip
    assert (answer.temperature, answer.top_p, answer.max_output_tokens) == (0.5, 0.7, 4)
    assert answer.instructions == "Be brief." and answer.metadata == {"a": "b"}
    assert (answer.user, answer.safety_identifier, answer.prompt_cache_key) == ("me", "s", "k")
    (tool,) = answer.tools
    assert tool.parameters == TOOL["parameters"] and tool.strict is False  # it is not enforced
    assert answer.usage.output_tokens == 4


def test_cut_short(client: OpenAI):
    """Half an answer that looks like a whole one; reasoning without an end."""
    answer = client.responses.create(model="scripted", input="long", max_output_tokens=9)
    assert answer.status == "incomplete" and answer.completed_at is None
    assert answer.incomplete_details.reason == "max_output_tokens"
    (reasoning,) = answer.output
    assert reasoning.status == "incomplete" and reasoning.content[0].text == "x" * 9
    assert answer.output_text == ""
    assert answer.usage.output_tokens_details.reasoning_tokens == 9


def test_tools(client: OpenAI):
    """Calls that are lost, out of order, or with arguments that are no JSON."""
    answer = client.responses.create(model="scripted", input="weather?", tools=[TOOL])
    kinds = ["reasoning", "message", "function_call", "function_call"]
    assert [item.type for item in answer.output] == kinds
    calls = answer.output[2:]
    assert [json.loads(call.arguments)["city"] for call in calls] == ["Paris", "Köln"]
    assert {call.name for call in calls} == {"get_weather"}
    assert len({call.call_id for call in calls} | {item.id for item in answer.output}) == 6
    assert answer.output_text.strip() == "Let me look."
    text = client.responses.create(
        model="scripted", input="weather?", tools=[TOOL], tool_choice="none"
    )
    assert "<tool_call>" in text.output_text


USER = {"role": "user", "content": "weather?"}
CALL = {"call_id": "call_1", "name": "get_weather", "arguments": '{"city": "Paris"}'}
CHAT_CALL = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'},
}
SAME = {
    "a string": ({"input": "Hi"}, [{"role": "user", "content": "Hi"}]),
    "instructions": (
        {"input": "Hi", "instructions": "Be brief."},
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
    ),
    "roles": (
        {"input": [
            {"role": "developer", "content": [{"type": "input_text", "text": "Be brief."}]},
            {"role": "user", "content": [{"type": "input_text", "text": "Hi"},
                                         {"type": "input_text", "text": "there"}]},
            {"role": "assistant", "content": "Hello"},
            {"type": "message", "role": "user", "content": "Hi", "status": "completed"},
        ]},
        [{"role": "system", "content": "Be brief."},
         {"role": "user", "content": [{"type": "text", "text": "Hi"},
                                      {"type": "text", "text": "there"}]},
         {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "Hi"}],
    ),
    "two answers": (
        {"input": [USER, {"role": "assistant", "content": "a"},
                   {"role": "assistant", "content": "b"}, USER]},
        [USER, {"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}, USER],
    ),
    "a turn of items": (
        {"input": [
            USER,
            {"type": "reasoning", "id": "rs_1", "summary": [], "status": "completed",
             "content": [{"type": "reasoning_text", "text": "hm"}], "encrypted_content": None},
            {"type": "message", "id": "msg_1", "status": "completed", "role": "assistant",
             "content": [{"type": "output_text", "text": "Let me look.", "annotations": [],
                          "logprobs": []}]},
            {"type": "function_call", "id": "fc_1", "status": "completed", **CALL},
            {"type": "function_call", **CALL},
            {"role": "assistant", "content": " Wait."},
            {"type": "function_call_output", "call_id": "call_1", "output": "rain"},
            {"type": "function_call_output", "call_id": "call_1", "status": "completed",
             "output": [{"type": "input_text", "text": "sun"}]},
            {"type": "function_call", **CALL},
            {"type": "function_call_output", "call_id": "call_1", "output": ""},
        ]},
        [USER,
         {"role": "assistant", "reasoning_content": "hm", "content": "Let me look. Wait.",
          "tool_calls": [CHAT_CALL, CHAT_CALL]},
         {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
         {"role": "tool", "tool_call_id": "call_1", "content": "sun"},
         {"role": "assistant", "tool_calls": [CHAT_CALL]},
         {"role": "tool", "tool_call_id": "call_1", "content": ""}],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SAME)
def test_same_prompt_as_chat(client: OpenAI, server: Running, case: str):
    """A role, a part or an item that is lost; a turn in pieces."""
    body, messages = SAME[case]
    PROMPTS.clear()
    respond(server, tools=[TOOL], **body)
    client.chat.completions.create(model="scripted", messages=messages, tools=[WEATHER])
    ours, chat = PROMPTS
    assert ours == chat


@pytest.mark.parametrize("as_dicts", [False, True])
def test_round_trip(client: OpenAI, as_dicts: bool):
    """A client that cannot send back what it received, as objects or as dictionaries."""
    question = {"role": "user", "content": "weather?"}
    first = client.responses.create(model="scripted", input=[question], tools=[TOOL])
    output = [item.model_dump() for item in first.output] if as_dicts else first.output
    results = [
        {"type": "function_call_output", "call_id": item.call_id, "output": "rain"}
        for item in first.output
        if item.type == "function_call"
    ]
    PROMPTS.clear()
    second = client.responses.create(
        model="scripted", input=[question, *output, *results], tools=[TOOL]
    )
    assert second.usage.input_tokens > first.usage.input_tokens
    (prompt,) = PROMPTS
    assert prompt.count("rain") == 2 and prompt.count("Let me look.") == 1
    cut = client.responses.create(model="scripted", input="long", max_output_tokens=5)
    assert client.responses.create(model="scripted", input=[*cut.output, question]).output


def test_pacore(client: OpenAI):
    """The answer is the last round's; what the rounds before wrote is hidden, as reasoning is."""
    answer = client.responses.create(model="scripted:pacore-3", input="Hi")
    assert answer.output_text == "best of 3"
    assert [round_["rollouts"] for round_ in answer.pacore["rounds"]] == [3, 1]
    first = [f"I am {index}</think>answer {index} é" for index in range(3)]
    hidden = sum(len(text.encode()) + 1 for text in first) + len("comparing</think>")
    assert answer.usage.output_tokens_details.reasoning_tokens == hidden
    assert answer.usage.output_tokens == hidden + len("best of 3") + 1
    prompt = answer.pacore["rounds"][0]["prompt_tokens"]
    assert answer.usage.input_tokens_details.cached_tokens >= 2 * (prompt - 1)
    events = client.responses.create(
        model="scripted", input="Hi", extra_body={"pacore": {"widths": [2], "events": True}}
    )
    assert len(events.pacore["rounds"][0]["rollouts"]) == 2


def test_the_other_options():
    """An option that does not arrive."""
    options = {"stop": ["END"], "seed": 5, "temperature": 0.5, "top_p": 0.7, "top_k": 3,
               "ignore_eos": True, "stream": True, "pacore": {"min_messages": 2}}  # fmt: skip
    body = {"model": "m", "input": "Hi", "max_output_tokens": 4, **options}
    chat = chat_request(ResponsesRequest.model_validate(body)).chat
    expected = {"model": "m", "max_tokens": 4, **options}
    assert chat.model_dump(include=set(expected), exclude_unset=True) == expected


def test_neutral_values(server: Running):
    """Clients send parameters that change nothing, and nulls."""
    fields = {
        "store": False, "background": False, "truncation": "disabled", "service_tier": "auto",
        "parallel_tool_calls": True, "previous_response_id": None, "tools": [],
        "tool_choice": "auto", "text": {"format": {"type": "text"}, "verbosity": "medium"},
        "reasoning": {"effort": "medium", "summary": "auto"}, "top_logprobs": 0,
        "include": ["reasoning.encrypted_content"], "max_tool_calls": None, "temperature": None,
        "stream_options": None, "frequency_penalty": 0,
    }  # fmt: skip
    assert respond(server, **fields).output_text == "answer 0 é"
