"""The front: clients see what one server answers, whatever replica does it, and when one ends."""

import json
import logging
import signal
import time

import pytest
from openai import APIError, OpenAI
from openai.types.responses import ResponseErrorEvent
from prometheus_client.parser import text_string_to_metric_families

from pacore_sched.replicas.serve import front as front_module
from pacore_sched.replicas.serve.merged_metrics import merged
from pacore_sched.serve.limits import Limits
from pacore_sched.serve.page.files import FILES
from tests.pacore_sched.replicas.serve.fake_replicas import running_front
from tests.pacore_sched.serve.serving import (
    HI,
    Reply,
    answering,
    client,
    endless,
    running,
    scripted,
    wait_for,
)


def two(script=answering, **options) -> dict:
    return {name: scripted(script, **options) for name in ("a", "b")}


def comparable(reply: Reply) -> tuple:
    """A reply without its ids and times."""
    text = reply.body.decode()
    for name in ("id", "created", "item_id", "created_at", "completed_at"):
        while (start := text.find(f'"{name}":')) >= 0:
            end = min(i for i in (text.find(",", start), text.find("}", start)) if i >= 0)
            text = text[:start] + text[end:]
    names = ("content-type", "retry-after", "www-authenticate", "cache-control")
    return reply.status, {name: reply.headers.get(name) for name in names}, text


REQUESTS = [
    ("/v1/chat/completions", {"model": "scripted", "messages": HI, "seed": 1}),
    ("/v1/chat/completions", {"model": "scripted", "messages": HI, "seed": 1, "stream": True}),
    ("/v1/chat/completions", {"model": "scripted", "messages": HI, "seed": 1, "stream": True,
                              "pacore": {"widths": [3], "events": True}}),
    ("/v1/completions", {"model": "scripted", "prompt": ["x", "y"], "seed": 1}),
    ("/v1/responses", {"model": "scripted", "input": "Hi", "seed": 1}),
    ("/v1/responses", {"model": "scripted", "input": "Hi", "seed": 1, "stream": True}),
    ("/v1/responses", {"model": "scripted", "input": "Hi", "store": True}),
    ("/v1/chat/completions", {"model": "other", "messages": HI}),
    ("/v1/chat/completions", {"model": "scripted", "messages": HI, "wrong": 1}),
    ("/v1/chat/completions", b'{"model'),
    ("/tokenize", {"model": "scripted", "prompt": "x"}),
    ("/nowhere", {}),
]  # fmt: skip


def test_same_as_one_server():
    """Every kind of response, of routes and of errors, byte for byte but ids and times."""
    with running(scripted(answering)) as one, running_front(two()) as front:
        for path, body in REQUESTS:
            expected, got = one.post(path, body), front.post(path, body)
            assert comparable(got) == comparable(expected)
        assert comparable(front.get("/v1/chat/completions")) == comparable(
            one.get("/v1/chat/completions")
        )
        models = front.get("/v1/models").json["data"]
        assert [model["id"] for model in models] == ["scripted", "scripted:pacore-16"]
        assert front.post("/tokenize", {"model": "scripted", "prompt": "x"}, X_Request_ID="mine")
        assert front.get("/version", X_Request_ID="mine").headers["x-request-id"] == "mine"
        assert len(front.get("/version").headers["x-request-id"].split(",")) == 1


def test_log(caplog: pytest.LogCaptureFixture):
    """One line per request, with what only the replica knows."""
    caplog.set_level(logging.INFO, "pacore_sched.serve")
    with running_front(two()) as front:
        for stream in (False, True):
            front.chat(stream=stream)
        front.chat(wrong=1)
    chats = [line for line in caplog.records if getattr(line, "path", "").startswith("/v1/chat")]
    assert [line.status for line in chats] == [200, 200, 400]
    assert [line.replica for line in chats] == ["a"] * 3
    assert [line.usage.completion > 0 for line in chats[:2]] == [True, True]
    assert "wrong" in chats[2].error


