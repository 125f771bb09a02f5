"""The client, what it asks a server first, and when requests count as late."""

import asyncio
import random
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch

from bench.serve import load_study
from bench.serve.connection import client as client_module
from bench.serve.connection import load, target
from bench.serve.connection.client import Client, Exchange
from bench.serve.connection.timeline import Timeline
from bench.serve.workloads.requests import CHAT, Request
from model.errors import InputError


class Answers:
    """A client of a server that answers everything with one value."""

    url = "http://x"

    def __init__(self, answer: object) -> None:
        self.answer = answer

    async def json(self, path: str, body: object = None) -> object:
        return self.answer


@pytest.mark.parametrize(
    "answer", [None, [], 5, {}, {"data": None}, {"data": 5}, {"data": [5, {}, {"id": None}]}]
)
def test_odd_lists_of_models(answer: object):
    """A traceback, or a model without a name."""
    with pytest.raises(InputError, match="lists no model: give its name with --model"):
        asyncio.run(target.find_model(Answers(answer), None))
    assert asyncio.run(target.find_model(Answers(answer), "m")) == "m"


@pytest.mark.parametrize("answer", [None, [], 5, {}, {"count": None}, {"tokens": [1]}])
def test_odd_tokenizers(answer: object, capsys: pytest.CaptureFixture):
    prompts = asyncio.run(target.prompts(Answers(answer), "m"))
    assert len(prompts.text(random.Random(0), 9).split()) == 9
    assert "the server has no /tokenize" in capsys.readouterr().err


class Busy:
    """A client that sends a request 1,000 s after it was asked to."""

    async def send(self, path: str, body: bytes) -> Exchange:
        now = time.perf_counter()
        return Exchange(sent_s=now + 1000, ended_s=now + 1001, error="timeout")


def test_waiting_for_others_is_not_late():
    """A warning that the rate was not reached, because of --max-concurrency."""
    [found] = asyncio.run(load.run(Busy(), "/", [Request({})], max_concurrency=1)).timelines
    assert found.late_s < 500


class Server(BaseHTTPRequestHandler):
    """Counts connections; refuses requests without a key."""

    protocol_version = "HTTP/1.1"
    connections = 0

    def setup(self):
        super().setup()
        type(self).connections += 1

    def do_GET(self):
        self.send_response(401)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture
def url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_idle_connections_are_not_used(url: str, monkeypatch: pytest.MonkeyPatch):
    """A request on a connection that the server has closed while the loop was busy."""
    assert client_module.KEEP_S < 5  # uvicorn's
    monkeypatch.setattr(client_module, "KEEP_S", 0.05)
    Server.connections = 0

    async def twice() -> None:
        async with Client(url) as client:
            await client.get("/")
            time.sleep(0.1)  # noqa: ASYNC251 the loop is busy
            await client.get("/")

    asyncio.run(twice())
    assert Server.connections == 2


def test_a_key_is_missing(url: str):
    async def ask() -> None:
        async with Client(url) as client:
            await target.find_model(client, None)

    with pytest.raises(InputError, match="/v1/models: status 401: the server wants another API"):
        asyncio.run(ask())


class Refusing:
    """A server that fails every warm-up; notes how many may run at a time."""

    def __init__(self, failure: str) -> None:
        self.failure, self.limits = failure, []

    async def run(self, *args: object, max_concurrency: int | None = None) -> load.Load:
        self.limits.append(max_concurrency)
        return load.Load([Timeline(0.0, 1.0, failure=self.failure)], 0.0)


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        ("status 400", "the server refused the warm-up: status 400"),
        ("too many open files", "the warm-up failed: too many open files"),
    ],
)
def test_warm_ups(failure: str, message: str, monkeypatch: pytest.MonkeyPatch):
    """Warm-ups that run all at once; a failure of the client's that is called the server's."""
    server = Refusing(failure)
    monkeypatch.setattr(load_study.load, "run", server.run)
    monkeypatch.setattr(load_study.target, "find_model", _async("m"))
    monkeypatch.setattr(load_study, "workload", _async(([], [])))
    options = SimpleNamespace(
        base_url="http://x", api_key="", model=None, backend=CHAT, max_concurrency=3
    )
    with pytest.raises(InputError, match=f"^{message}$"):
        asyncio.run(load_study.run(None, options, torch.device("cpu")))
    assert server.limits == [3]


def _async(value: object) -> Callable:
    async def give(*args: object) -> object:
        return value

    return give


def test_prompts_that_come_again():
    """No word of it that a server had the prompts of a run."""
    totals = {"cached_tokens": 11, "prompt_tokens": 100}
    assert "11 % of the prompts' tokens were cached" in load_study.seen_before("image", totals)[0]
    assert load_study.seen_before("random", totals | {"cached_tokens": 10}) == []
    assert load_study.seen_before("prefix_repetition", totals) == []
    assert load_study.seen_before("random", {"requests": 1, "failed": 1}) == []
