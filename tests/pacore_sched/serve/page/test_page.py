"""The page in a browser: what it draws of a running server, and when the server does not answer."""

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import unescape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pacore_sched.serve.page import status
from pacore_sched.serve.page.files import FILES, page_file
from tests.pacore_sched.replicas.serve.fake_replicas import running_front
from tests.pacore_sched.serve.page.browser import browse
from tests.pacore_sched.serve.page.test_snapshot import between_steps, keep
from tests.pacore_sched.serve.serving import (
    answering,
    client,
    endless,
    running,
    scripted,
    slowly,
    wait_for,
)

pytestmark = pytest.mark.cli  # starts a browser


def text_of(html: str) -> str:
    """The text of a page, with a blank between elements."""
    body = html[html.index("<body") :]
    return " ".join(unescape(re.sub(r"<noscript>.*?</noscript>|<[^>]*>", " ", body)).split())


def test_load_tree_and_requests(monkeypatch: pytest.MonkeyPatch):
    """A page that stays empty, or shows other numbers than the server's."""
    monkeypatch.setattr(status, "FRESH_S", 0)  # as the browser skips the time between its polls
    service = scripted(endless, max_running=6)
    with running(service) as server:
        slowly(server)
        tree = service.engine.scheduler.tree
        root, child = between_steps(server, lambda: keep(tree))
        started = service.engine.scheduler.running
        with client(server, pacore={"widths": [4, 2]}, max_tokens=4000, ignore_eos=True):
            wait_for(lambda: len(started) == 4, "the first request")
            with client(server, n=3, max_tokens=4000, ignore_eos=True):
                wait_for(lambda: len(started) == 6, "the second request")
                html, console = browse(server.url)
        between_steps(server, lambda: (tree.release(child), tree.release(root)))
        server.wait_idle()
    text = text_of(html)
    assert console == []
    assert "PaCoRe server ok scripted" in text
    assert re.search(r"Tokens per second [1-9][\d,]* last 30 s, highest", text)
    assert "Requests running 2 0 waiting Rollouts running 6 1 waiting" in text
    assert re.search(r"Request 1 \d+ s 4 rollouts 2 rollouts synthesis 4 running 0 ended", text)
    assert re.search(r"Request 2 \d+ s 3 rollouts 2 running 0 ended 1 waiting", text)
    assert '<li class="now" aria-current="step">4 rollouts</li>' in html
    total, parts = (
        service.engine.executor.num_pages,
        re.search(
            r'aria-label="KV pages: prompts (\d+), rollouts (\d+), kept 3, free ([\d,]+)"', html
        ),
    )
    assert sum(int(part.replace(",", "")) for part in parts.groups()) + 3 == total
    readers = re.findall(r"(\d rollouts of request \d|kept) ?, ([\d,]+) tokens?", text)
    size = tree.page_size
    assert [reader for reader, _ in readers] == [
        "4 rollouts of request 1", "2 rollouts of request 2", "kept", "kept",
    ]  # fmt: skip
    assert readers[2:] == [("kept", str(2 * size)), ("kept", "1")]
    assert html.count('class="rollouts" style="width:') == 1 + 6  # in the bar and in the tree


