"""`/status` and the files of the page: what clients get, whatever the engine does."""

import logging
import re
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from pacore_sched.serve.page import status
from pacore_sched.serve.page.files import FILES
from tests.pacore_sched.serve.serving import (
    answering,
    client,
    endless,
    running,
    scripted,
    slowly,
    wait_for,
)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch):
    """No answer is older than its request, unless a step is slow."""
    monkeypatch.setattr(status, "FRESH_S", 0)


def test_requests_are_counted(monkeypatch: pytest.MonkeyPatch):
    """Those that run and wait, and the state."""
    monkeypatch.setattr(status, "WAIT_S", 0.1)
    service, gate = scripted(endless), threading.Semaphore(0)
    with running(service) as server:
        idle = server.get("/status").json
        assert (idle["model"], idle["state"], idle["running"]) == ("scripted", "ok", 0)
        assert idle["max_waiting"] == service.limits.max_waiting
        with client(server, max_tokens=4000):
            wait_for(lambda: service.engine.stats.steps > 2, "steps")
            assert server.get("/status").json["engine"]["running"] == 1
            service.engine.executor.step = lambda: gate.acquire(timeout=20)
            with client(server, max_tokens=4000):
                wait_for(lambda: len(service.jobs) == 2, "a second request")
                busy = server.get("/status").json
                assert (busy["running"], busy["waiting"]) == (1, 1)
                assert [problem["number"] for problem in busy["engine"]["problems"]] == [1]
                server.server.handle_exit(signal.SIGTERM, None)
                wait_for(lambda: service.draining, "a drain")
                assert server.get("/status").json["state"] == "draining"
                gate.release(10_000)


def test_slow_step(monkeypatch: pytest.MonkeyPatch):
    """An answer that waits for the end of a step of minutes; a snapshot for each who asks."""
    monkeypatch.setattr(status, "WAIT_S", 0.1)
    taken = []
    take = status.take_snapshot
    monkeypatch.setattr(status, "take_snapshot", lambda *args: taken.append(1) or take(*args))
    service = scripted(endless)
    gate = threading.Semaphore(0)
    with running(service) as server:
        service.engine.executor.step = lambda: gate.acquire(timeout=20)
        with client(server, max_tokens=50):
            wait_for(lambda: service.thread.jobs, "a job")
            assert server.get("/status").json["engine"] is None  # in the first step
            gate.release()
            wait_for(lambda: taken, "the end of the step")
            first = server.get("/status").json
            assert first["engine"]["steps"] == 1
            with ThreadPoolExecutor(20) as threads:
                replies = list(threads.map(lambda _: server.get("/status").json, range(40)))
            assert {reply["engine"]["at"] for reply in replies} == {first["engine"]["at"]}
            assert max(reply["age_s"] for reply in replies) >= first["age_s"]
            assert len(taken) == 1
            gate.release(10_000)
        server.wait_idle()
        assert len(taken) == 2
        assert server.get("/status").json["engine"]["tokens"] == service.engine.stats.generated


def test_a_few_snapshots_a_second(monkeypatch: pytest.MonkeyPatch):
    """An engine that takes one for each of many pages."""
    monkeypatch.setattr(status, "FRESH_S", 1000)
    with running(scripted(answering)) as server:
        first = server.get("/status").json["engine"]["at"]
        server.chat()
        assert server.get("/status").json["engine"]["at"] == first


def test_error_in_a_snapshot(monkeypatch: pytest.MonkeyPatch):
    """A fault of the page that fails the engine."""

    def fail(*args: object) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr(status, "take_snapshot", fail)
    with running(scripted(answering)) as server:
        assert server.get("/status").json["engine"] is None
        assert server.chat().status == 200
        assert server.get("/health").json["engine_failures"] == 0


def test_failed_engine():
    """The page of a server whose engine has failed for good."""

    def fail() -> None:
        raise RuntimeError("planted")

    service = scripted(answering)
    with running(service) as server:
        service.engine.executor.step = fail
        assert [server.chat().status for _ in range(3)] == [500, 503, 503]
        failed = server.get("/status").json
        assert failed["state"] == "failed"
        assert failed["engine"]["running"] == failed["running"] == 0


def test_no_text_of_a_request():
    """A prompt, an answer or a client's id in the numbers that anybody may read."""
    service = scripted(lambda rollout: "</think>" + "hidden answer " * 300)
    with running(service) as server:
        slowly(server)
        secret = {"messages": [{"role": "user", "content": "hidden prompt"}], "user": "hidden"}
        with client(server, **secret, pacore={"widths": [2]}, max_tokens=4000):
            wait_for(lambda: service.engine.stats.generated > 60, "tokens")
            reply = server.get("/status", X_Request_ID="hidden")
            assert reply.json["engine"]["problems"] and b"hidden" not in reply.body


def test_open_and_not_logged(caplog: pytest.LogCaptureFixture):
    """A browser has no API key, as a scraper has none; and a page that is open asks every second,
    which would fill the log."""
    caplog.set_level(logging.INFO, "pacore_sched.serve")
    with running(scripted(answering), keys=("KEY",)) as server:
        assert server.get("/v1/models").status == 401
        for path in ("/status", *FILES):
            assert server.get(path).status == 200
        assert server.post("/status", {}).status == 405
    logged = [(line.path, line.status) for line in caplog.records if hasattr(line, "path")]
    assert [entry for entry in logged if entry[0] == "/status"] == [("/status", 405)]
    assert ("/", 200) in logged


@pytest.mark.parametrize("path", FILES)
def test_policy(path: str):
    """A page that runs or loads anything but its own files."""
    with running(scripted(answering)) as server:
        reply = server.get(path)
    policy = dict(
        part.split(" ", 1) for part in reply.headers["content-security-policy"].split("; ")
    )
    own = {"script-src", "style-src", "connect-src"}
    assert {name for name, value in policy.items() if value == "'self'"} == own
    assert policy.pop("img-src") == "data:"
    assert {value for name, value in policy.items() if name not in own} == {"'none'"}
    text = reply.body.decode()
    assert not re.search(r"\son\w+=|\sstyle=|innerHTML|insertAdjacent|document\.write|eval\(", text)
    assert set(re.findall(r"https?://[^\"'\s]+", text)) <= {"http://www.w3.org/2000/svg"}