def test_keys_and_size():
    """Refused before a replica is asked."""
    services = two(limits=Limits(max_body_bytes=1000))
    with running_front(services, keys=("KEY",)) as front:
        assert front.chat().status == 401
        body = {"model": "scripted", "messages": HI}
        assert front.post("/v1/chat/completions", body, Authorization="Bearer KEY").status == 200
        asked = len(front.replicas.asked)
        long = {"model": "scripted", "messages": [{"role": "user", "content": "x" * 2000}]}
        reply = front.post("/v1/chat/completions", long, Authorization="Bearer KEY")
        assert reply.status == 413 and "1,000 bytes" in reply.json["error"]["message"]
        assert len(front.replicas.asked) == asked


def test_affinity():
    """A conversation stays where it began; another one goes to the idle replica."""
    with running_front(two()) as front:
        for text in ("first " * 50, "second " * 50):
            front.chat(text)
        first, second = front.replicas.asked
        assert first == second  # nothing runs at the same time
        front.replicas.services["a"].engine.executor.step = lambda: time.sleep(0.01)
        with client(front, messages=HI, max_tokens=500, ignore_eos=True):
            wait_for(lambda: front.front.affinity.load, "a request that runs")
            (busy,) = front.front.affinity.load
            front.chat("another conversation " * 50)
            assert front.replicas.asked[-1] != busy
            front.chat("first " * 50)
            assert front.replicas.asked[-1] == first == busy
            front.post("/v1/responses", {"model": "scripted", "input": "first " * 50})
            assert front.replicas.asked[-1] == first


def test_client_that_leaves():
    services = two(endless)
    with running_front(services) as front:
        for stream in (False, True):
            with client(front, stream=stream, max_tokens=4000):
                wait_for(lambda: any(s.jobs for s in services.values()), "a job")
            wait_for(lambda: not any(s.jobs for s in services.values()), "no job")
            wait_for(lambda: not front.front.affinity.load, "no load")
        front.replicas.services = {
            name: service for name, service in services.items() if hasattr(service, "thread")
        }
        front.wait_idle()


def test_full_queues():
    """429 only when every replica has refused."""
    services = two(endless, limits=Limits(max_waiting=1), max_running=1)
    with running_front(services) as front:
        for service in services.values():
            service.engine.executor.step = lambda: time.sleep(0.01)

        def asking(text: str):
            messages = [{"role": "user", "content": text}]
            return client(front, messages=messages, max_tokens=4000, ignore_eos=True)

        with asking("1"), asking("2"):
            wait_for(lambda: all(len(s.jobs) == 1 for s in services.values()), "both run")
            wait_for(lambda: not any(s.waiting for s in services.values()), "both run")
            with asking("3"), asking("4"):
                wait_for(lambda: all(s.waiting == 1 for s in services.values()), "both are full")
                front.replicas.asked.clear()
                reply = front.chat(max_tokens=1)
                assert reply.status == 429 and int(reply.headers["retry-after"]) >= 1
                assert sorted(front.replicas.asked) == ["a", "b"]


def test_lost_replica():
    """Before it has answered, another replica answers; in a stream, an error frame; and a request
    that ends two replicas does not get a third."""
    services = {name: scripted(answering) for name in "abc"}
    with running_front(services) as front:
        front.replicas.lost = {"a"}
        assert front.chat().status == 200
        assert front.replicas.asked == ["a", "b"]
        front.replicas.lost = {"a", "b", "c"}
        reply = front.chat()
        assert reply.status == 503 and reply.headers["retry-after"]
        assert len(front.replicas.asked) == 4
        front.replicas.messages_before_loss = 1
        frames = front.chat(stream=True).body.decode().split("\n\n")
        assert "the replica" in json.loads(frames[-3].removeprefix("data: "))["error"]["message"]
        assert frames[-2] == "data: [DONE]"
        client = OpenAI(base_url=f"{front.url}/v1", api_key="none", max_retries=0)
        with pytest.raises(APIError, match="the replica of this request ended"):
            [*client.responses.create(model="scripted", input="Hi", stream=True)]
        body = {"model": "scripted", "input": "Hi", "stream": True}
        front.replicas.messages_before_loss = 4
        *sent, frame, _ = front.post("/v1/responses", body).body.decode().split("\n\n")
        name, data = frame.split("\ndata: ")
        event = ResponseErrorEvent.model_validate_json(data)
        assert (name, event.sequence_number) == ("event: error", len(sent)) == (name, 3)
        assert not front.front.affinity.load
        assert front.get("/metrics").status == 200
        front.replicas.services = {}
        assert front.chat().status == 503
        health = front.get("/health")
        assert health.status == 503 and health.json == {"status": "failed", "replicas": 0}


