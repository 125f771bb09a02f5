"""The parser of reasoning, content and calls, against a reading of whole texts by regexes."""

import json
import re
import time
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pacore_sched.serve.text.sections import Content, Reasoning, Sections, ToolCall, parse_calls

BEIJING = '{"name": "get_weather", "arguments": {"location": "Beijing"}}'
CALL = f"<tool_call>\n{BEIJING}\n</tool_call>"
WEATHER = ToolCall("get_weather", '{"location": "Beijing"}')


def parsed(*pushes: str, thinking=False, tools=True):
    """(reasoning, content, calls) of a text pushed in pieces."""
    sections = Sections(thinking=thinking, tools=tools)
    pieces = [piece for text in pushes for piece in sections.push(text)] + sections.finish()
    texts = {kind: "".join(p.text for p in pieces if isinstance(p, kind)) for kind in TEXTS}
    return *texts.values(), [piece for piece in pieces if isinstance(piece, ToolCall)]


TEXTS = (Reasoning, Content)


def call_in(body: str) -> list[ToolCall]:
    """Written without looking at the parser: what OpenAI's clients can use."""
    try:
        value = json.loads(body, parse_constant=int)  # int("NaN") fails
    except ValueError:
        return []
    calls = []
    for call in value if isinstance(value, list) else [value]:
        if not isinstance(call, dict) or not isinstance(call.get("name"), str) or not call["name"]:
            return []
        arguments = call.get("arguments", {} if list(call) == ["name"] else None)
        try:
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        except ValueError:
            return []
        if not isinstance(arguments, dict):
            return []
        calls.append(ToolCall(call["name"], json.dumps(arguments)))
    return calls


def reference(text: str, thinking: bool, tools: bool):
    """(reasoning, content, calls) of a whole text."""
    if opened := re.match(r"(?:\s*<think>)+", text):
        thinking, text = True, text[opened.end() :]
    call = re.compile(r"\s*(<tool_calls>\s*)?<tool_call>(\s*[{\[].*?)(</tool_call>|\Z)", re.S)

    def calls_of(match, whole=True):
        if not match[3] and not whole:
            return []
        body = match[2]
        ends = [body[:-n] for n in range(1, 12) if body.endswith("</tool_call>"[:n])]
        return call_in(body if match[3] or not ends else ends[0])

    reasoning, content, found, interrupted = "", text, [], False
    if thinking:
        reasoning, end, content = text.partition("</think>")
        for match in call.finditer(reasoning) if tools else ():
            if calls_of(match, whole=not end):
                start, interrupted = match.start(), True
                reasoning, content = text[:start], text[start:]
                break
    if not tools:
        return reasoning, content, []
    kept, position, wrapped, strip = "", 0, False, False
    while position < len(content):
        if match := call.match(content, position):
            if calls := calls_of(match):
                found += calls
                wrapped, strip, position = wrapped or bool(match[1]), True, match.end()
                continue
        elif match := re.compile(r"\s*</tool_calls>").match(content, position):
            if wrapped:
                wrapped, strip, position = False, True, match.end()
                continue
            match = None
        elif interrupted and content.startswith("</think>", position):
            interrupted, position = False, position + len("</think>")
            continue
        end = match.end() if match else position + 1
        text = content[position:end]
        text = text.lstrip() if strip else text
        kept, strip, position = kept + text, strip and not text, end
    return reasoning, kept, found


fragments = [
    *("<think>", "</think>", "<tool_calls>", "</tool_calls>", "<tool_call>", "</tool_call>"),
    *(" ", "\n", "word", "<", "</tool", "<tool_call", "{", "[", "}", '"'),
    *(CALL, BEIJING, f"[{BEIJING}, {BEIJING}]", '{"name": 1}', '{"name": "f"}', "[]"),
    f"<tool_calls>\n{CALL}\n{CALL}\n</tool_calls>",
    '<tool_call>{"name": "f", "arguments": "{}"}</tool_call>',
    '<tool_call>{"name": "f", "arguments": {"tag": "<think></think>"}}</tool_call>',
]
texts = st.lists(st.sampled_from(fragments), max_size=14).map("".join)


