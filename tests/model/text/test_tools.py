"""Tools in prompts: rendered as by transformers, and never lost."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import TemplateError

from model.errors import InputError
from model.text.prompt import build_prompt, num_characters, opens_thinking
from model.text.tokenizer import Tokenizer
from tests.model.text.test_chat_template import (
    CONFIG,
    NAMED,
    STRINGS,
    assistant,
    ours,
    plain,
    system,
    user,
)
from tests.model.text.test_prompt import BYTES, IMAGE, SMOLLM2, TINY, text
from tests.model.text.test_tokenizer import smollm2
from tests.model.text.tool_chats import ADD, TEMPLATES, WEATHER, call, calls, result, tool

ASKED = [user("Weather in Zürich?"), calls(call("weather", {"city": "Zürich", "unit": "C"}))]
CHATS = {
    "tools": ([WEATHER, ADD], [user("Hi")]),
    "system": ([WEATHER], [system("Be brief."), user("Hi")]),
    "call": ([WEATHER], [*ASKED, result('{"degrees": 21.5}')]),
    "answered": ([WEATHER], [*ASKED, result("21 'C'"), assistant("Warm."), user("Thanks.")]),
    "no tools now": (None, [*ASKED, result("21"), assistant("Warm."), user("Thanks.")]),
    "calls": (
        [WEATHER, ADD],
        [
            user("a"),
            calls(
                call("weather", {"city": "漢字 \\ \"q\" 'r'"}),
                call("add", {"where": {"x": [1, 2.5, None, True]}}),
            ),
            result("1"),
            result("2"),
            calls(call("add", {})),
            result("3"),
        ],
    ),
    "reasoning": (
        [WEATHER],
        [
            *(user("a"), assistant("b") | {"reasoning_content": "\nEarlier?\n"}, user("c")),
            *(calls(call("weather", {"city": "d"}), reasoning_content="Now d."), result("e")),
        ],
    ),
}


@pytest.mark.judge
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_equals_transformers(template, chat):
    """Guards tools as JSON without escapes, calls with their arguments as objects, contents that
    are null, and reasoning with a key of its own."""
    from transformers.utils.chat_template_utils import render_jinja_template

    tools, messages = CHATS[chat]
    parsed = json.loads(json.dumps(messages))
    for message in parsed:
        for each in message.get("tool_calls", []):
            each["function"]["arguments"] = json.loads(each["function"]["arguments"])
    tokenizer = ours(TEMPLATES[template])
    try:
        (expected,), _ = render_jinja_template(
            [parsed], tools, chat_template=TEMPLATES[template], add_generation_prompt=True, **NAMED
        )
    except TemplateError as error:
        with pytest.raises(InputError) as raised:
            build_prompt(messages, tokenizer, CONFIG, tools=tools)
        assert str(raised.value) == f"the chat template failed: {error}"
    else:
        assert build_prompt(messages, tokenizer, CONFIG, tools=tools) == tokenizer.encode(expected)


def readable(ids):
    """The text of a prompt with <S> and <E> for the tokens that start and end a turn."""
    shown = {257: b"<S>", 258: b"<E>"}
    return b"".join(shown.get(id) or bytes([id]) for id in ids).decode()


def test_chatml_with_tools():
    """Guards the form that Hermes and Qwen models read, and calls and results that follow each
    other."""
    two = calls(call("weather", {"city": "é"}), call("add", {}), content="So:")
    chat = [system("Be brief."), user("a"), two, result("1"), result([text("2"), text("3")])]
    opening, _, turns = readable(build_prompt(chat, BYTES, TINY, tools=[WEATHER, ADD])).partition(
        "<E>\n"
    )
    schemas = "\n".join(json.dumps(each, ensure_ascii=False) for each in (WEATHER, ADD))
    assert opening.startswith("<S>system\nBe brief.\n\n# Tools\n\n")
    assert f"\n<tools>\n{schemas}\n</tools>\n" in opening
    assert opening.endswith("\n</tool_call>")
    assert turns == (
        "<S>user\na<E>\n<S>assistant\nSo:\n"
        '<tool_call>\n{"name": "weather", "arguments": {"city": "é"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call><E>\n'
        "<S>user\n<tool_response>\n1\n</tool_response>\n"
        "<tool_response>\n23\n</tool_response><E>\n<S>assistant\n<think>\n"
    )


TURNS = st.tuples(
    st.sampled_from(["system", "user", "assistant"]), st.text(st.characters(codec="ascii"))
)


@given(st.lists(TURNS, min_size=1))
def test_chatml_without_tools(turns):
    """Guards prompts without tools, which are ChatML and nothing else."""
    chat = [{"role": role, "content": content} for role, content in turns]
    expected = "".join(f"<S>{role}\n{content}<E>\n" for role, content in turns)
    for tools in (None, []):
        ids = build_prompt(chat, BYTES, TINY, tools=tools)
        assert readable(ids) == expected + "<S>assistant\n<think>\n"


def test_developers_are_written_as_system():
    """Guards a role that templates do not know."""
    instructed = [[{"role": r, "content": "b"}, user("a")] for r in ("developer", "system")]
    prompts = [build_prompt(chat, BYTES, TINY) for chat in instructed]
    assert prompts[0] == prompts[1]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("content", ["", []])
def test_a_call_may_have_an_empty_content(template, content):
    """Guards templates that write calls only if the content is null."""
    tokenizer, call_only = ours(TEMPLATES[template]), calls(call("add", {"a": "b"}))
    absent = {key: value for key, value in call_only.items() if key != "content"}
    prompts = [
        build_prompt([user("a"), turn, result("c")], tokenizer, CONFIG)
        for turn in (call_only, absent, call_only | {"content": content})
    ]
    assert prompts[0] == prompts[1] == prompts[2]


@pytest.mark.parametrize(
    "template",
    [
        STRINGS["smollm2"],
        "{{ messages[0].content }}{{ tools | length }}",
        "{{ messages[0].content }}{{ tools[0] | tojson }}",
        "{{ messages[0].content[0].text }}",
    ],
)
def test_template_that_takes_no_tools(template):
    """Guards an answer from a model that did not see a tool."""
    with pytest.raises(InputError, match="takes no tools; .* --chat-template"):
        build_prompt([user("a")], ours(template), CONFIG, tools=[ADD, WEATHER])


def per_message(written):
    return f"{{% for m in messages %}}{written}{{% endfor %}}"


CONTENT = "{{ m.content or '' }}"
NAME = "{{ m.tool_calls[0].function.name if m.tool_calls }}"
ARGUMENTS = "{{ m.tool_calls[0].function.arguments | tojson if m.tool_calls }}"
LOST_CALL = "a tool call of message 2 (role assistant)"


@pytest.mark.parametrize(
    ("written", "turn", "lost"),
    [
        (CONTENT, calls(call("add", {})), LOST_CALL),
        (CONTENT + ARGUMENTS, calls(call("add", {})), LOST_CALL),
        (CONTENT + NAME, calls(call("add", {"a": "b"})), LOST_CALL),
        (CONTENT + NAME, calls(call("add", {"a": 5})), LOST_CALL),
        (
            CONTENT + NAME + ARGUMENTS.replace("arguments", "arguments.keys() | list"),
            calls(call("add", {"a": [0, {"b": "c"}]})),
            LOST_CALL,
        ),
        (
            CONTENT + NAME + ARGUMENTS.replace("arguments", "arguments.values() | list"),
            calls(call("add", {"a": [0, {"b": "c"}]})),
            LOST_CALL,
        ),
        (CONTENT + NAME + ARGUMENTS, calls(call("add", {}), call("add", {})), LOST_CALL),
        (
            "{{ m.content if not m.tool_calls }}" + NAME + ARGUMENTS,
            calls(call("add", {}), content="b"),
            "the text of message 2 (role assistant)",
        ),
        (
            "{{ m.content if m.role != 'tool' }}",
            result("b"),
            "the text of message 2 (role tool)",
        ),
    ],
)
def test_no_call_and_no_result_is_lost(written, turn, lost):
    """Guards calls and results that do not reach the model."""
    with pytest.raises(InputError, match="the chat template leaves out") as error:
        build_prompt([user("a"), turn], ours(per_message(written)), CONFIG)
    assert lost in str(error.value)


def test_reasoning_may_be_left_out():
    """Guards templates that drop the reasoning of earlier turns."""
    chat = [user("a"), assistant("b") | {"reasoning_content": "So? It is b."}, user("c")]
    assert plain(build_prompt(chat, ours(per_message(CONTENT)), CONFIG)) == "abc"


FUNCTION = {"name": "add", "arguments": "{}"}
CALL = {"id": "1", "type": "function", "function": FUNCTION}


def deep(levels, kind=dict):
    value = kind()
    for _ in range(levels):
        value = {"a": value} if kind is dict else [value]
    return value


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ({"role": "tool", "content": "b"}, "of role tool needs a tool_call_id"),
        (result(None), "content must be a string or a list of parts"),
        (result([IMAGE]), "a tool's result must be text"),
        (result("b", id=5), "a message's tool_call_id must be a string, not 5"),
        (result("b") | {"tool_calls": [CALL]}, "tool_call_id, name; tool_calls is not implemented"),
        (user("b") | {"reasoning_content": "c"}, "reasoning_content is not implemented"),
        (assistant("b") | {"name": "Ann"}, "tool_calls; name is not implemented"),
        (assistant("b") | {"reasoning_content": ["c"]}, "reasoning_content must be a string"),
        (assistant(None), "content must be a string or a list of parts"),
        (calls(), "content must be a string or a list of parts"),
        (calls(content="b", tool_calls={}), "tool_calls must be a list, not {}"),
        (calls("add"), "a tool call must be {.*}, not 'add'"),
        (calls(CALL | {"id": None}), "a tool call must be"),
        (calls(CALL | {"index": 0}), "a tool call must be"),
        (calls(CALL | {"type": "custom"}), "a tool call must be"),
        (calls(CALL | {"function": "add"}), "a tool call must be"),
        (calls(CALL | {"function": FUNCTION | {"name": ""}}), "a tool call must be"),
        (calls(CALL | {"function": FUNCTION | {"strict": True}}), "a tool call must be"),
        *(
            (
                calls(CALL | {"function": FUNCTION | {"arguments": arguments}}),
                "the arguments of a call of 'add' must be a JSON object in a string, not",
            )
            for arguments in (None, {}, "", "[]", "{", '"a"', '{"a": "\\ud83d"}', "[" * 100_000)
        ),
        (calls(call("add", deep(101))), "may be nested 100 levels deep"),
    ],
)
def test_bad_turns(turn, message):
    """Guards against a traceback, or a call that is not the client's."""
    with pytest.raises(InputError, match=message) as error:
        build_prompt([user("a"), turn], BYTES, TINY)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ({"type": "function"}, "tools must be a list"),
        (["add"], "a tool must be {.*}, not 'add'"),
        ([{"type": "function"}], "a tool must be"),
        ([ADD["function"]], "a tool must be"),
        ([ADD | {"type": "web_search"}], "a tool must be"),
        ([ADD | {"function": {"description": "b"}}], "a tool must be"),
        ([ADD | {"function": {"name": 5}}], "a tool must be"),
        ([ADD | {"function": {"name": "add", "parameters": "b"}}], "a tool must be"),
        ([ADD | {"function": {"name": "add", "description": ["b"]}}], "a tool must be"),
        ([ADD | {"more": b"b"}], "tools must have JSON values, not b'b'"),
        ([ADD | {"more": {5: "b"}}], "key must be a string, not 5"),
        ([tool("add", a=deep(5000))], "may be nested 100 levels deep"),
        ([tool("add", a=deep(5000, list))], "may be nested 100 levels deep"),
    ],
)
def test_bad_tools(tools, message):
    """Guards against a traceback for what no client may send."""
    with pytest.raises(InputError, match=message) as error:
        build_prompt([user("a")], BYTES, TINY, tools=tools)
    assert "\n" not in str(error.value)


