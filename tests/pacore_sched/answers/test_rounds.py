"""The text of PaCoRe's rounds, compared byte by byte with the pipeline's specification."""

import copy
import os
import random
from pathlib import Path

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.errors import InputError
from pacore_sched.answers import rounds

# The released template's structure and variable names, with placeholder sentences.
RELEASED_STRUCTURE = """\
OPENING.

Original Problem:
{{ original_prompt }}

Reference Responses:
{% for response in ref_responses %}
Reference {{ loop.index }}:
{{ response }}
{% endfor %}

CLOSING.
"""

OPENING = (
    "Here is a problem, followed by answers that were written independently of each other."
    " Some of them may be wrong: check them, keep what holds, and work out an answer of your own."
)
CLOSING = "With the problem and these references in mind, write out your full solution."


def image(name):
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{name}"}}


def text(words):
    return {"type": "text", "text": words}


@pytest.mark.parametrize(
    "given_widths, parsed",
    [
        ("16", (16,)),
        ("32,4", (32, 4)),
        (" 32 , 4 ", (32, 4)),
        ("1", (1,)),
        ("", ()),
        ("  ", ()),
        ("65536", (2**16,)),
        ([16], (16,)),
        ((32, 4), (32, 4)),
        ([], ()),
    ],
)
def test_widths(given_widths, parsed):
    """A valid notation, from a command line or a JSON request, that is read as other widths."""
    assert rounds.parse_widths(given_widths) == parsed
    assert rounds.round_widths(rounds.parse_widths(given_widths)) == (*parsed, 1)


@pytest.mark.parametrize(
    "bad",
    ["0", "-4", "16,0", "4.0", "1e3", "four", "16,", ",", "16 4", "16;4", "65537", "9" * 5000]
    + [[0], [-1], [4.0], ["16"], [True], [None], [[16]], None, 16, b"16", {16: 4}],
)
def test_widths_that_are_not_positive_integers(bad):
    """An invalid width that is accepted as another width, or an error of several lines."""
    with pytest.raises(InputError, match="integers from 1 to 65536") as error:
        rounds.parse_widths(bad)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "reply, message",
    [
        ("thoughts\n</think>\n\nThe answer is 4.\n", "\n\nThe answer is 4.\n"),
        ("a</think>b</think>\nc", "\nc"),
        ("never closed", "never closed"),
        ("  kept as it is \n", "  kept as it is \n"),
        ("<think>open only", "<think>open only"),
        ("ends here</think>", ""),
        ("", ""),
    ],
)
def test_compact(reply, message):
    """A message cut at the first marker instead of the last, or without its newlines."""
    assert rounds.compact(reply) == message


def test_order_is_that_of_the_released_client():
    """Empty messages that are dropped before the shuffle: any sequence of steps but sort, shuffle,
    drop gives another order than the released client."""
    texts = ["dddd", "", "a", "ccc", "eeeee", "", "bb"]
    expected = sorted(texts, key=len)
    random.Random(42).shuffle(expected)
    expected = [message for message in expected if message]
    assert rounds.order_messages(texts) == expected
    assert rounds.order_messages(texts) == ["bb", "ccc", "a", "eeeee", "dddd"]
    assert rounds.order_messages(texts, seed=7) != expected


@settings(derandomize=True, deadline=None)
@given(st.lists(st.text("ab\n", max_size=3), max_size=20), st.integers(0, 5), st.data())
def test_order_depends_on_the_set_of_messages_alone(texts, seed, data):
    """A prompt that depends on the order of arrival or on earlier use of a generator."""
    ordered = rounds.order_messages(texts, seed)
    assert sorted(ordered) == sorted(message for message in texts if message)
    assert rounds.order_messages(data.draw(st.permutations(texts)), seed) == ordered


def test_prompt_byte_by_byte():
    """A changed blank line: the model was trained on exactly this whitespace."""
    prompt = rounds.synthesis_prompt("What is 2 + 2?", ["\n\nIt is 4.", "Four.\n"])
    assert prompt == (
        OPENING + "\n"
        "\n"
        "Original Problem:\n"
        "What is 2 + 2?\n"
        "\n"
        "Reference Responses:\n"
        "\n"
        "Reference 1:\n"
        "\n"
        "\n"
        "It is 4.\n"
        "\n"
        "Reference 2:\n"
        "Four.\n"
        "\n"
        "\n"
        "\n" + CLOSING
    )


def test_messages_are_shown_verbatim():
    """Text of the model or the user that is interpreted as template or escaped as HTML."""
    odd = "{{ 1 + 1 }} {% endfor %} <b>&\"' \r\n\ttab"
    prompt = rounds.synthesis_prompt(odd, [odd])
    assert prompt.count(odd) == 2


