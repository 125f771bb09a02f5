"""`python -m bench serve` on servers in this process: its rows, its exit codes, what it refuses."""

import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from bench.__main__ import main
from bench.replicas.processes import descendants
from bench.report import rows as report_rows
from bench.rows import show
from model.errors import InputError
from model.step3vl import Step3VL
from pacore_sched.answers.pacore import engine_for
from pacore_sched.serve.limits import Limits
from pacore_sched.serve.metrics import Metrics
from pacore_sched.serve.service import Service
from tests.pacore_sched.serve.serving import Running, answering, running, scripted

TOKENS = 20  # of an answer: more than `</think>`, which is not shown


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(scripted(answering)) as found:
        yield found
        found.wait_idle()


def measured(capsys: pytest.CaptureFixture, *words: str) -> tuple[int, dict, dict[str, dict]]:
    """The exit code, the row of totals, and those of latencies by their names."""
    code = main(["serve", *words, "--device", "cpu", "--json"])
    first, *others = json.loads(capsys.readouterr().out)["rows"]
    show.serve([first, *others])
    assert first["case"] in capsys.readouterr().out
    assert report_rows.kind_of(report_rows.by_device([first])[0].latest[0]) == "serve"
    return code, first, {row["impl"]: row for row in others}


def base(server: Running, *words: str) -> list[str]:
    lengths = ["--random-input-len", "30", "--random-output-len", str(TOKENS)]
    return ["--base-url", f"{server.url}/v1", "--num-prompts", "12", *lengths, *words]


def test_load(server: Running, capsys: pytest.CaptureFixture):
    """Tokens, requests or warm-ups that are counted twice or not at all."""
    before = server.service.metrics.text().decode()
    words = ["--max-concurrency", "4", "--num-warmups", "3", "--goodput", "e2el:1000000"]
    code, row, latencies = measured(capsys, *base(server, *words))
    assert code == 0
    assert (row["requests"], row["failed"], row["failure"]) == (12, 0, None)
    assert row["output_tokens"] == 12 * TOKENS
    assert row["concurrency_max"] <= 4
    assert row["device"].startswith("client: ")
    assert row["good_share"] == 1.0
    assert row["late_p99_ms"] is None
    assert row["case"].endswith(f"random 30+{TOKENS} x 12, at most 4 at once")
    assert [latencies[name]["count"] for name in ("TTFT", "TPOT", "E2EL")] == [12] * 3
    for name in ("mean_ms", "median_ms", "p90_ms", "p99_ms"):
        assert latencies["TTFT"][name] <= latencies["E2EL"][name]
    name = "pacore:request_success_total{"
    after = server.service.metrics.text().decode()
    ended = [
        sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))
        for text in (before, after)
    ]
    assert ended[1] - ended[0] == 12 + 3


def test_rate_and_endpoints(server: Running, capsys: pytest.CaptureFixture):
    """Requests that wait for those before them although a rate is given; bodies that one of the
    endpoints refuses."""
    words = ["--request-rate", "200", "--burstiness", "0.5", "--backend", "openai"]
    code, row, latencies = measured(capsys, *base(server, *words, "--metric-percentiles", "50"))
    assert code == 0
    assert row["late_p99_ms"] >= 0
    assert "p50_ms" in latencies["ITL"]
    assert "p99_ms" not in latencies["ITL"]
    code, row, latencies = measured(capsys, *base(server, "--disable-stream"))
    assert code == 0
    assert list(latencies) == ["E2EL"]


def test_pacore(server: Running, capsys: pytest.CaptureFixture):
    words = base(server, "--dataset-name", "pacore", "--pacore-widths", "3")
    code, row, latencies = measured(capsys, *words)
    assert code == 0
    assert row["output_tokens"] == 12 * (3 + 1) * TOKENS
    assert row["tokens_per_chunk"] is None
    assert "TPOT" not in latencies
    assert "E2EL (time to answer)" in latencies


