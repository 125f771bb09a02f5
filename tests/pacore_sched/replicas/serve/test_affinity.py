"""Which replica a request goes to: the prompt's keys, and the choice."""

import json

from hypothesis import given
from hypothesis import strategies as st

from pacore_sched.replicas.serve.affinity import RATIO, SLACK, Affinity
from pacore_sched.replicas.serve.prompt_keys import CHUNK, MAX_KEYS, PromptKeys, prompt_keys

SYSTEM = {"role": "system", "content": "You are helpful. " * 200}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 5000}}


def keys(**body: object) -> PromptKeys:
    return prompt_keys(json.dumps(body).encode())


def chat(*contents: object) -> PromptKeys:
    messages = [SYSTEM, *({"role": "user", "content": content} for content in contents)]
    return keys(model="m", messages=messages)


def common(a: PromptKeys, b: PromptKeys) -> int:
    """Characters of the longest common prefix."""
    sizes = [size for key, size in zip(a.keys, a.sizes, strict=True) if key in b.keys]
    return max(sizes, default=0)


def test_prefixes():
    """Later turns, the same image with another question, and the same beginning of a long text."""
    first, later = chat("question"), chat("question", "and then?")
    assert common(first, later) == first.sizes[-1] < later.sizes[-1]
    ask = [chat([IMAGE, {"type": "text", "text": text}]) for text in ("what?", "why?")]
    assert 5000 < common(*ask) < ask[0].sizes[-1]
    assert common(first, keys(model="m", messages=[{**SYSTEM, "role": "user"}])) == 0
    short = [keys(messages=[{"role": "user", "content": text}]) for text in ("Hi", "No", "")]
    assert common(*short[:2]) == 0 and len(short[2].keys) == 1
    long = [keys(model="m", prompt="x" * (3 * CHUNK) + end) for end in "ab"]
    assert common(*long) > 3 * CHUNK and long[0].keys[-1] != long[1].keys[-1]
    ids = [keys(model="m", prompt=[*range(CHUNK), end]) for end in (1, 2)]
    assert common(*ids) and len(ids[0].keys) == 2
    assert keys(messages=[SYSTEM], tools=[{"type": "function"}]).keys[0] != first.keys[0]
    assert len(keys(prompt="x" * (2 * MAX_KEYS * CHUNK)).keys) == MAX_KEYS


def test_prefixes_of_responses():
    """Items, whose later turns begin with the earlier ones, with the instructions and the tools
    before them; a text is a message of the user's."""
    options = {"instructions": "You are helpful. " * 200, "tools": [{"type": "function"}]}
    asked = {"role": "user", "content": "question"}
    items = [asked, {"type": "function_call", "call_id": "a"}, {**asked, "content": "and then?"}]
    first, later = keys(input=[asked], **options), keys(input=items, **options)
    assert common(first, later) == first.sizes[-1] < later.sizes[-1]
    assert keys(input="question", **options) == first
    assert common(first, keys(input="question")) == 0
    other = {**options, "instructions": "You are not."}
    assert common(first, keys(input="question", **other)) == first.sizes[0]  # the tools
    image = [
        keys(input=[{"role": "user", "content": [IMAGE, {"type": "input_text", "text": text}]}])
        for text in ("what?", "why?")
    ]
    assert 5000 < common(*image) < image[0].sizes[-1]


def test_rollouts():
    for body, count in (
        ({}, 1),
        ({"n": 5}, 5),
        ({"n": None}, 1),
        ({"pacore": {}}, 16),
        ({"pacore": {"widths": [32, 4]}}, 32),
        ({"pacore": {"widths": []}}, 1),
        ({"model": "m:pacore-8-24"}, 24),
        ({"model": "llama3"}, 1),
    ):
        assert keys(messages=[SYSTEM], **body).rollouts == count, body


@given(st.binary() | st.recursive(
    st.none() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["messages", "prompt", "input", "instructions", "content", "model",
                         "pacore", "widths", "n"]), inner
    ),
).map(lambda value: json.dumps(value).encode()))  # fmt: skip
def test_any_body(body: bytes):
    """A wrong body must reach a replica, which says what is wrong with it."""
    found = prompt_keys(body)
    assert found.rollouts >= 1 and len(found.keys) == len(found.sizes)


def test_calls_of_tools():
    """Conversations that differ only in a call or its result, and count as one."""

    def conversation(arguments: str, output: str) -> PromptKeys:
        call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": arguments}
        result = {"type": "function_call_output", "call_id": "c", "output": output}
        return keys(model="m", input=[{"role": "user", "content": "Hi"}, call, result])

    one = conversation("{}", "1")
    assert [key in one.keys for key in conversation("{}", "2").keys] == [True, True, False]
    assert [key in one.keys for key in conversation("[]", "1").keys] == [True, False, False]


def prompt(*prefixes: int, rollouts: int = 1) -> PromptKeys:
    """A prompt of pieces of 100 characters."""
    paths = [json.dumps(prefixes[:end]).encode() for end in range(1, len(prefixes) + 1)]
    sizes = [100 * end for end in range(1, len(prefixes) + 1)]
    return PromptKeys(tuple(paths), tuple(sizes), rollouts)


def test_choice():
    affinity, names = Affinity(), ["a", "b", "c"]
    first = affinity.choose(prompt(1, 2), names)
    second = affinity.choose(prompt(3, 4), names)
    assert first != second
    assert affinity.choose(prompt(1, 2, 5), names) == first  # its replica is not the least loaded
    assert affinity.choose(prompt(1, *range(10, 30)), names) not in (
        first,
        second,
    )  # unlike by 95 %
    others = [name for name in names if name != first]
    assert affinity.choose(prompt(1, 2), others) in others  # it has ended


def test_longest_prefix():
    affinity = Affinity()
    short = affinity.choose(prompt(1), ["a"])
    long = affinity.choose(prompt(1, 2), ["b"])
    assert (short, long) == ("a", "b")
    affinity.load["b"] += 3
    assert affinity.choose(prompt(1, 2, 3), ["a", "b"]) == "b"
    assert affinity.choose(prompt(1, 4), ["a", "b"]) == "a"  # both have had it: the less loaded


def test_overload():
    """One prompt that all clients ask must not queue on one replica while others are idle."""
    affinity, names = Affinity(), ["a", "b"]
    for _ in range(100):
        affinity.choose(prompt(1, rollouts=16), names)
    assert min(affinity.load[name] for name in names) >= 0.3 * sum(affinity.load.values())


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(1, 40), st.booleans())))
def test_bounded_imbalance(requests: list[tuple[int, int, int, bool]]):
    """Whatever comes and ends, a request never goes to a replica past the bound; loads add up."""
    affinity, names, running = Affinity(max_prefixes=5), ["a", "b", "c"], []
    for first, second, rollouts, ends in requests:
        asked = prompt(first, second, rollouts=rollouts)
        before = {name: affinity.load[name] for name in names}
        chosen = affinity.choose(asked, names)
        assert before[chosen] <= SLACK + RATIO * min(before.values())
        running.append((chosen, asked))
        if ends:
            affinity.release(*running.pop(0))
    for name in names:
        assert affinity.load[name] == sum(p.rollouts for at, p in running if at == name)
    assert len(affinity._seen) <= 5