def test_template_of_the_released_structure(tmp_path):
    """Variable names or whitespace with which the released template does not work unchanged."""
    path = tmp_path / "released.jinja"
    path.write_text(RELEASED_STRUCTURE, encoding="utf-8")
    prompt = rounds.synthesis_prompt("P", ["\n\nA", "B"], rounds.load_template(path))
    assert prompt == (
        "OPENING.\n\nOriginal Problem:\nP\n\nReference Responses:\n"
        "\nReference 1:\n\n\nA\n\nReference 2:\nB\n\n\nCLOSING."
    )
    ours = rounds.synthesis_prompt("P", ["\n\nA", "B"])
    assert ours == prompt.replace("OPENING.", OPENING).replace("CLOSING.", CLOSING)


def test_template_may_use_what_jinja_offers(tmp_path):
    """jinja2's built-in functions that are rejected as unknown variables."""
    path = tmp_path / "own.jinja"
    path.write_text(
        "{{ original_prompt }}{% for i in range(ref_responses | length) %}"
        " [{{ ref_responses[i] }}]{% endfor %}"
    )
    assert rounds.synthesis_prompt("P", ["a", "b"], rounds.load_template(path)) == "P [a] [b]"


@pytest.mark.parametrize(
    "source, complaint",
    [
        ("{{ original_prompt }} {% for r in ref_responses %}", "line 1: Unexpected end"),
        ("a\n{{ original_prompt | nosuch }}{{ ref_responses }}", "line 2: No filter"),
        ("{{ original_prompt }}", "it must use original_prompt and ref_responses"),
        ("", r"variables \(none\); it must use"),
        ("{{ original_prompt }}{{ ref_responses }}{{ question }}", "question"),
        ("{{ original_prompt }}{{ ref_responses + 1 }}", "concatenate"),
        ("{{ original_prompt }}{{ ref_responses }}{% include 'x' %}", "loader"),
        (b"\xff\xfe{{ original_prompt }}{{ ref_responses }}", "not UTF-8"),
        (
            "{{ original_prompt }}{{ ref_responses }}"
            "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
            "unsafe",
        ),
        ("{{ original_prompt }}{{ ref_responses }}{{ 'a' * 10**10 }}", "more than 1 GiB"),
    ],
)
def test_invalid_templates(tmp_path, source, complaint):
    """An invalid template that is found only after the first round, or not named."""
    path = tmp_path / "mine.jinja"
    path.write_bytes(source if isinstance(source, bytes) else source.encode())
    with pytest.raises(InputError, match=complaint) as error:
        rounds.load_template(path)
    assert "mine.jinja" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("loop", "complaint"),
    [
        ("{{ 1 // (3 - loop.index) }}", "integer division or modulo by zero"),
        ("{% if loop.index == 3 %}{{ m() }}{% endif %}", "maximum recursion depth"),
        ("{{ 'a' * 10 ** (loop.index0 * 5) }}", "needs more than 1 GiB"),
    ],
)
def test_template_that_fails_later(tmp_path, loop, complaint):
    """A template that renders one message and fails on three, which ended the whole job."""
    path = tmp_path / "mine.jinja"
    path.write_text(
        "{% macro m() %}{{ m() }}{% endmacro %}"
        "{{ original_prompt }}{% for r in ref_responses %}{{ r }}" + loop + "{% endfor %}"
    )
    template = rounds.load_template(path)
    messages = [{"role": "user", "content": "Q"}]
    with pytest.raises(InputError, match=f"mine.jinja.*{complaint}"):
        rounds.round_messages(messages, ["a", "b", "c"], template=template)


def test_template_has_jinjas_defaults(tmp_path):
    """Options of chat templates, which change white space, or a sandbox without list methods."""
    source = (
        "{% set a = [] %}\n  {% for r in ref_responses %}\n  {{ a.append(r) or '' }}{% endfor %}\n"
        "{{ a | tojson }}{{ original_prompt | e }}\n\n"
    )
    path = tmp_path / "own.jinja"
    path.write_text(source)
    expected = jinja2.Environment().from_string(source)
    prompt = rounds.synthesis_prompt("P<", ["a'", "b"], rounds.load_template(path))
    assert prompt == expected.render(original_prompt="P<", ref_responses=["a'", "b"])


def test_template_that_is_not_a_file(tmp_path):
    """A traceback for a missing file or a directory."""
    with pytest.raises(InputError, match="nosuch.jinja: No such file"):
        rounds.load_template(tmp_path / "nosuch.jinja")
    with pytest.raises(InputError, match="directory"):
        rounds.load_template(tmp_path)
    os.mkfifo(tmp_path / "fifo")  # opening it would wait forever
    with pytest.raises(InputError, match="is a pipe, socket or device"):
        rounds.load_template(tmp_path / "fifo")