@settings(max_examples=400)
@given(texts, st.booleans(), st.booleans(), st.lists(st.integers(0, 200), max_size=20))
def test_any_chunks_equal_the_reference(text, thinking, tools, cuts):
    """Guards tags cut anywhere, white space held at the wrong moment, and every rule."""
    expected = reference(text, thinking, tools)
    assert parsed(text, thinking=thinking, tools=tools) == expected
    assert parsed(*text, thinking=thinking, tools=tools) == expected
    ends = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    pushes = [text[start:end] for start, end in pairwise(ends)]
    assert parsed(*pushes, thinking=thinking, tools=tools) == expected


@given(texts, st.booleans())
def test_without_tools_nothing_but_tags_is_lost(text, thinking):
    """Guards against stripping: reasoning, its tag and content are the text."""
    reasoning, content, calls = parsed(text, thinking=thinking, tools=False)
    rest = re.sub(r"\A(\s*<think>)+", "", text)
    assert not calls
    assert rest in (reasoning + content, f"{reasoning}</think>{content}")


@pytest.mark.parametrize("end", ["</think>\n\n", "", "</think>"])
def test_the_models_calls(end):
    """The output that SGLang's page on Step3-VL-10B shows, with and without the end of its
    reasoning: guards calls inside the reasoning, and a wrapper left in either section."""
    text = f"I should call get_weather.\n{end}<tool_calls>\n{CALL}\n{CALL}\n</tool_calls>\n"
    reasoning, content, calls = parsed(*text, thinking=True)
    assert (reasoning.rstrip(), content) == ("I should call get_weather.", "")
    assert calls == [WEATHER, WEATHER]