def test_error_of_a_template_about_a_tool():
    """Guards against naming a type of ours."""
    template = "{{ messages[0].content }}{{ tools[0].function.strict.x }}"
    with pytest.raises(InputError, match="failed: 'dict object' has no attribute 'strict'"):
        build_prompt([user("a")], ours(template), CONFIG, tools=[ADD])


def test_a_tool_needs_only_a_name():
    """Guards against refusing what clients leave out, or add."""
    least = {"type": "function", "function": {"name": "now"}}
    more = {"type": "function", "function": {"name": "f", "description": None, "strict": True}}
    ids = build_prompt([user("a")], BYTES, TINY, tools=[least, more])
    assert f"{json.dumps(least)}\n{json.dumps(more)}\n" in readable(ids)


def test_all_texts_count(monkeypatch):
    """Guards against work on many MB of tools, calls or reasoning before they are refused."""
    chat = [user("12"), calls(call("345", {"6": "7"}, id="8"), reasoning_content="9")]
    sizes = [num_characters(chat), num_characters(chat, [ADD]), num_characters([user("12")])]
    keys = len("id" + "type" + "function" * 2 + "name" + "arguments")
    assert sizes[0] == len("12" + "345" + '{"6": "7"}' + "8" + "9") + keys
    assert sizes[1] > sizes[0] + len("About add.")
    monkeypatch.setattr("model.text.prompt.CHARACTERS", sizes[1] - 1)
    monkeypatch.setattr("model.text.prompt.read_turn", None)
    with pytest.raises(InputError, match="a prompt may have"):
        build_prompt(chat, BYTES, TINY, tools=[ADD])


