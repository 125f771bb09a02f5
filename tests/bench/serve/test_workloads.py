"""Workloads: equal seeds, lengths, times of arrival."""

import base64
import io
import json
import random
from dataclasses import replace
from itertools import pairwise
from statistics import fmean, pstdev

import pytest
from PIL import Image

from bench.serve.workloads import mix
from bench.serve.workloads.images import resolution
from bench.serve.workloads.prompts import WORDS, Prompts
from bench.serve.workloads.requests import (
    COMPLETIONS,
    FIRST,
    LATER,
    Bodies,
    Lengths,
    arrivals,
    one_text,
    prefix_repetition,
    random_requests,
    trace_requests,
)
from model.config import TINY
from model.errors import InputError
from model.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.byte_level(TINY)
PROMPTS = Prompts({word: len(TOKENIZER.encode(f" {word}")) for word in WORDS})
BODIES = Bodies("openai-chat", "m", PROMPTS, seed=3)


def text(body: dict) -> str:
    return body["messages"][0]["content"]


@pytest.mark.parametrize("tokens", [2, 3, 17, 500])
def test_lengths_of_prompts(tokens: int):
    """Prompts of another length than asked for: words are counted without their spaces."""
    found = len(TOKENIZER.encode(" " + PROMPTS.text(random.Random(0), tokens)))
    assert tokens - 2 < found <= tokens


def test_no_prompt_is_empty():
    assert PROMPTS.text(random.Random(0), 1) in WORDS


def test_equal_seeds_equal_bodies():
    """Bodies that depend on the hash of a text, on the others or on the order in which they are
    made."""
    lengths = Lengths(60, 20, 0.5)
    one = random_requests(BODIES, range(20), lengths, images=1, size=(32, 24))
    two = random_requests(BODIES, range(20), lengths, images=1, size=(32, 24))
    assert one == two
    assert random_requests(BODIES, [7], lengths, images=1, size=(32, 24)) == [one[7]]
    assert len({json.dumps(request.body) for request in one}) == 20
    other = random_requests(replace(BODIES, seed=4), range(20), lengths, images=1, size=(32, 24))
    for a, b in zip(one, other, strict=True):
        assert a.body["messages"] != b.body["messages"]


def test_range_ratio():
    """Lengths that are not spread over [1 - R, 1 + R]."""
    drawn = [Lengths(100, 10, 0.3).draw(random.Random(n)) for n in range(2000)]
    for values, mean in zip(zip(*drawn, strict=True), (100, 10), strict=True):
        assert (min(values), max(values)) == (round(0.7 * mean), round(1.3 * mean))
        assert fmean(values) == pytest.approx(mean, rel=0.02)
    assert Lengths(100, 10).draw(random.Random(0)) == (100, 10)
    whole = [Lengths(4, 64, 1.0).draw(random.Random(n))[0] for n in range(500)]
    assert set(whole) == {*range(1, 9)}  # as SGLang's ratio of 0 with twice the length


def test_body():
    """Fields that no server knows, or that are missing for one endpoint; an `extra` that does not
    win."""
    lengths = Lengths(30, 9)
    [chat] = random_requests(BODIES, [5], lengths, widths=[4, 2])
    assert not chat.has_one_text
    assert chat.body.pop("messages")[0]["role"] == "user"
    assert chat.body == {
        "model": "m",
        "max_tokens": 9,
        "seed": 8,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
        "pacore": {"widths": [4, 2]},
    }
    plain = replace(
        BODIES, backend=COMPLETIONS, stream=False, ignore_eos=False, extra={"seed": 1, "top_k": 2}
    )
    [completion] = random_requests(plain, [5], lengths)
    assert completion.body.pop("prompt")
    assert completion.body == {"model": "m", "max_tokens": 9, "seed": 1, "top_k": 2}
    assert completion.has_one_text and not one_text({"n": 3})
    assert not one_text({"model": "m:pacore-4"})


def test_images():
    """Images of another size, all the same, or after the text."""
    [request] = random_requests(BODIES, [0], Lengths(20, 5), images=2, size=(64, 48))
    *images, last = request.body["messages"][0]["content"]
    assert last["type"] == "text"
    urls = [image["image_url"]["url"] for image in images]
    assert len(set(urls)) == 2
    for url in urls:
        data = base64.b64decode(url.removeprefix("data:image/jpeg;base64,"))
        assert Image.open(io.BytesIO(data)).size == (64, 48)


def test_resolution():
    assert resolution("720p") == (1280, 720)
    assert resolution("4k") == (3840, 2160)
    assert resolution("300x20") == (300, 20)


def test_prefix_repetition():
    """Prefixes that are not shared, or suffixes that are; a first request of a prefix that counts
    as a later one."""
    requests = prefix_repetition(BODIES, range(7), 80, 40, 3, 5)
    texts = [text(request.body) for request in requests]
    assert [request.group for request in requests] == [FIRST] * 3 + [LATER] * 4
    assert len(set(texts)) == 7
    for a in range(7):
        for b in range(a):
            common = 0
            while texts[a][common] == texts[b][common]:
                common += 1
            assert (common >= 75) == (a % 3 == b % 3)
            assert common < 110


def test_arrivals():
    """Times that are not those of a gamma process of shape B: the gaps' coefficient of variation
    is 1 / sqrt(B)."""
    assert arrivals(3, None, 1.0, 0) == [0.0] * 3
    for burstiness in (0.25, 1.0, 4.0):
        times = arrivals(20_000, 5.0, burstiness, 1)
        assert times == arrivals(20_000, 5.0, burstiness, 1)
        gaps = [b - a for a, b in pairwise([0.0, *times])]
        assert fmean(gaps) == pytest.approx(0.2, rel=0.05)
        assert pstdev(gaps) / fmean(gaps) == pytest.approx(burstiness**-0.5, rel=0.05)


def test_trace(tmp_path):
    """Times that are not the trace's; blocks with equal ids that differ, or the reverse."""
    path = tmp_path / "trace.jsonl"
    lines = [
        {"timestamp": 5000, "input_length": 700, "output_length": 3, "hash_ids": [1, 2]},
        {"timestamp": 6000, "input_length": 600, "output_length": 4, "hash_ids": [1, 3]},
        {"timestamp": 9000, "input_length": 20, "output_length": 5, "hash_ids": [4]},
    ]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    requests = trace_requests(BODIES, path, None, None)
    assert [request.arrival_s for request in requests] == [0.0, 1.0, 4.0]
    assert [request.body["max_tokens"] for request in requests] == [3, 4, 5]
    first, second, third = (text(request.body) for request in requests)
    assert first[:500] == second[:500]
    assert first[:600] != second[:600]
    for found, line in zip((first, second, third), lines, strict=True):
        assert len(TOKENIZER.encode(found)) == pytest.approx(line["input_length"], abs=4)
    scaled = trace_requests(BODIES, path, 2, 0.5)
    assert [request.arrival_s for request in scaled] == [0.0, 2.0]
    with pytest.raises(InputError, match="all requests arrive at once"):
        trace_requests(BODIES, path, 1, 0.5)


def test_mix():
    """A soak without the requests that misbehave, or two requests with the same answer."""
    kinds = mix.kinds(1000, 0)
    assert {name: kinds.count(name) for name in mix.SHARES} == {
        name: 10 * share for name, share in mix.SHARES.items()
    }
    assert kinds == mix.kinds(1000, 0) != mix.kinds(1000, 1)
    bodies = [json.dumps(mix.body(n, kind, "m")) for n, kind in enumerate(kinds)]
    assert len(set(bodies)) == 1000