@pytest.mark.parametrize(
    ("text", "thinking", "expected"),
    [
        ("why</think>\n\nbecause ", True, ("why", "\n\nbecause ", [])),
        ("\n<think>\n<think>\nwhy</think>so</think>", False, ("\nwhy", "so</think>", [])),
        ("why, then <think>", True, ("why, then <think>", "", [])),
        ("so <think>why</think>", False, ("", "so <think>why</think>", [])),
        (f"First:\n{CALL}\n\nDone.", False, ("", "First:Done.", [WEATHER])),
        (f"why {CALL}\n</think>\nso", True, ("why", "so", [WEATHER])),
        (f"why {CALL}</think>so</think>", True, ("why", "so</think>", [WEATHER])),
        ("</think><think>why", True, ("", "<think>why", [])),
        (f"{CALL}<think>why", False, ("", "<think>why", [WEATHER])),
        (f"<tool_call>{CALL}", False, ("", "<tool_call>", [WEATHER])),
        (f"<tool_call> {CALL}", False, ("", "<tool_call>", [WEATHER])),
        (f"<tool_calls>{CALL} and\n</tool_calls>\nso", False, ("", "andso", [WEATHER])),
        (f"<tool_calls>{CALL}<tool_calls></tool_calls>", False,
         ("", "<tool_calls></tool_calls>", [WEATHER])),
        (CALL.replace("Beijing", "<think>"), False,
         ("", "", [ToolCall("get_weather", '{"location": "<think>"}')])),
        # Prose about the tags, and a template of a call, do not end the reasoning.
        (f"a <tool_call></tool_call></think>{CALL}", True,
         ("a <tool_call></tool_call>", "", [WEATHER])),
        (f"<tool_calls> then <tool_call> {{...}}</tool_call></think>{CALL}", True,
         ("<tool_calls> then <tool_call> {...}</tool_call>", "", [WEATHER])),
        ('x <tool_call>{"name": </think>y', True, ('x <tool_call>{"name": ', "y", [])),
        # Cut short by the limit of tokens: a call that is complete is one.
        (f"x\n{CALL[:-20]}", False, ("", f"x\n{CALL[:-20]}", [])),
        (f"x\n{CALL[:-3]}", False, ("", "x", [WEATHER])),
        (f"x\n<tool_calls>\n{CALL}\n", False, ("", "x", [WEATHER])),
        ("x\n<tool_calls>\n", False, ("", "x\n<tool_calls>\n", [])),
    ],
)  # fmt: skip
def test_examples(text, thinking, expected):
    """What the docstring of Sections says."""
    assert parsed(*text, thinking=thinking) == parsed(text, thinking=thinking) == expected


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ('{"name": "f", "arguments": {"x": [1.5, "\u20ac"]}}', ['{"x": [1.5, "\u20ac"]}']),
        ('{"name": "f", "arguments": "{\\"x\\": 1}"}', ['{"x": 1}']),
        ('{"name": "f", "id": 7, "arguments": {}}', ["{}"]),
        ('{"name": "f"}', ["{}"]),
        ('[{"name": "f"}, {"name": "f", "arguments": {"x": 1}}]', ["{}", '{"x": 1}']),
        ('{"name": "f", "parameters": {"x": 1}}', []),  # it would lose them
        ('{"name": "f", "arguments": "x = 1"}', []),
        ('{"name": "f", "arguments": [1]}', []),
        ('{"name": "f", "arguments": {"x": NaN}}', []),
        ('{"name": "f", "arguments": "{\\"x\\": NaN}"}', []),
        ('{"name": "f", "arguments": {"x": "\\ud800"}}', []),
        ('{"name": ["f"], "arguments": {}}', []),
        ('{"name": "", "arguments": {}}', []),
        ('[{"name": "f"}, {"name": 1}]', []),
        ('{"name": "f"} {"name": "f"}', []),
        ("[" * 100_000, []),
        ("[]", []),
    ],
)  # fmt: skip
def test_calls_are_checked(text, arguments):
    """Guards clients against arguments that are not the JSON text of an object."""
    assert parse_calls(text) == [ToolCall("f", json_text) for json_text in arguments]
    tags = f"<tool_call>{text}</tool_call>"
    assert parsed(tags)[1] == ("" if arguments else tags)


def test_only_tags_are_held_back():
    """Guards the latency of a stream: text that cannot belong to a tag is passed on at once."""
    sections = Sections(thinking=True, tools=True)
    assert sections.push("a < b") == [Reasoning("a < b")]
    assert sections.push(" </th") == []
    assert sections.push("e") == [Reasoning(" </the")]
    assert sections.push("</think>") == []
    assert sections.push("x<tool_call>yes") == [Content("x"), Content("<tool_call>yes")]
    plain = Sections(thinking=False, tools=False)
    assert plain.push("a") + plain.push("<") + plain.push("\n") == [Content(c) for c in "a<\n"]


@pytest.mark.parametrize("unit", ["x", " ", "<tool_call>", "<tool_call>{", "<tool_calls> "])
@pytest.mark.parametrize("beginning", ["", '<tool_call>{"name": "'])
def test_time_is_linear(unit, beginning):
    """Guards against searching what is held back once more for every push."""

    def seconds(size):
        text = beginning + unit * (size // len(unit))
        sections = Sections(thinking=True, tools=True)
        start = time.process_time()
        pieces = [piece for character in text for piece in sections.push(character)]
        pieces += sections.finish()
        elapsed = time.process_time() - start
        assert "".join(piece.text for piece in pieces) == text
        return elapsed

    # 2 ** 7 times as long; if it grew as the square, 2 ** 14. The bound is the geometric mean, so
    # that what else the CPU does may slow either of them tenfold.
    assert seconds(2**18) < 2**10.5 * min(seconds(2**11) for _ in range(3))