def test_characters_that_the_vocabulary_lacks():
    """Guards against dropping them silently."""
    source = TEMPLATES["chatml"]
    tokenizer = Tokenizer(smollm2()._backend, chat_template=source)
    with pytest.raises(InputError, match=r"the tools have the character U\+0004"):
        build_prompt([user("a")], tokenizer, SMOLLM2, tools=[tool("\x04")])
    with pytest.raises(InputError, match=r"message 2 \(role assistant\) has the character U\+0004"):
        build_prompt([user("a"), calls(call("\x04", {}))], tokenizer, SMOLLM2)


@pytest.mark.parametrize(
    ("template", "opens"),
    [
        ("{{ messages[0].content }}<|im_end|><think>", True),
        ("{{ messages[0].content }}<|im_end|>assistant\n<think>\n", True),
        ("{{ messages[0].content }}<think>{{ ' \n' * 3 }}", True),
        ("{{ messages[0].content }}<|im_end|>", False),
        ("{{ messages[0].content }}<|im_end|>\n", False),
        ("{{ messages[0].content }}\nassistant:", False),
        ("{{ messages[0].content }}<|im_end|><think>\n\n</think>\n\n", False),
        ("{{ messages[0].content }}<|im_end|><think>\nSo", False),
        ("{{ messages[0].content }}", True),
    ],
)
@pytest.mark.parametrize("added", [False, True])
def test_prompts_that_open_thinking(template, opens, added):
    """Guards an answer whose reasoning is shown as its content, or the reverse: only the end of
    the prompt counts, whether `<think>` is one token or several."""
    tokenizer = with_think(template) if added else ours(template)
    ids = build_prompt([user("What is <think>")], tokenizer, CONFIG)
    assert opens_thinking(ids, tokenizer) == opens


def with_think(template):
    """A tokenizer whose `<think>` is one token, flagged special."""
    from tokenizers import AddedToken

    backend = Tokenizer.byte_level(TINY)._backend
    backend.add_tokens([AddedToken("<think>", special=True, normalized=False)])
    return Tokenizer(backend, chat_template=template)


def test_no_prompt_opens_no_thinking():
    """Guards against an error for an empty or a short prompt."""
    assert not opens_thinking([], BYTES)
    assert opens_thinking(BYTES.encode("<think>"), BYTES)
    assert not opens_thinking(BYTES.encode("think>"), BYTES)
