"""A server in this process, for tests: on a scripted executor, or on any engine."""

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import torch

from model.config import TINY
from model.text.tokenizer import Tokenizer
from pacore_sched.engine.engine import Engine
from pacore_sched.engine.stopping import Stopping
from pacore_sched.sched.prefix_tree import PrefixTree
from pacore_sched.sched.request import Batch, Rollout, SampledTokens
from pacore_sched.serve.api.context import Context
from pacore_sched.serve.api.names import Names
from pacore_sched.serve.engine_metrics import EngineMetrics
from pacore_sched.serve.http.app import make_app
from pacore_sched.serve.http.server import Server, bound_socket, url_of
from pacore_sched.serve.limits import Limits
from pacore_sched.serve.metrics import Metrics
from pacore_sched.serve.service import Service
from tests.pacore_sched.answers.hashed_pacore import HashExecutor

TOKENIZER = Tokenizer.byte_level(TINY)
EOS = TINY.tokens.eos[1]  # <|im_end|>
MODEL = SimpleNamespace(config=TINY, tokenizer=TOKENIZER, dtype=torch.float32)
Script = Callable[[Rollout], str]
HI = [{"role": "user", "content": "Hi"}]


class ScriptedExecutor(HashExecutor):
    """Every rollout says what `script` returns for it, a byte per token, and ends.

    `step` is called before every step, in the engine's thread: it may wait, or raise.
    """

    def __init__(self, script: Script, num_pages: int = 4000, max_running: int = 64) -> None:
        super().__init__(num_pages, max_running=max_running)
        self.script = script
        self.step: Callable[[], None] = lambda: None
        self.cache = SimpleNamespace(k=torch.zeros(0))
        self.stats = SimpleNamespace(device_s=0.0)
        self.texts: dict[Rollout, list[int]] = {}

    def launch(self, tree: PrefixTree, batch: Batch) -> Any:
        self.step()
        super().launch(tree, batch)  # which checks the batch
        tokens = []
        for rollout in batch.sampled:
            ids = self.texts.get(rollout)
            if ids is None:
                ids = self.texts[rollout] = [*TOKENIZER.encode(self.script(rollout)), EOS]
            at = len(rollout.tokens)
            tokens.append(ids[at] if at < len(ids) else EOS)
            self.last[rollout.batch_index] = rollout, tokens[-1]
        return SampledTokens(tokens, [-0.5] * len(tokens))

    def close(self) -> None:
        pass


def scripted(script: Script, **options: Any) -> Service:
    """A service on a scripted executor, of a model with a byte per token."""
    limits = options.pop("limits", Limits())
    engine = Engine(ScriptedExecutor(script, **options), Stopping(TOKENIZER, TINY.tokens.eos))
    return Service(MODEL, engine, limits, Metrics("scripted"))


def prompt_text(rollout: Rollout) -> str:
    """The prompt of a rollout, as text."""
    ids = [id for segment in rollout.group.path for id in segment.ids]
    return TOKENIZER.decode([*ids, rollout.group.last_token])


def answering(rollout: Rollout) -> str:
    if "Reference Responses" in prompt_text(rollout):
        return "</think>all of them"
    return f"</think>answer {rollout.index} {rollout.seed}"


def endless(rollout: Rollout) -> str:
    return "</think>" + "word " * 1000


@dataclass(frozen=True)
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def request(url: str, method: str = "GET", body: object = None, **headers: str) -> Reply:
    """One request; a `body` that is neither None nor bytes is sent as JSON."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=60)
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    if data is not None:
        named.setdefault("Content-Type", "application/json")
    try:
        connection.request(method, parts.path, data, named)
        response = connection.getresponse()
        found = {name.lower(): value for name, value in response.getheaders()}
        return Reply(response.status, found, response.read())
    finally:
        connection.close()


class Running:
    """A running server: its URL, and its service."""

    def __init__(self, url: str, service: Service, server: Server) -> None:
        self.url, self.service, self.server = url, service, server

    def post(self, path: str, body: object, **headers: str) -> Reply:
        return request(self.url + path, "POST", body, **headers)

    def get(self, path: str, **headers: str) -> Reply:
        return request(self.url + path, **headers)

    def chat(self, text: str = "Hi", **fields: Any) -> Reply:
        """A chat completion of one message, or of the `messages` among the fields."""
        messages = [{"role": "user", "content": text}]
        body = {"model": "scripted", "messages": messages, **fields}
        return self.post("/v1/chat/completions", body)

    def wait_idle(self) -> None:
        """Wait until the engine has nothing to do; checks that no page is in use."""
        engine, deadline = self.service.engine, time.monotonic() + 20
        while self.service.jobs or engine.busy or engine.scheduler.groups:
            assert time.monotonic() < deadline, "the engine does not come to rest"
            time.sleep(0.01)
        engine.scheduler.check_integrity()
        assert engine.scheduler.tree.free_pages == engine.executor.num_pages
        assert self.service.waiting == 0


@contextmanager
def running(service: Service, name: str = "scripted", **options: Any) -> Iterator[Running]:
    """Serve in a thread until the end of the context. Options: as of make_app and Context."""
    context = {key: options.pop(key) for key in ("media", "saved") if key in options}
    drain_s = options.pop("drain_s", 5.0)
    service.metrics.registry.register(EngineMetrics(service, 1e9))
    app = make_app(Context(service, Names([name]), **context), **options)
    with bound_socket("127.0.0.1", 0) as listener:
        server = Server(app, service, drain_s)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        url = url_of(listener)
        assert request(url + "/health").status == 200
        try:
            yield Running(url, service, server)
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.005)


@contextmanager
def client(server: Running, **fields: object) -> Iterator[http.client.HTTPConnection]:
    """A connection whose chat request has been sent, and whose response has not been read."""
    parts = urlsplit(server.url)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=60)
    body = {"model": "scripted", "messages": HI, **fields}
    connection.request(
        "POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"}
    )
    try:
        yield connection
    finally:
        connection.close()


def slowly(server: Running, seconds: float = 0.005) -> None:
    server.service.engine.executor.step = lambda: time.sleep(seconds)
