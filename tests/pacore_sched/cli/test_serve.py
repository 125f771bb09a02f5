"""`serve` as a process: its options, what it prints, and how a signal ends it."""

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from model.errors import InputError
from pacore_sched.__main__ import main
from tests.pacore_sched.serve.serving import request
from tests.support import ROOT

MODEL = ["--model", "tiny", "--kv-tokens", "4096"]


@contextmanager
def serve(*words: str) -> Iterator[tuple[subprocess.Popen, str, list[dict]]]:
    """A server process on a free port, its URL, and its log, which grows when it has ended."""
    command = [sys.executable, "-m", "pacore_sched", "serve", *MODEL, "--port", "0", *words]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    log: list[dict] = []
    try:
        for line in process.stderr:
            if line.startswith(b"{"):
                log.append(json.loads(line))
                break
        yield process, log[0]["url"].removesuffix("/v1"), log
        stdout, stderr = process.communicate(timeout=60)
        assert stdout == b""
        log += map(json.loads, stderr.splitlines())
    finally:
        process.kill()
        process.wait()


@pytest.mark.cli
def test_a_life(tmp_path: Path):
    """From the first line to the last: an answer, logs without prompts or keys, and an end by
    SIGTERM that keeps a PaCoRe problem's finished rollouts."""
    journal = tmp_path / "journal"
    body = {"model": "m", "messages": [{"role": "user", "content": "SECRET question"}], "seed": 1}
    headers = {"Authorization": "Bearer KEY-1"}
    options = ["--served-model-name", "m", "--api-key", "KEY-1", "--journal", str(journal)]
    with serve(*options, "--drain-seconds", "0.2") as (process, url, log):
        assert log[0]["event"] == "listening" and log[0]["models"] == ["m", "m:pacore-16"]
        assert log[0]["kv_tokens"] == 4096
        reply = request(
            f"{url}/v1/chat/completions", "POST", body | {"max_tokens": 4}, **headers,
            X_Request_ID="first",
        )  # fmt: skip
        assert reply.status == 200 and reply.json["usage"]["completion_tokens"] == 4
        assert request(f"{url}/v1/models").status == 401
        host, port = url.removeprefix("http://").split(":")
        long = body | {"pacore": {"widths": [40]}, "max_tokens": 100}
        with socket.create_connection((host, int(port))) as connection:
            data = json.dumps(long).encode()
            head = (
                "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer KEY-1\r\n"
                f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
            )
            connection.sendall(head.encode() + data)
            deadline = time.monotonic() + 30
            while b"rollouts_total{" not in request(f"{url}/metrics").body:
                assert time.monotonic() < deadline
            counted = b'pacore:rollouts_total{finish_reason="length",model_name="m"} '
            while counted + b"1.0" in request(f"{url}/metrics").body:  # the first request's
                assert time.monotonic() < deadline
                time.sleep(0.01)
            process.send_signal(signal.SIGTERM)
            answer = b""
            while part := connection.recv(65536):
                answer += part
            assert b" 503 " in answer.split(b"\r\n")[0], answer[:500]
    assert process.returncode == 0
    requests = [line for line in log if line["event"] == "request"]
    assert requests[0]["request_id"] == "first" and requests[0]["status"] == 200
    assert requests[0]["usage"]["completion_tokens"] == 4
    text = json.dumps(log)
    assert "SECRET" not in text and "KEY-1" not in text and "Traceback" not in text
    (saved,) = journal.glob("*.jsonl")
    assert len(saved.read_text().splitlines()) > 1


def test_bad_options():
    """A mistake that is told after minutes of loading, or in a line that does not name it."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for words, part in (
            (["--port", port], f"--port {port}"),
            (["--host", "no.such.host.invalid"], "--host no.such.host.invalid"),
            (["--api-key", ""], "API key"),
            (["--served-model-name", ""], "--served-model-name"),
            (["--allowed-local-media-path", "/no/such"], "--allowed-local-media-path /no/such"),
            (["--journal", "/dev/null/x"], "--journal /dev/null/x"),
        ):
            with pytest.raises(InputError) as raised:
                main(["serve", "--model", "no-such-model", *words])
            assert part in str(raised.value)