@pytest.mark.parametrize("concurrency", ["1", "100"])
def test_photos(capsys: pytest.CaptureFixture, concurrency: str):
    """The benchmark of SGLang's cookbook, by its own options, with small photos on the tiny model:
    requests that fail, or figures that are missing."""
    tiny = Step3VL.from_preset("tiny")
    engine = engine_for(tiny, kv_tokens=8192, max_running=16)
    words = ["--dataset", "image", "--image-count", "2", "--image-resolution", "64x48"]
    words += ["--random-range-ratio", "1", "--max-concurrency", concurrency]
    with running(Service(tiny, engine, Limits(), Metrics("tiny")), "tiny") as server:
        code, row, latencies = measured(capsys, *base(server, *words))
    assert (code, row["failed"]) == (0, 0)
    assert not any("cached" in warning for warning in row["warnings"])
    assert row["requests_per_second"] > 0 and row["tokens_per_second"] > 0
    assert row["prompt_tokens"] >= 12 * 2 * tiny.config.vision.image_tokens
    assert 12 < row["output_tokens"] < 12 * 2 * TOKENS  # uniform from 1 to twice as many
    assert row["concurrency_max"] <= int(concurrency)
    assert {"TTFT", "TPOT", "ITL", "E2EL"} <= latencies.keys()
    for name in ("mean_ms", "median_ms", "p99_ms"):
        assert latencies["TTFT"][name] <= latencies["E2EL"][name]


def test_prefixes(server: Running, capsys: pytest.CaptureFixture):
    lengths = ["--prefix-repetition-prefix-len", "80", "--prefix-repetition-suffix-len", "9"]
    words = ["--base-url", server.url, "--num-prompts", "10", "--dataset-name", "prefix_repetition"]
    code, _, latencies = measured(capsys, *words, *lengths, "--prefix-repetition-num-prefixes", "3")
    assert code == 0
    assert latencies["TTFT, first of a prefix"]["count"] == 3
    assert latencies["TTFT, later of a prefix"]["count"] == 7


def test_trace(server: Running, tmp_path, capsys: pytest.CaptureFixture):
    path = tmp_path / "trace.csv"
    lines = [f"2023-11-16 18:17:0{n}.0,{20 + n},{3 + n}" for n in range(4)]
    path.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *lines]))
    words = ["--base-url", server.url, "--dataset-name", "trace", "--dataset-path", str(path)]
    code, row, _ = measured(capsys, *words, "--request-rate", "100")
    assert code == 0
    assert row["output_tokens"] == 3 + 4 + 5 + 6


def test_failures(server: Running, capsys: pytest.CaptureFixture):
    """Failed requests that do not show, or an exit code of 0."""
    words = base(server, "--num-warmups", "0", "--extra-request-body", '{"best_of": 5}')
    code, row, latencies = measured(capsys, *words)
    assert code == 1
    assert row["failed"] == 12
    assert row["failure"].startswith("12 of 12 requests failed: 12 x status 400 (")
    assert "best_of" in row["failure"]
    assert not latencies


