"""PaCoRe problems that were cut short: what is kept of them, and what comes of it."""

import json
import threading
import time
from pathlib import Path

import pytest

from pacore_sched.sched.prefix_tree import PrefixTree
from pacore_sched.sched.request import Batch, Rollout, SampledTokens
from pacore_sched.serve.saved import SavedProblems
from tests.pacore_sched.serve.serving import (
    HI,
    answering,
    client,
    endless,
    running,
    scripted,
    slowly,
    wait_for,
)


def pacore_body(**fields: object) -> dict:
    return {
        "model": "scripted",
        "messages": HI,
        "pacore": {"widths": [3], "events": True},
        **fields,
    }


@pytest.mark.parametrize("seed", [5, None])
@pytest.mark.parametrize("end", ["drain", "leave"])
def test_a_problem_that_was_cut_short(tmp_path: Path, seed: int | None, end: str):
    """Finished rollouts that are lost, run again, or given to another request."""

    def uneven(rollout: Rollout) -> str:
        if rollout.group.round == 0 and rollout.index == 2 and slow:
            return endless(rollout)
        return answering(rollout)

    slow, body = [True], pacore_body() | ({} if seed is None else {"seed": seed})
    saved = SavedProblems(tmp_path, "scripted")
    with running(scripted(uneven), saved=saved, drain_s=0.1) as server:
        slowly(server)
        if end == "drain":
            thread = threading.Thread(target=server.post, args=("/v1/chat/completions", body))
            thread.start()
        else:
            held = client(server, **body)
            held.__enter__()
        counted = "pacore:rollouts_total{"
        wait_for(
            lambda: server.get("/metrics").body.decode().count('finish_reason="stop"'), counted
        )
        wait_for(lambda: any(len(job.results) == 2 for job in server.service.jobs), "two results")
        if end == "drain":
            server.server.handle_exit(15, None)
            thread.join()
        else:
            held.__exit__(None, None, None)
            server.wait_idle()
    (file,) = tmp_path.glob("*.journal.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["header", "rollout", "rollout"]
    slow.clear()
    with running(scripted(uneven), saved=SavedProblems(tmp_path, "scripted")) as server:
        other = server.post("/v1/chat/completions", pacore_body(seed=6)).json
        assert other["pacore"]["rounds"][0]["rollouts"][0]["seed"] != lines[1]["seed"]
        before = server.service.engine.stats.generated
        reply = server.post("/v1/chat/completions", body).json
        rollouts = reply["pacore"]["rounds"][0]["rollouts"]
        assert [rollouts[line["index"]]["seed"] for line in lines[1:]] == [
            line["seed"] for line in lines[1:]
        ]
        generated = server.service.engine.stats.generated - before
        assert generated < sum(rollout["tokens"] for rollout in rollouts)
        assert reply["choices"][0]["message"]["content"] == "all of them"
        server.wait_idle()
        assert not list(tmp_path.iterdir()), "the file of an answered problem"


def test_a_failed_answer_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A failure that is saved, and comes back with every further try."""
    saved = SavedProblems(tmp_path, "scripted")
    with running(scripted(answering), saved=saved) as server:
        body = pacore_body(seed=1)
        executor = server.service.engine.executor
        launch = executor.launch

        def nan(tree: PrefixTree, batch: Batch) -> SampledTokens:
            tokens = launch(tree, batch)
            return tokens._replace(tokens=[-1] * len(tokens.tokens))

        executor.launch = nan
        assert server.post("/v1/chat/completions", body).status == 500
        assert not list(tmp_path.iterdir())
        executor.launch = launch
        assert server.post("/v1/chat/completions", body).status == 200


def test_a_client_that_leaves_while_its_file_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A request that can never be resumed, because it is thought to run still."""
    saved = SavedProblems(tmp_path, "scripted")
    reading = threading.Event()

    def slow(*_: object) -> object:
        reading.set()
        time.sleep(0.2)
        return 1 / 0

    with running(scripted(answering), saved=saved) as server:
        with monkeypatch.context() as patch:
            patch.setattr(saved, "_read", slow)
            with client(server, **pacore_body(seed=1)):
                assert reading.wait(20)
        wait_for(lambda: not saved._running, "the end of the request")


def test_a_damaged_journal(tmp_path: Path):
    """A file that cannot be read: the problem begins again."""
    saved = SavedProblems(tmp_path, "scripted")
    with running(scripted(answering), saved=saved) as server:
        body = pacore_body(seed=1)
        with client(server, **body) as connection:
            server.service.engine.executor.step = lambda: time.sleep(0.01)
            wait_for(lambda: any(job.results for job in server.service.jobs), "a result")
            assert connection.sock
        server.wait_idle()
        (file,) = tmp_path.iterdir()
        file.write_bytes(b'{"kind": "header", "seed": 1}\nrubbish\n{}\n')
        assert server.post("/v1/chat/completions", body).status == 200