def test_default_template_is_found_from_anywhere(tmp_path, monkeypatch):
    """Looking up the packaged file in the working directory instead of next to the module."""
    monkeypatch.chdir(tmp_path)
    rounds._default_template.cache_clear()
    assert rounds.synthesis_prompt("P", ["m"]).startswith(OPENING)
    assert Path(rounds.__file__).with_name("synthesis.jinja").is_file()


def test_next_round_keeps_earlier_turns():
    """Earlier turns that change, or an earlier synthesis prompt embedded as the problem."""
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "First question"},
        {"role": "assistant", "content": "First answer"},
        {"role": "user", "content": "Second question", "name": "ann"},
    ]
    before = copy.deepcopy(messages)
    following = rounds.round_messages(messages, ["yes", "", "no"])
    references = rounds.order_messages(["yes", "", "no"])
    prompt = rounds.synthesis_prompt("Second question", references)
    assert sorted(references) == ["no", "yes"]
    assert following == [*before[:3], {"role": "user", "content": prompt, "name": "ann"}]
    assert messages == before


def test_next_round_keeps_what_follows_the_user():
    """Dropping a started answer that follows the last user message."""
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "Well,"}]
    following = rounds.round_messages(messages, ["r"])
    assert following[0]["content"] == rounds.synthesis_prompt("Q", ["r"])
    assert following[1:] == messages[1:]


def test_next_round_keeps_tool_turns():
    """A synthesis without the results of tools, or references in the place of one."""
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "Hm."},
        {"role": "tool", "tool_call_id": "1", "content": "R"},
    ]
    before = copy.deepcopy(messages)
    following = rounds.round_messages(messages, ["r"])
    assert following == [
        {"role": "user", "content": rounds.synthesis_prompt("Q", ["r"])},
        *before[1:],
    ]


def test_next_round_puts_images_first():
    """Images that are lost or turned into text, as in the released client, or that follow the text,
    where rounds could not share their KV."""
    content = [text("Compare"), image("one"), text("with"), image("two"), text("now.")]
    messages = [{"role": "user", "content": content}]
    (following,) = rounds.round_messages(messages, ["r"])
    prompt = rounds.synthesis_prompt("Compare\nwith\nnow.", ["r"])
    assert following["content"] == [image("one"), image("two"), text(prompt)]
    assert messages[0]["content"] == content


def test_next_round_of_text_parts_is_text():
    """A list of parts where plain text is enough."""
    messages = [{"role": "user", "content": [text("Q")]}]
    (following,) = rounds.round_messages(messages, ["r"])
    assert following["content"] == rounds.synthesis_prompt("Q", ["r"])


def test_next_round_takes_template_and_seed(tmp_path):
    """Ignoring the caller's template or seed."""
    path = tmp_path / "own.jinja"
    path.write_text("{{ original_prompt }}: {{ ref_responses | join('|') }}")
    references = [letter * size for size, letter in enumerate("abcdef", start=1)]
    messages = [{"role": "user", "content": "Q"}]
    (following,) = rounds.round_messages(
        messages, references, template=rounds.load_template(path), seed=7
    )
    assert following["content"] == "Q: " + "|".join(rounds.order_messages(references, 7))


@pytest.mark.parametrize("forgotten", ["original_prompt", "ref_responses"])
def test_template_that_forgets_a_variable(tmp_path, forgotten):
    """Rollouts that are paid for and not passed on, without a word."""
    text = "{{ original_prompt }} {{ ref_responses | join }}"
    (tmp_path / "t").write_text(text.replace(f"{{ {forgotten}", f"{{ '' if {forgotten}"))
    with pytest.warns(UserWarning, match="leaves out the problem or the responses"):
        rounds.load_template(tmp_path / "t")


@pytest.mark.parametrize("none", [[], ["", ""]])
def test_next_round_without_messages_asks_the_problem(none):
    """A synthesis prompt with an empty list of references, instead of the problem itself."""
    messages = [{"role": "user", "content": [text("Q"), image("one")]}]
    assert rounds.round_messages(messages, none) == messages


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{"role": "system", "content": "Q"}],
        [{"role": "user"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": ["Q"]}],
        [{"role": "user", "content": [{"type": "text"}]}],
    ],
)
def test_conversation_without_a_question(messages):
    """A traceback for a malformed conversation."""
    with pytest.raises(InputError, match="user message"):
        rounds.round_messages(messages, ["r"])
