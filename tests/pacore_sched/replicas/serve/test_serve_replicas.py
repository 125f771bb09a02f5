"""`serve --replicas` as a process: what it answers, a replica that is killed, and how it ends."""

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from model.errors import InputError
from pacore_sched.__main__ import main
from pacore_sched.cli.serve import add_arguments, make_context
from pacore_sched.replicas.serve.forwarding import ForwardedRequest, answer
from pacore_sched.serve.http.app import make_routes
from tests.pacore_sched.serve.serving import HI, request
from tests.support import ROOT

OPTIONS = ["--model", "tiny", "--kv-tokens", "4096", "--threads", "1", "--port", "0"]
CHAT = {"model": "tiny", "messages": HI, "max_tokens": 8, "seed": 1}
PACORE = {**CHAT, "pacore": {"widths": [3], "events": True}, "stream": True}


@contextmanager
def serve(log: Path, *words: str) -> Iterator[tuple[subprocess.Popen, dict]]:
    """A server process, and the first line of its log."""
    command = [sys.executable, "-m", "pacore_sched", "serve", *OPTIONS, *words]
    with open(log, "wb") as file:  # a pipe that is not read would stop the server
        process = subprocess.Popen(command, cwd=ROOT, stderr=file, stdout=subprocess.DEVNULL)
    try:
        while b"\n" not in log.read_bytes():
            assert process.poll() is None
            time.sleep(0.1)
        yield process, json.loads(log.read_bytes().splitlines()[0])
    finally:
        process.kill()
        process.wait()


def one_server(*bodies: dict) -> list[bytes]:
    """What the routes of the same options answer in this process."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    app = make_routes(make_context(parser.parse_args(OPTIONS)))

    async def run() -> list[bytes]:
        async with app.router.lifespan_context(app):
            return [await body_of(body) for body in bodies]

    async def body_of(body: dict) -> bytes:
        headers = [(b"content-type", b"application/json")]
        path = "/v1/chat/completions"
        asked = ForwardedRequest("", "POST", path, headers=headers, body=json.dumps(body).encode())
        parts = [message async for part in answer(app, asked) for message in part]
        return b"".join(message.get("body", b"") for message in parts)

    return asyncio.run(run())


def texts(body: bytes) -> list:
    """What a response says, without its ids and times."""
    documents = [
        line.removeprefix(b"data: ") for line in body.splitlines() if line.startswith((b"{", b"da"))
    ]
    parsed = [json.loads(document) for document in documents if document != b"[DONE]"]
    return [[chunk["choices"], chunk.get("pacore"), chunk.get("usage")] for chunk in parsed]


def processes() -> dict[int, tuple[int, str]]:
    """The parent and the command line of every process."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            found[int(path.name)] = parent, (path / "cmdline").read_text()
        except OSError:  # it has ended
            continue
    return found


def descendants(pid: int) -> dict[int, str]:
    known, found = processes(), {pid: ""}
    while more := {p: line for p, (up, line) in known.items() if up in found and p not in found}:
        found |= more
    return {p: line for p, line in found.items() if p != pid}


def replicas_in_metrics(url: str) -> set[str]:
    lines = request(f"{url}/metrics").body.decode().splitlines()
    steps = [line for line in lines if line.startswith("pacore:engine_steps_total{")]
    return {line.split('replica="')[1].split('"')[0] for line in steps}


@pytest.mark.cli
@pytest.mark.timeout(180)
def test_a_life(tmp_path: Path):
    """Answers as of one server; a replica that is killed is replaced; nothing is left running."""
    pytest.importorskip("ray")
    expected = one_server(CHAT, PACORE)
    log = tmp_path / "log"
    with serve(log, "--replicas", "2", "--served-model-name", "tiny") as (process, first):
        assert first["event"] == "listening" and len(first["replicas"]) == 2
        url = first["url"].removesuffix("/v1")
        for body, whole in zip((CHAT, PACORE), expected, strict=True):
            reply = request(f"{url}/v1/chat/completions", "POST", body)
            assert reply.status == 200 and texts(reply.body) == texts(whole)
        assert replicas_in_metrics(url) == {*first["replicas"]}
        started = descendants(process.pid)
        replicas = [pid for pid, line in started.items() if line.startswith("ray::ServeReplica")]
        assert len(replicas) == 2
        os.kill(replicas[0], signal.SIGKILL)
        deadline = time.monotonic() + 90
        while len(now := replicas_in_metrics(url)) < 2 or now == {*first["replicas"]}:
            assert time.monotonic() < deadline, "the replica is not replaced"
            assert request(f"{url}/v1/chat/completions", "POST", CHAT).status == 200
            time.sleep(0.2)
        assert len(now & {*first["replicas"]}) == 1
        started |= descendants(process.pid)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
        logged = [json.loads(line) for line in log.read_bytes().splitlines()]
        asked = next(line for line in logged if line.get("path") == "/v1/chat/completions")
        assert asked["replica"] in first["replicas"]
        assert asked["usage"]["completion_tokens"] == 8
        deadline = time.monotonic() + 20
        while left := started.keys() & processes().keys():
            assert time.monotonic() < deadline, {pid: started[pid] for pid in left}
            time.sleep(0.1)


@pytest.mark.cli
@pytest.mark.timeout(180)
def test_rolling_restart(tmp_path: Path):
    """At SIGHUP all replicas are replaced, and no request fails meanwhile."""
    pytest.importorskip("ray")
    log = tmp_path / "log"
    with serve(log, "--replicas", "2") as (process, first):
        url = first["url"].removesuffix("/v1")
        process.send_signal(signal.SIGHUP)
        deadline = time.monotonic() + 120
        while b"restarted" not in log.read_bytes():
            assert time.monotonic() < deadline, log.read_text()
            reply = request(f"{url}/v1/chat/completions", "POST", CHAT)
            assert reply.status == 200, reply.body
        now = replicas_in_metrics(url)
        assert len(now) == 2 and not now & {*first["replicas"]}
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0


@pytest.mark.cli
@pytest.mark.timeout(120)
def test_mistake_in_a_replica():
    """What only the model's process can know is told in one line, and nothing is left running."""
    pytest.importorskip("ray")
    command = [sys.executable, "-m", "pacore_sched", "serve", *OPTIONS, "--replicas", "1"]
    command += ["--chat-template", "no-such-template"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "no-such-template" in done.stderr


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--replicas", "2", "--journal", "x"], "--journal does not go with --replicas"),
        (["--replicas", "2", "--model", "no-such-model"], "no-such-model"),
        (["--replicas", "2", "--ray-address", "nowhere"], "--ray-address nowhere"),
        (["--ray-address", "127.0.0.1:1"], "--ray-address needs --replicas"),
    ],
)
def test_bad_options(words: list[str], part: str):
    """Told before a cluster is started."""
    with pytest.raises(InputError) as raised:
        main(["serve", *OPTIONS, *words])
    assert part in str(raised.value)
