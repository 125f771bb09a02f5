"""A server that is left running: clients that leave, floods, failing steps, and its end."""

import http.client
import json
import threading
from contextlib import ExitStack
from urllib.parse import urlsplit

import pytest

from pacore_sched.serve.limits import Limits
from tests.pacore_sched.serve.serving import (
    answering,
    client,
    endless,
    request,
    running,
    scripted,
    slowly,
    wait_for,
)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves(stream: bool):
    """Rollouts that go on, and pages that stay, for an answer that no client reads."""
    with running(scripted(endless)) as server:
        slowly(server)
        engine = server.service.engine
        with client(server, n=4, stream=stream) as connection:
            if stream:
                connection.getresponse().read(1)
            wait_for(lambda: engine.stats.generated > 20, "tokens")
        server.wait_idle()
        assert engine.stats.generated < 4 * 4000
        assert "requests_cancelled_total" in server.get("/metrics").body.decode()


def test_pages_are_free_before_the_next_step():
    """A client that leaves frees its pages within a step."""
    with running(scripted(endless)) as server:
        engine, gate = server.service.engine, threading.Semaphore(0)
        with client(server) as connection:
            wait_for(lambda: engine.stats.steps > 2, "steps")
            engine.executor.step = lambda: gate.acquire(timeout=20)  # hold the engine in a step
            wait_for(lambda: engine.busy, "a step")
            assert connection.sock
        # The event loop sees the end of the connection while the engine is in its step.
        wait_for(lambda: not server.service.jobs, "the end of the job")
        gate.release()
        wait_for(
            lambda: engine.scheduler.tree.free_pages == engine.executor.num_pages, "free pages"
        )
        steps = engine.stats.steps
        gate.release(100)
        server.wait_idle()
        assert engine.stats.steps <= steps + 1


def test_too_many_wait():
    """A queue without a bound; a refusal that does not say when to come back."""
    limits = Limits(max_waiting=3)
    with running(scripted(endless, max_running=1, limits=limits)) as server, ExitStack() as clients:
        slowly(server)
        for count in range(4):
            clients.enter_context(client(server))
            wait_for(lambda: len(server.service.jobs) == count + 1, "a job")  # noqa: B023
            wait_for(lambda: server.service.waiting == count, "one that runs")  # noqa: B023
        refused = server.chat()
        assert refused.status == 429 and refused.json["error"]["code"] == "queue_full"
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert "pacore:requests_refused_total" in server.get("/metrics").body.decode()
        clients.close()
        server.wait_idle()
        assert server.service.waiting == 0


def test_a_failing_step():
    """A failed step that takes the server with it, or requests that were only waiting; a second
    failure that is hidden."""
    with running(scripted(answering)) as server:
        engine = server.service.engine
        executor, scheduler = engine.executor, engine.scheduler

        def fail() -> None:
            executor.step = lambda: None
            raise RuntimeError("the device is on fire")

        executor.step = fail
        failed = server.chat()
        assert engine.scheduler is not scheduler
        assert failed.status == 500
        assert "the device is on fire" in failed.json["error"]["message"]
        health = server.get("/health")
        assert health.status == 200
        assert health.json["engine_failures"] == 1 and "on fire" in health.json["last_error"]
        again = server.chat(seed=1)
        assert again.status == 200 and again.json["choices"][0]["message"]["content"]
        executor.step = fail
        assert server.chat().status == 503
        health = server.get("/health")
        assert health.status == 503 and health.json["status"] == "failed"
        refused = server.chat()
        assert refused.status == 503 and "on fire" in refused.json["error"]["message"]
        server.wait_idle()


def test_a_dead_engine(monkeypatch: pytest.MonkeyPatch):
    """A server that says that it is well, and lets requests wait for ever, when its engine cannot
    be reset, or when its thread has ended."""
    with running(scripted(answering)) as server:
        executor = server.service.engine.executor
        executor.step = lambda: 1 / 0
        monkeypatch.setattr(executor, "reset", lambda: [][0])
        assert server.chat().status == 500
        assert server.get("/health").json["status"] == "failed"
        assert server.chat().status == 503
    with running(scripted(answering)) as server:
        thread = server.service.thread
        thread.stop()
        thread.join()
        assert not thread.is_alive()
        assert server.get("/health").status == server.chat().status == 503


def test_a_failing_step_in_a_stream():
    """A stream that ends without an error, so that half an answer looks like a whole one."""
    with running(scripted(endless)) as server:
        executor = server.service.engine.executor
        with client(server, stream=True) as connection:
            response = connection.getresponse()
            response.read(200)
            executor.step = lambda: 1 / 0
            rest = response.read().decode()
        frames = [line for line in rest.split("\n\n") if line]
        assert "ZeroDivisionError" in frames[-2] and '"error"' in frames[-2]
        assert frames[-1] == "data: [DONE]"


def test_waiting_requests_survive_a_failure():
    """Those that have not started go on, on the engine that was reset."""
    with running(scripted(answering)) as server:
        service, gate = server.service, threading.Semaphore(0)
        executor = service.engine.executor

        def fail() -> None:
            gate.acquire(timeout=20)
            executor.step = lambda: None
            raise RuntimeError("once")

        executor.step = fail
        replies = {}

        def ask(number: int) -> None:
            replies[number] = server.chat(seed=number)

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
        threads[0].start()
        wait_for(lambda: service.engine.scheduler.groups, "a group")
        for thread in threads[1:]:
            thread.start()
        wait_for(lambda: len(service.jobs) == 4, "four jobs")
        gate.release()
        for thread in threads:
            thread.join()
        assert sorted(reply.status for reply in replies.values()) == [200, 200, 200, 500]
        server.wait_idle()


