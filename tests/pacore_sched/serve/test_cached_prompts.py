"""The prefix cache over HTTP: what `usage` and the metrics say of prompts that come again."""

from collections.abc import Iterator

import pytest

from model.kv_cache import PAGE_SIZE
from model.step3vl import Step3VL
from pacore_sched.answers.pacore import engine_for
from pacore_sched.serve.limits import Limits
from pacore_sched.serve.metrics import Metrics
from pacore_sched.serve.service import Service
from tests.pacore_sched.serve.serving import Running, running
from tests.pacore_sched.serve.test_metrics import samples
from tests.pacore_sched.serve.test_tiny import data_url, photo

LONG = "You are a careful assistant, and answer in one word. " * 8


@pytest.fixture
def server() -> Iterator[Running]:
    engine = engine_for(Step3VL.from_preset("tiny", seed=3), kv_tokens=20_000, max_running=16)
    with running(Service(engine.executor.model, engine, Limits(), Metrics("tiny")), "tiny") as made:
        yield made
        made.wait_idle()


def chat(server: Running, text: object, **fields: object) -> dict:
    messages = [{"role": "system", "content": LONG}, {"role": "user", "content": text}]
    body = {"model": "tiny", "messages": messages, "max_tokens": 4, "seed": 1, **fields}
    reply = server.post("/v1/chat/completions", body)
    assert reply.status == 200, reply.body
    return reply.json


def cached(reply: dict) -> int:
    return reply["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_usage(server: Running):
    """Tokens that are counted twice, or not; texts that change when their prompt is found."""
    first = chat(server, "One?")
    assert cached(first) == 0
    system = len(LONG) // PAGE_SIZE * PAGE_SIZE
    assert cached(chat(server, "Another?")) == system
    again = chat(server, "One?", n=3)
    assert system <= cached(again) < first["usage"]["prompt_tokens"]
    assert again["choices"][0]["message"] == first["choices"][0]["message"]
    assert cached(chat(server, "One?", cache_salt="mine")) == 0
    assert cached(chat(server, "One?", cache_salt="mine")) >= system
    values = samples(server.get("/metrics").body.decode())
    found = values["pacore:prompt_tokens_found_total"]
    assert found == system + cached(again) + first["usage"]["prompt_tokens"] - 1
    assert values["pacore:prompt_tokens_prefilled_total"] > 0


def test_pacore(server: Running):
    """What siblings and earlier rounds have written is counted once, next to what was found."""
    body = {"pacore": {"widths": [4]}}
    first, again = (chat(server, "One?", **body)["usage"] for _ in range(2))
    assert first["prompt_tokens"] == again["prompt_tokens"]
    more = again["prompt_tokens_details"]["cached_tokens"]
    more -= first["prompt_tokens_details"]["cached_tokens"]
    assert 2 * PAGE_SIZE < more < first["prompt_tokens"]
    assert again["prompt_tokens_details"]["cached_tokens"] <= again["prompt_tokens"] - 5


def test_images(server: Running):
    image = {"type": "image_url", "image_url": {"url": data_url(photo())}}
    parts = [image, {"type": "text", "text": "What is this?"}]
    first = chat(server, parts)
    again = chat(server, parts)
    assert cached(first) == 0 and cached(again) > 6 * PAGE_SIZE
    assert again["choices"] == first["choices"]


def test_status(server: Running):
    """Pages of prompts that have ended, which count as used or are not shown."""
    used = chat(server, "One?")["usage"]["prompt_tokens"]
    server.wait_idle()
    status = server.get("/status").json
    pages = -(-(used - 1) // PAGE_SIZE)
    kv = status["engine"]["kv"]
    assert (kv["prompts"], kv["rollouts"], kv["kept"]) == (0, 0, pages)
    assert kv["free"] == kv["total"] - pages
    (node,) = status["engine"]["nodes"]
    assert (node["state"], node["tokens"]) == ("kept", used - 1)


def test_completions(server: Running):
    """A prompt to be scored is computed in full: its log-probabilities would be missing."""

    def complete(**fields: object) -> dict:
        body = {"model": "tiny", "prompt": LONG, "max_tokens": 2, "seed": 1, **fields}
        return server.post("/v1/completions", body).json

    complete()
    assert cached(complete()) == len(LONG) - 1
    scored = complete(echo=True, logprobs=1)
    assert cached(scored) == 0
    logprobs = scored["choices"][0]["logprobs"]["token_logprobs"]
    assert len(logprobs) == len(LONG) + 2 and None not in logprobs[1:]


def test_bad_salt(server: Running):
    for salt in ("", 5, ["a"]):
        reply = server.post(
            "/v1/chat/completions",
            {"model": "tiny", "messages": [{"role": "user", "content": "?"}], "cache_salt": salt},
        )
        assert reply.status == 400 and reply.json["error"]["param"] == "cache_salt"
