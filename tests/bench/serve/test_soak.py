"""The soak, shortened, and what it finds in a server that is broken."""

import asyncio
import re
from collections import Counter
from dataclasses import replace

import pytest

from bench.rows import show
from bench.serve import soak as soak_module
from bench.serve.connection.client import Client
from bench.serve.connection.timeline import Timeline
from bench.serve.soak import soak
from bench.serve.soak_checks import Seen, rows
from bench.serve.workloads import mix
from model.errors import InputError
from model.step3vl import Step3VL
from pacore_sched.answers.pacore import engine_for
from pacore_sched.serve.limits import Limits
from pacore_sched.serve.metrics import Metrics
from pacore_sched.serve.service import Service
from tests.pacore_sched.serve.serving import Running, answering, running, scripted

REQUESTS = 200


def run(server: Running, model: str, count: int) -> Seen:
    async def load() -> Seen:
        async with Client(server.url) as client:
            return await soak(client, model, count, 32, 1, rss=lambda: 2**20)

    return asyncio.run(load())


def test_soak():
    """A page that leaks, an answer that is lost, doubled or that of another request, a request that
    waits for ever. There is too little KV for all of them."""
    tiny = Step3VL.from_preset("tiny", seed=3)
    engine = engine_for(tiny, kv_tokens=1536, max_running=16)
    with running(Service(tiny, engine, Limits(), Metrics("tiny")), "tiny", debug=True) as server:
        seen = run(server, "tiny", REQUESTS)
        server.wait_idle()
        metrics = server.get("/metrics").body.decode()
    found = rows(seen)
    assert [row["failure"] for row in found if row["failure"]] == []
    assert len(seen.integrity) == REQUESTS // 100 + 1
    assert seen.alone > 15
    assert len(seen.left) > 10
    ended = sum(map(float, re.findall(r"request_success_total\{.*\} (.*)$", metrics, re.M)))
    sent = Counter(seen.kinds)
    answered = REQUESTS + seen.alone - sent["malformed"]
    assert answered - len(seen.left) <= ended <= answered  # some that leave have been answered


def test_needs_debug():
    """A soak without its most important check, on a server that was not started for it."""
    with (
        running(scripted(answering)) as server,
        pytest.raises(InputError, match="has no /debug/integrity: start it with --debug"),
    ):
        run(server, "scripted", 8)


class Dead:
    """A client whose server does not answer, three times."""

    asked = 0

    async def get(self, path: str) -> tuple[int, bytes]:
        self.asked += 1
        if self.asked > 3:
            raise asyncio.CancelledError
        raise InputError("no answer")


def test_health_without_an_answer(monkeypatch: pytest.MonkeyPatch):
    """A probe that ends at the first failure, and is never missed."""
    monkeypatch.setattr(soak_module, "HEALTH_S", 0.0)
    found = seen(unhealthy=0)
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(soak_module._probe_health(Dead(), found))
    assert found.unhealthy == 3


IDLE = {"jobs": 0, "groups": 0, "pages": 24, "free_pages": 24, "fault": None}
KINDS = ["plain", "stream", "n", "malformed", "leave within"]


def seen(**fields: object) -> Seen:
    """What a soak has seen of a server that is right, with some fields replaced."""
    refused = Timeline(0.0, 1.0, failure="status 400")
    timelines = {
        0: Timeline(0.0, 1.0, ids=("a",), texts=("x",), output=1),
        1: Timeline(0.0, 1.0, ids=("b",), texts=("y",), output=1),
        2: Timeline(0.0, 1.0, ids=("c",), texts=("1", "2", "3"), output=3),
        3: refused,
    }
    right = {
        "timelines": timelines,
        "statuses": {0: 200, 1: 200, 2: 200, 3: 400},
        "left": [4],
        "integrity": [IDLE, IDLE],
        "alone": 2,
        "health_ms": [1.0],
        "rss": [100] * 8,
        "seconds": 2.0,
    }
    return Seen(KINDS, **(right | fields))


def failed(found: Seen) -> list[str]:
    return [row["impl"] for row in rows(found) if row["failure"]]


def test_checks_pass():
    assert failed(seen()) == []
    found = rows(seen())
    show.serve([{**row, "op": "serve_soak", "case": "", "device": "", "torch": "", "commit": ""}
                for row in found])  # fmt: skip
    assert found[-1]["requests_per_second"] == 5 / 2


LOST = "answers lost or failed"
DOUBLED = "answers doubled or of another request"
MEMORY = "memory of the last quarter over the second's"
RIGHT = seen().timelines


@pytest.mark.parametrize(
    ("fields", "check"),
    [
        ({"timelines": {n: t for n, t in RIGHT.items() if n != 1}}, LOST),
        ({"timelines": RIGHT | {1: replace(RIGHT[1], failure="timeout")}}, LOST),
        ({"timelines": RIGHT | {1: replace(RIGHT[1], output=0)}}, LOST),
        ({"timelines": RIGHT | {2: replace(RIGHT[2], texts=("1", "2"))}}, LOST),
        ({"timelines": RIGHT | {1: replace(RIGHT[1], ids=("a",))}}, DOUBLED),
        ({"wrong_ids": [1]}, DOUBLED),
        ({"differing": [0]}, "answers unlike those alone"),
        ({"statuses": {3: 200}}, "malformed bodies without status 400"),
        ({"statuses": {3: 400, 4: 500}}, "statuses from 500"),
        ({"integrity": [IDLE, IDLE | {"groups": 1}]}, "requests left on the idle server"),
        ({"integrity": [IDLE, IDLE | {"jobs": 1}]}, "requests left on the idle server"),
        ({"integrity": [IDLE, IDLE | {"free_pages": 23}]}, "pages leaked"),
        ({"integrity": [IDLE | {"fault": "x"}, IDLE]}, "faults of the engine's state"),
        ({"unhealthy": 1}, "/health not 200"),
        ({"health_ms": []}, "/health not 200"),
        ({"rss": [100, 100, 100, 100, 105, 105, 106, 106]}, MEMORY),
    ],
)
def test_checks_fail(fields: dict, check: str):
    """A check that passes whatever the server does."""
    assert failed(seen(**fields)) == [check]


def test_first_quarter_may_grow():
    assert failed(seen(rss=[1, 50, 100, 100, 100, 100, 104, 104])) == []


def test_every_kind_is_sent():
    assert set(mix.kinds(100, 0)) == set(mix.SHARES)