def test_drain():
    """The first signal refuses new requests; after the time for draining, those that run fail."""
    services = two(endless)
    with running_front(services, drain_s=0.5) as front:
        for service in services.values():
            service.engine.executor.step = lambda: time.sleep(0.01)
        with (
            client(front, max_tokens=4000, ignore_eos=True) as whole,
            client(front, max_tokens=4000, ignore_eos=True, stream=True) as stream,
        ):
            wait_for(lambda: sum(len(s.jobs) for s in services.values()) == 2, "both run")
            front.server.handle_exit(signal.SIGTERM, None)
            wait_for(lambda: front.front.draining, "a drain")
            refused = front.chat()
            assert refused.status == 503 and refused.headers["retry-after"] == "5"
            assert front.get("/health").json["status"] == "draining"
            assert whole.getresponse().status == 503
            text = stream.getresponse().read().decode()
            assert "shutting down" in text and text.endswith("data: [DONE]\n\n")
        wait_for(lambda: not any(s.jobs for s in services.values()), "no job")


def test_page(monkeypatch: pytest.MonkeyPatch):
    """Every replica's status, by its name; the page itself even without replicas."""
    services = two()
    with running_front(services, keys=("KEY",)) as front:
        status = front.get("/status").json
        assert (status["state"], status["replicas_left_out"]) == ("ok", 0)
        assert sorted(status["replicas"]) == ["a", "b"]
        for one in status["replicas"].values():
            assert (one["model"], one["state"], one["engine"]["running"]) == ("scripted", "ok", 0)
        front.replicas.lost = {"a"}
        status = front.get("/status").json
        assert [*status["replicas"]] == ["b"] and status["replicas_left_out"] == 1
        front.replicas.lost = set()
        answer = front_module.Front._answer_of

        async def refusing(self: front_module.Front, name: str, path: str) -> str | None:
            found = await answer(self, name, path)
            return '{"error": {"message": "the server is shutting down"}}' if name == "b" else found

        with monkeypatch.context() as patch:
            patch.setattr(front_module.Front, "_answer_of", refusing)
            status = front.get("/status").json
            assert [*status["replicas"]] == ["a"] and status["replicas_left_out"] == 1
        monkeypatch.setattr(front_module, "MAX_SHOWN", 1)
        status = front.get("/status").json
        assert [*status["replicas"]] == ["a"] and status["replicas_left_out"] == 1
        front.replicas.services = {}
        assert front.get("/status").json == {
            "state": "failed",
            "replicas": {},
            "replicas_left_out": 0,
        }
        for path in FILES:
            assert front.get(path).status == 200


def samples(text: str) -> dict:
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics():
    """All series of every replica, with its name, and each family once."""
    services = two()
    with running_front(services) as front:
        front.chat()
        text = front.get("/metrics").body.decode()
        got = samples(text)
        for name, service in services.items():
            for (series, *labels), value in samples(service.metrics.text().decode()).items():
                if not series.endswith("_created"):
                    assert got[series, *sorted([*labels, ("replica", name)])] == value
        assert text.count("# TYPE pacore:engine_steps_total counter") == 1
        steps = [got[key] for key in got if key[0] == "pacore:engine_steps_total"]
        assert len(steps) == 2 and sum(steps) > 0
        front.replicas.lost = {"a"}
        assert b'replica="b"' in front.get("/metrics").body
        assert b'replica="a"' not in front.get("/metrics").body
    assert merged({}).strip() == b""
