"""What requests' times and tokens are, on responses written by hand."""

import json

import pytest

from bench.serve.connection.client import Exchange
from bench.serve.connection.timeline import Timeline, frames, timeline


def chunk(text: str | None = None, index: int = 0, **fields: object) -> bytes:
    """A frame of a stream; without a text, its first one, which has only the role."""
    delta = {"role": "assistant", "content": ""} if text is None else {"content": text}
    data = {"id": "c1", "choices": [{"index": index, "delta": delta}], **fields}
    return b"data: " + json.dumps(data).encode() + b"\n\n"


USAGE = {
    "prompt_tokens": 11,
    "completion_tokens": 7,
    "prompt_tokens_details": {"cached_tokens": 4},
}
LAST = b"data: " + json.dumps({"id": "c1", "choices": [], "usage": USAGE}).encode() + b"\n\n"
DONE = b"data: [DONE]\n\n"


def data(**fields: object) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def exchange(*reads: tuple[float, bytes], status: int = 200, error: str = "") -> Exchange:
    """A request that was due at 99 and sent at 100."""
    end = reads[-1][0] if reads else 100.5
    return Exchange(99.0, 100.0, end, status, "", list(reads), error)


def test_times_of_a_stream():
    """A TTFT up to the chunk with the role, a TPOT per chunk instead of per token, intervals that
    include the last chunk, which has no text."""
    found = timeline(
        exchange(
            (100.25, chunk()),
            (101.0, chunk("a")),
            (101.5, chunk("b")),
            (103.5, chunk("c")),
            (104.0, LAST + DONE),
        ),
        stream=True,
    )
    assert found.failure is None
    assert found.late_s == 1.0
    assert found.ttft_s == 1.0
    assert found.itl_s == [0.5, 2.0]
    assert found.end_s == 4.0
    assert found.tpot_s == (4.0 - 1.0) / (7 - 1)  # 7 tokens in 3 chunks
    assert (found.prompt, found.output, found.cached) == (11, 7, 4)
    assert found.texts == ("abc",)
    assert found.ids == ("c1",)


def test_reasoning_and_choices():
    """A first token that is missed because it is reasoning; choices mixed up."""
    thought = {"id": "c1", "choices": [{"index": 1, "delta": {"reasoning_content": "hm"}}]}
    reads = [
        (101.0, b"data: " + json.dumps(thought).encode() + b"\n\n"),
        (102.0, chunk("yes", 1) + chunk("no", 0)),
        (103.0, LAST + DONE),
    ]
    found = timeline(exchange(*reads), stream=True)
    assert found.ttft_s == 1.0
    assert found.texts == ("no", "hmyes")
    assert found.itl_s == [1.0, 0.0]


def test_frames_are_split_anywhere():
    """A chunk that is lost, or has the time of another, because a read ends within it."""
    text = b": comment\r\n\r\n" + chunk("a").replace(b"\n", b"\r\n") + b"event: x\n" + chunk("b")
    whole = [data for _, data in frames([(1.0, text)])]
    assert len(whole) == 2
    for cut in range(len(text)):
        parts = list(frames([(1.0, text[:cut]), (2.0, text[cut:])]))
        assert [data for _, data in parts] == whole
        assert parts[-1][0] == 2.0


def test_whole_answer():
    """An answer without a stream has no TTFT, rather than one that is its E2EL."""
    message = {"content": "yes", "reasoning_content": "hm"}
    body = {"id": "c1", "choices": [{"index": 0, "message": message}], "usage": USAGE}
    data = json.dumps(body).encode()
    found = timeline(exchange((101.0, data[:9]), (102.0, data[9:])), stream=False)
    assert found.failure is None
    assert found.texts == ("hmyes",)
    assert (found.ttft_s, found.tpot_s, found.itl_s, found.end_s) == (None, None, [], 2.0)


def test_text_of_a_completion():
    data = json.dumps({"id": "c", "choices": [{"index": 0, "text": "yes"}], "usage": USAGE})
    assert timeline(exchange((101.0, data.encode())), stream=False).texts == ("yes",)


ERROR = b'data: {"error": {"message": "the engine failed"}}\n\n'
REFUSED = b'{"error": {"message": "no such model"}}'


@pytest.mark.parametrize(
    ("found", "failure", "detail"),
    [
        (exchange((101.0, REFUSED), status=404), "status 404", "no such model"),
        (exchange((101.0, b'{"detail": "no"}'), status=404), "status 404", "no"),
        (exchange((101.0, b"<html>"), status=502), "status 502", "<html>"),
        (exchange(error="connection refused"), "connection refused", ""),
        (exchange((101.0, chunk("a") + LAST)), "stream cut short", ""),
        (exchange((101.0, chunk("a")[:-2] + b"\n")), "stream cut short", ""),
        (exchange((101.0, chunk("a") + ERROR + DONE)), "error in the stream", "the engine failed"),
        (exchange((101.0, b"data: {\n\n" + DONE)), "error in the stream", "a chunk is not JSON"),
        (exchange((101.0, chunk("a") + DONE)), "no usage in the answer", ""),
        (exchange((101.0, LAST + DONE)), "no choices in the answer", ""),
        (exchange((101.0, b'{"error": "no"}'), status=500), "status 500", "no"),
        (exchange((101.0, b"5"), status=500), "status 500", "5"),
        (exchange((101.0, data(error="no"))), "error in the stream", "no"),
        (exchange((101.0, data(error={"code": 5}))), "error in the stream", "{'code': 5}"),
        (
            exchange((101.0, data(choices=None, usage=USAGE) + DONE)),
            "no choices in the answer",
            "",
        ),
        (
            exchange((101.0, chunk("a") + data(usage=dict.fromkeys(USAGE)) + DONE)),
            "no usage in the answer",
            "",
        ),
    ],
)
def test_failures(found: Exchange, failure: str, detail: str):
    """A request that failed and counts as one that was fast."""
    read = timeline(found, stream=True)
    assert (read.failure, read.detail) == (failure, detail)


ODD = [
    5,
    [],
    None,
    {"choices": 5},
    {"choices": [5]},
    {"choices": [{"delta": "a"}]},
    {"choices": [{"delta": {"content": ["a"]}}]},
    {"choices": [{"index": "x", "delta": {"content": "a"}}]},
    {"choices": [], "usage": 5},
    {"choices": [], "usage": USAGE | {"prompt_tokens_details": 5}},
]


@pytest.mark.parametrize("odd", ODD, ids=str)
def test_odd_answers(odd: object):
    """A traceback that ends the run, of what another server sends."""
    text = json.dumps(odd).encode()
    found = timeline(exchange((101.0, b"data: " + text + b"\n\n" + LAST + DONE)), stream=True)
    assert found.failure == "error in the stream"
    assert found.detail.startswith("a chunk is not of OpenAI's form: ")
    found = timeline(exchange((101.0, text)), stream=False)
    assert found.failure and found.detail.startswith("the body is not of OpenAI's form: ")


def test_usage_of_texts_that_are_not_in_the_stream():
    """A time per token of a stream that has only some of the tokens."""
    reads = [(101.0, chunk("a")), (102.0, LAST + DONE)]
    assert timeline(exchange(*reads), stream=True).tpot_s is not None
    assert timeline(exchange(*reads), stream=True, shows_all=False).tpot_s is None


def test_one_token_has_no_tpot():
    """A division by zero, or a TPOT that is the whole time."""
    assert Timeline(0.0, 2.0, chunk_s=(1.0,), output=1).tpot_s is None