def test_timeout():
    """A request that holds its pages for ever."""
    with running(scripted(endless, limits=Limits(timeout_s=0.2))) as server:
        slowly(server)
        reply = server.chat()
        assert reply.status == 504 and "0.2 s" in reply.json["error"]["message"]
        server.wait_idle()


def test_body_limits():
    """A body that fills the memory, announced or not, and one that never ends."""
    limits = Limits(max_body_bytes=10_000, body_timeout_s=0.3)
    with running(scripted(answering, limits=limits)) as server:
        assert server.post("/v1/chat/completions", b"x" * 20_000).status == 413
        parts = urlsplit(server.url)
        connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=20)
        connection.request("POST", "/tokenize", iter([b"x" * 6000] * 3),
                           {"Content-Type": "application/json"}, encode_chunked=True)  # fmt: skip
        response = connection.getresponse()
        assert (response.status, response.headers["Content-Type"]) == (413, "application/json")
        assert json.loads(response.read())["error"]["type"] == "invalid_request_error"
        connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=20)
        connection.putrequest("POST", "/tokenize")
        connection.putheader("Content-Length", "100")
        connection.endheaders(b"{")
        assert connection.getresponse().status == 408


def test_api_keys():
    """A path that is open; a key that is compared by its beginning; a key in an error."""
    with running(scripted(answering), keys=("secret-1", "secret-2")) as server:
        for key in (None, "secret-", "secret-11", "", "SECRET-1"):
            headers = {} if key is None else {"Authorization": f"Bearer {key}"}
            for path in ("/v1/models", "/nothing"):
                reply = server.get(path, **headers)
                assert reply.status == 401, (key, path)
                assert reply.json["error"]["code"] == "invalid_api_key"
            assert server.post("/tokenize", {"prompt": "a"}, **headers).status == 401
        assert server.get("/v1/models", Authorization="Basic secret-1").status == 401
        for key in ("secret-1", "secret-2"):
            assert server.get("/v1/models", Authorization=f"Bearer {key}").status == 200
        for path in ("/health", "/version", "/metrics", "/openapi.json"):
            assert server.get(path).status == 200


def test_request_ids():
    """An id that is lost, or one that puts a second line into a log."""
    with running(scripted(answering)) as server:
        assert server.get("/health", X_Request_ID="abc-1").headers["x-request-id"] == "abc-1"
        made = [server.get("/health", X_Request_ID="a b").headers["x-request-id"] for _ in "ab"]
        assert made[0].startswith("req-") and made[0] != made[1]


def test_drain():
    """SIGTERM: new requests are refused, running ones get their time, and then an error."""
    with running(scripted(endless), drain_s=0.5) as server:
        slowly(server)
        replies = []
        thread = threading.Thread(target=lambda: replies.append(server.chat()))
        thread.start()
        wait_for(lambda: server.service.engine.stats.generated, "a token")
        server.server.handle_exit(15, None)
        wait_for(lambda: server.get("/health").status == 503, "draining")
        assert server.get("/health").json["status"] == "draining"
        refused = server.chat()
        assert refused.status == 503 and refused.headers["retry-after"]
        thread.join()
        assert replies[0].status == 503
        assert replies[0].json["error"]["message"] == "the server is shutting down"


def test_a_second_signal():
    """What runs is ended at once, with an answer; a body that is still on its way as well."""
    with running(scripted(endless), drain_s=1000) as server:
        slowly(server)
        parts = urlsplit(server.url)
        half = http.client.HTTPConnection(parts.hostname, parts.port, timeout=20)
        half.putrequest("POST", "/tokenize")
        half.putheader("Content-Length", "100")
        half.endheaders(b"{")
        with client(server) as connection:
            wait_for(lambda: server.service.engine.stats.generated, "a token")
            server.server.handle_exit(15, None)
            wait_for(lambda: server.get("/health").status == 503, "draining")
            server.server.handle_exit(15, None)
            for response in (connection.getresponse(), half.getresponse()):
                assert response.status == 503
                message = json.loads(response.read())["error"]["message"]
                assert message == "the server is shutting down"


def test_drain_waits():
    """A request that ends in time gets its answer."""
    with running(scripted(answering), drain_s=20) as server:
        gate = threading.Semaphore(0)
        server.service.engine.executor.step = lambda: gate.acquire(timeout=20)
        replies = []
        thread = threading.Thread(target=lambda: replies.append(server.chat()))
        thread.start()
        wait_for(lambda: server.service.engine.scheduler.groups, "a group")
        server.server.handle_exit(15, None)
        wait_for(lambda: server.service.draining, "draining")
        gate.release(1000)
        thread.join()
        assert replies[0].status == 200


def test_unknown_paths_and_methods():
    """The framework's own errors, in another form than OpenAI's."""
    with running(scripted(answering)) as server:
        assert server.get("/v1/nothing").json["error"]["type"] == "not_found_error"
        assert request(f"{server.url}/v1/models", "POST", {}).status == 405
        assert server.get("/v1/models/scripted:pacore-4").json["id"] == "scripted:pacore-4"
        assert server.get("/v1/models/other").status == 404