STREAMLESS = ["--base-url", "http://x", "--disable-stream"]
PACORE = ["--base-url", "http://x", "--dataset-name", "pacore"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give --base-url URL, or --model NAME"),
        (["--base-url", "127.0.0.1:8000"], "must begin with http:// or https://"),
        (["--base-url", "http://127.0.0.1:1"], "no answer from http://127.0.0.1:1/v1/models"),
        (["--base-url", "http://x", "--threads", "1"], "which does not run with --base-url"),
        (["--base-url", "http://x", "--server-options", "a"], "which does not run with --base-url"),
        (["--base-url", "http://x", "--repeats", "3"], "--repeats is not an option of --dataset-n"),
        (["--base-url", "http://x", "--image-count", "3"], "option of --dataset-name random"),
        (["--base-url", "http://x", "--request-rate", "0"], "--request-rate 0: it must be"),
        (["--base-url", "http://x", "--goodput", "itl:5"], "--goodput 'itl:5': it must be"),
        (["--base-url", "http://x", "--goodput", "ttft:nan"], "--goodput 'ttft:nan': it must"),
        (["--base-url", "http://x", "--metric-percentiles", "42"], "choose from 10,25"),
        (["--base-url", "http://x", "--extra-request-body", "[]"], "must be a JSON object"),
        (["--base-url", "http://x", "--dataset-name", "trace"], "needs --dataset-path"),
        (["--base-url", "http://me:secret@x"], "^--base-url: it may hold no user or password"),
        (["--base-url", "http://[bad"], "--base-url http://.bad: Invalid IPv6"),
        (["--base-url", "http://x:port"], "--base-url http://x:port: Port could not"),
        (["--base-url", "http://"], "must begin with http:// or https:// and a host"),
        (["--model", "tiny", "--server-options", "'"], '--server-options "\'": no closing quot'),
        ([*STREAMLESS, "--goodput", "ttft:5"], "--goodput ttft: answers that are not streamed"),
        ([*STREAMLESS, "--goodput", "e2el:9", "tpot:5"], "--goodput tpot: answers that are not"),
        ([*PACORE, "--goodput", "tpot:5"], "--goodput tpot: PaCoRe and `n` have none"),
        (["soak", "--base-url", "http://x"], "--base-url is not an option of soak"),
        (["engine", "--goodput", "ttft:1"], "--goodput is not an option of engine"),
    ],
)
def test_bad_options(words: list[str], message: str):
    """A traceback, an option that is ignored, or a server that is started for nothing."""
    with pytest.raises(InputError, match=message):
        main(["serve", *words])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "other"], "the server has no model 'other'; it has scripted"),
        (["--extra-request-body", '{"best_of": 5}'], "refused the warm-up: status 400: .*best_of"),
        (["--dataset-name", "pacore", "--backend", "openai"], "needs --backend openai-chat"),
    ],
)
def test_refused_by_the_server(server: Running, words: list[str], message: str):
    with pytest.raises(InputError, match=message):
        main(["serve", *base(server), *words])


class Other(BaseHTTPRequestHandler):
    """A server that has neither /v1/models nor /tokenize, and counts as it likes."""

    def do_GET(self):
        self.send_error(404)

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        if self.path != "/v1/completions":
            self.send_error(404)
            return
        usage = {"prompt_tokens": 5, "completion_tokens": 40}
        body = {"id": "1", "choices": [{"index": 0, "text": "yes"}], "usage": usage}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def other() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Other) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_another_server(other: str, capsys: pytest.CaptureFixture):
    """Tokens that are not those of the usage; a server without a list of models that is refused."""
    words = ["--base-url", other, "--backend", "openai"]
    with pytest.raises(InputError, match="lists no model: give its name with --model"):
        main(["serve", *words])
    words += ["--model", "m", "--num-prompts", "3", "--disable-stream"]
    code = main(["serve", *words, "--device", "cpu", "--json"])
    out, err = capsys.readouterr()
    assert code == 0
    assert "the server has no /tokenize" in err
    assert json.loads(out)["rows"][0]["output_tokens"] == 120


@pytest.mark.cli
def test_our_server(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    """A server that is left running, whose error is lost, or that wants a key."""
    monkeypatch.setenv("PACORE_API_KEY", "secret")
    with pytest.raises(InputError, match="did not start: 'no-such-model' is neither a preset"):
        main(["serve", "--model", "no-such-model"])
    lengths = ["--random-input-len", "9", "--random-output-len", "4", "--num-prompts", "3"]
    options = ["--server-options", "--kv-tokens 2048", "--threads", "1"]
    code, row, _ = measured(capsys, "--model", "tiny", *lengths, *options)
    assert code == 0
    assert row["output_tokens"] == 12
    assert not any("pacore_sched serve" in p.title for p in descendants(os.getpid()) if p.alive)


@pytest.mark.cli
def test_engine(capsys: pytest.CaptureFixture):
    """Forms that do not generate the same number of tokens; a share of the wrong form."""
    lengths = ["--random-input-len", "9", "--random-output-len", "4", "--num-prompts", "3"]
    words = ["engine", "--model", "tiny", *lengths, "--repeats", "2", "--threads", "1"]
    assert main(["serve", *words, "--device", "cpu", "--json"]) == 0
    engine, http = json.loads(capsys.readouterr().out)["rows"]
    assert (engine["impl"], http["impl"]) == ("engine", "HTTP")
    assert engine["failure"] is http["failure"] is None
    assert http["repeats"] == 2
    assert http["share_min"] <= http["share"] <= http["share_max"]
    show.serve([engine, http])