@contextmanager
def serving(answer: Callable[[str], str | None], **files: str) -> Iterator[str]:
    """The URL of a server with the page's files and others. What `answer` returns for other paths
    is sent as JSON; for None the connection ends."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            headers = {}
            if self.path in FILES:
                reply = page_file(self.path)
                body, headers = bytes(reply.body), {"Content-Type": reply.headers["content-type"]}
            elif self.path[1:] in files:
                body = files[self.path[1:]].encode()
                headers = {"Content-Type": "text/html"}
            elif (text := answer(self.path)) is not None:
                body = text.encode()
            else:
                return
            self.send_response(200)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def example(nodes: int = 1, problems: int = 1, rollouts: int = 2) -> dict:
    """A status with long numbers."""
    node = {"parent": None, "start": 0, "tokens": 123_456, "pages": 12_345, "state": "running",
            "problems": [1_000_000] * 4, "problems_left_out": 1000, "running": 2000,
            "branches": [1_234_567] * 16, "branches_left_out": 1984}  # fmt: skip
    problem = {"number": 1_000_000, "seconds": 3599.9, "round": 3, "widths": [128] * 7 + [1],
               "synthesis": True, "prompt_tokens": 123_456, "tokens": 123_456_789, "running": 100,
               "waiting": 14, "ended": 14, "rollouts_left_out": 96,
               "rollouts": [{"state": "running", "tokens": 12_345}] * rollouts}  # fmt: skip
    kv = {"total": 1_000_000, "page_tokens": 64, "prompts": 300_000, "rollouts": 300_000,
          "kept": 300_000, "free": 100_000}  # fmt: skip
    engine = {"at": 1e6, "tokens": 10**12, "steps": 10**9, "running": 4096, "waiting": 10_000,
              "kv": kv, "problems": [problem] * problems, "problems_left_out": 1000,
              "nodes": [{**node, "id": id} for id in range(nodes)],
              "nodes_left_out": 1000}  # fmt: skip
    return {"model": "a_name_without_any_blank_that_is_long" * 3, "state": "ok", "running": 1000,
            "waiting": 512, "max_waiting": 512, "age_s": 12.3, "engine": engine}  # fmt: skip


FRAME = """<!doctype html><iframe src="/" width="WIDTH" height="900"></iframe><p></p><script>
setTimeout(() => {
  const page = document.querySelector("iframe").contentDocument.documentElement;
  const wide = [...page.querySelectorAll("body *")].filter(
    (one) => one.clientWidth && one.scrollWidth > one.clientWidth);
  document.querySelector("p").textContent = `${page.scrollWidth} of ${page.clientWidth},
    ${page.querySelectorAll(".card").length} cards,
    beyond: ${wide.map((one) => `${one.tagName} ${one.className}`)}.`;
}, 2000);
</script>"""


@pytest.mark.parametrize("width", [320, 768])
def test_fits_a_phone(width: int):
    """A page that scrolls sideways, with the longest numbers and names."""
    text = json.dumps(example(nodes=3, problems=2, rollouts=32))
    with serving(lambda path: text, frame=FRAME.replace("WIDTH", str(width))) as url:
        text = text_of(browse(f"{url}/frame", 4)[0])
    found = re.search(r"(\d+) of (\d+), 2 cards, beyond: (.*?)\.", text)
    assert found and found[1] == found[2] and not found[3], text


HIDDEN = """<!doctype html><iframe src="/"></iframe><script>
setTimeout(() => {
  const page = document.querySelector("iframe").contentDocument;
  page.dispatchEvent(new Event("visibilitychange"));
}, 2500);
setTimeout(() => {
  const page = document.querySelector("iframe").contentDocument;
  Object.defineProperty(page, "hidden", { value: true });
}, 12500);
</script>"""


def test_hidden_page():
    """Polls twice a second after it has been hidden for a moment; polls while it is hidden."""
    asked, text = [], json.dumps(example())
    with serving(lambda path: asked.append(path) or text, frame=HIDDEN) as url:
        browse(f"{url}/frame", 25)
    assert 10 <= len(asked) <= 16


@pytest.mark.parametrize("lost", [2, 1000])
def test_server_that_does_not_answer(lost: int):
    """Old numbers that look like new ones; a page that must be loaded again afterwards."""
    asked = []

    def answer(path: str) -> str | None:
        asked.append(path)
        return None if 1 < len(asked) <= 1 + lost else json.dumps(example())

    with serving(answer) as url:
        html, _ = browse(url, 8)
    assert set(asked) == {"/status"} and len(asked) > 5
    assert "Request 1000000" in html
    assert ("not reachable" in html) == ('<body class="stale">' in html) == (lost == 1000)
    assert (">ok<" in html) == (lost == 2)


def test_slow_step():
    """Numbers of a long step that look like those of now; an engine without any yet."""
    for record, shown in (
        (example(), "a long step: these numbers are 12 s old"),
        ({**example(), "age_s": None, "engine": None}, "has not answered yet"),
    ):
        text = json.dumps(record)
        with serving(lambda path, text=text: text) as url:
            html, console = browse(url, 1)
        assert shown in html and console == []


def test_replicas():
    """The front's page has a section for each replica."""
    with running_front({name: scripted(answering) for name in ("one", "two")}) as front:
        front.chat()
        html, console = browse(front.url)
    text = text_of(html)
    assert console == []
    assert "scripted Replica one: ok" in text and "scripted Replica two: ok" in text
    assert text.count("Prefix tree") + text.count("The prefix tree is empty.") == 2
