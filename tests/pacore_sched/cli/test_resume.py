"""Resuming `batch` and `sample`: after a kill, with other inputs, and what must not be touched."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from PIL import Image

from model.step3vl import Step3VL
from pacore_sched.answers import image_loader, images
from pacore_sched.answers import journal as journal_module
from pacore_sched.answers.journal import Journal
from tests.support import ROOT
from tests.support.job_call import QUESTIONS, Call

KILL = """
import os, signal, sys
from pacore_sched.answers import journal
from pacore_sched.__main__ import main

lines, write = 0, os.write

def dying(file, data):
    global lines
    lines += 1
    if lines <= {lines}:
        return write(file, data)
    write(file, data[: len(data) * {part} // 100])
    os.kill(os.getpid(), signal.SIGKILL)

journal.os.write = dying
sys.argv = {argv}
main()
"""


@pytest.mark.cli
@pytest.mark.parametrize(
    ("command", "points"), [("batch", ((2, 100), (3, 50))), ("sample", ((3, 50),))]
)
def test_killed_and_resumed(call: Call, command: str, points: tuple):
    """kill -9 at several points, also while a line is written: a resumed run whose output differs
    from an undisturbed one's, or that runs a finished rollout again."""
    call.command = command
    whole = call.folder / "whole.jsonl"
    assert call(out=whole)[0] == 0
    rollouts = 12 if command == "batch" else 9
    saved = 0
    for lines, part in points:  # whole lines written, and percent of the next one
        script = KILL.format(lines=lines, part=part, argv=call.arguments("--resume"))
        killed = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert not call.out.exists()
        lines = [json.loads(x) for x in call.journal.read_bytes().split(b"\n")[:-1]]
        now = sum(line["kind"] == "rollout" for line in lines)
        assert now >= saved
        saved = now
    assert 0 < saved < rollouts
    code, out, _ = call("--resume", "--json")
    assert code == 0
    document = json.loads(out)
    assert (document["resumed_rollouts"], document["rollouts"]) == (saved, rollouts)
    if command == "batch":
        assert call.out.read_bytes() == whole.read_bytes()
    assert _without_logprobs(call.results()) == _without_logprobs(call.results(whole))


def _without_logprobs(results: list[dict]) -> list[dict]:
    """Log-probabilities may round differently in other batches."""
    for result in results:
        for sample in result.get("samples", ()):
            sample["logprobs"] = len(sample["logprobs"])
    return results


def test_resuming_a_finished_run_changes_nothing(call: Call):
    """--resume of a finished run, or of none, that fails, generates tokens or changes a file."""
    assert call("--resume")[0] == 0
    before = call.out.read_bytes(), call.journal.read_bytes()
    code, out, _ = call("--resume", "--json")
    assert code == 0
    assert json.loads(out)["tokens"] == 0
    assert (call.out.read_bytes(), call.journal.read_bytes()) == before


def test_a_repaired_image_is_answered_on_resume(call: Call):
    """A problem that failed before its first rollout and is not tried again on resume."""
    call.ask({"question": "How many?", "image": "photo.png"}, *QUESTIONS)
    assert call()[0] == 1
    Image.effect_noise((640, 300), 60).convert("RGB").save(call.folder / "photo.png")
    code, out, _ = call("--resume", "--json")
    assert code == 0
    assert json.loads(out)["resumed_rollouts"] == 12
    assert not any(result["failed"] for result in call.results())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--widths", "4"], "widths [3], which is [4] now"),
        (["--seed", "1"], "seed 0, which is 1 now"),
        (["--temperature", "0.5"], "temperature 1.0, which is 0.5 now"),
        (["--max-tokens", "9"], "max_tokens 8, which is 9 now"),
        (["--stop", "x"], "stop [], which is ['x'] now"),
        (["--min-messages", "2"], "min_messages None, which is 2 now"),
        (["--kv-dtype", "fp8"], "kv_dtype None, which is 'fp8' now"),
    ],
)
def test_other_settings_are_not_resumed(call: Call, options: list[str], message: str):
    """Resuming with other settings, an error that does not name them, or a modified journal."""
    _begin(call)
    before = call.journal.read_bytes()
    code, _, err = call("--resume", *options)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert call.journal.read_bytes() == before


def test_the_journal_holds_the_models_sampling_settings(call: Call):
    """A header without the values of omitted options: a run that is resumed with other values or
    another generation_config.json, or not resumed with the same values as explicit options."""
    checkpoint = call.folder / "checkpoint"
    Step3VL.from_preset("tiny").save_pretrained(checkpoint)
    generation = checkpoint / "generation_config.json"
    generation.write_text('{"temperature": 0.5, "top_k": 9}')
    options = ["--model", str(checkpoint), "--top-p", "0.75"]
    assert call(*options)[0] == 0
    header = json.loads(call.journal.read_text().splitlines()[0])
    assert (header["temperature"], header["top_k"], header["top_p"]) == (0.5, 9, 0.75)
    code, _, err = call("--resume", *options, "--temperature", "2")
    assert (code, "temperature 0.5, which is 2.0 now" in err) == (2, True)
    assert call("--resume", *options, "--temperature", "0.5", "--top-k", "9")[0] == 0
    generation.write_text('{"temperature": 2}')
    code, _, err = call("--resume", *options)
    assert (code, "with model generation_config.json 'sha256" in err) == (2, True)


def _begin(call: Call) -> None:
    """Write the journal of a run that was killed before its first rollout ended."""
    out = call.folder / "for_header.jsonl"
    assert call(out=out)[0] == 0
    header = out.with_suffix(".journal.jsonl").read_text().splitlines(keepends=True)[0]
    call.journal.write_text(header)


def test_other_questions_are_not_resumed(call: Call):
    """Resuming with a changed question file."""
    call()
    call.ask(*QUESTIONS, {"question": "Where?"})
    code, _, err = call("--resume")
    assert code == 2
    assert "questions_sha256" in err


def test_nothing_is_overwritten(call: Call):
    """Overwriting an output or a journal, with or without --resume."""
    call.out.write_text("precious")
    code, _, err = call()
    assert (code, "choose another --out" in err) == (2, True)
    code, _, err = call("--resume")
    assert (code, "nothing to resume" in err) == (2, True)
    assert call.out.read_text() == "precious"
    call.out.unlink()
    assert call()[0] == 0
    before = call.journal.read_bytes()
    code, _, err = call()
    assert (code, "continue it with --resume" in err) == (2, True)
    assert call.journal.read_bytes() == before


def test_a_full_disk(call: Call, monkeypatch: pytest.MonkeyPatch):
    """A traceback or exit code 0 on a full disk, or a run that cannot be resumed afterwards."""
    writes, write = [], os.write

    def filling(file: int, data: bytes) -> int:
        writes.append(data)
        if len(writes) > 5:
            raise OSError(28, os.strerror(28))
        return write(file, data)

    with monkeypatch.context() as patch:
        patch.setattr(journal_module.os, "write", filling)
        code, out, err = call()
    assert (code, out) == (2, "")
    assert err.startswith("error: cannot write")
    assert "No space left on device" in err
    assert err.count("\n") == 1
    assert not call.out.exists()
    code, out, _ = call("--resume", "--json")
    assert code == 0
    assert json.loads(out)["resumed_rollouts"] >= 3
    whole = call.folder / "whole.jsonl"
    call(out=whole)
    assert call.out.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_by_the_user(call: Call, monkeypatch: pytest.MonkeyPatch, number: int):
    """Rollouts lost by Ctrl-C or SIGTERM, another exit code than 130, or no hint how to resume."""
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    add = Journal.add

    def stopping(self: Journal, results: list, **options: object) -> None:
        add(self, results, **options)
        if self.rollouts == 2:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Journal, "add", stopping)
    code, out, err = call("--json")
    assert code == 130
    document = json.loads(out)
    assert document["stopped"]
    assert 2 <= document["rollouts"] < 12
    assert "continue with the same command and --resume" in err
    assert not call.out.exists()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    monkeypatch.setattr(Journal, "add", add)
    assert call("--resume")[0] == 0
    whole = call.folder / "whole.jsonl"
    call(out=whole)
    assert call.out.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--logprobs", "both"], "invalid choice: 'both' (choose from 'raw', 'processed')"),
        (["--resume", "--logprobs", "raw"], "logprobs 'processed', which is 'raw' now"),
    ],
)
def test_log_probabilities_of_one_kind(call: Call, options: list[str], message: str):
    """An unknown kind, or a resumed file that would mix two, without one line that says so."""
    call.command = "sample"
    _begin(call)
    before = call.journal.read_bytes()
    code, _, err = call(*options)
    assert (code, err.count("\n"), message in err) == (2, 1, True)
    assert call.journal.read_bytes() == before


def test_cancelled_rollouts_are_listed_after_a_kill(call: Call):
    """Cancelled rollouts lost by a kill between a round's last message and their lines."""
    options = ["--min-messages", "2", "--max-tokens", "20"]
    assert call(*options)[0] == 0
    lines = call.journal.read_text().splitlines(keepends=True)
    cut = next(i for i, line in enumerate(lines) if '"finish_reason": "cancelled"' in line)
    call.journal.write_text("".join(lines[:cut]))
    for _ in range(2):  # their lines are written only once
        assert call("--resume", *options)[0] == 0
        for result in call.results():
            assert [len(round_["rollouts"]) for round_ in result["rounds"]] == [3, 1]
        journal = call.journal.read_text()
        assert journal.count('"kind": "rollout"') == 12


@pytest.mark.parametrize("name", ["results.jsonl", "results.journal.jsonl", "ckpt.gguf"])
def test_no_fifo_is_opened(call: Call, name: str):
    """Waiting for ever for the writer of a FIFO."""
    assert call()[0] == 0
    (call.folder / name).unlink(missing_ok=True)
    os.mkfifo(call.folder / name)
    model = ["--model", str(call.folder / name)] if name == "ckpt.gguf" else []
    code, _, err = call("--resume", *model)
    assert (code, err.count("\n")) == (2, 1)
    assert f"{name} is a pipe, socket or device; it must be a file" in err


def test_the_output_is_no_directory(call: Call):
    """A run whose output cannot replace a directory, which is noticed when all is done."""
    assert call()[0] == 0
    call.out.unlink()
    call.out.mkdir()
    code, _, err = call("--resume")
    assert (code, "results.jsonl is a directory; it must be a file" in err) == (2, True)
    call.out.rmdir()
    (call.folder / "results.jsonl.partial").mkdir()
    code, _, err = call("--resume")
    assert (code, "results.jsonl.partial is a directory; it must be a file" in err) == (2, True)
    assert "rollouts" not in err  # nothing had been run


def test_only_an_output_is_replaced(call: Call):
    """A file of the same stem, such as notes or the questions, that the output overwrites."""
    assert call()[0] == 0
    for name, text in (("results.md", "# Notes"), ("results.txt", '{"question": "Why?"}')):
        file = call.folder / name
        file.write_text(text)
        code, _, err = call("--resume", "--out", str(file))
        assert (code, f"{name} is not the output of such a run" in err) == (2, True)
        assert file.read_text() == text
    assert call("--resume")[0] == 0


def test_a_stop_before_the_first_step(call: Call, monkeypatch: pytest.MonkeyPatch):
    """Ctrl-C that is answered only after a step: not while problems start, whose rollouts are all
    known or whose images are loading."""
    for number in range(4):
        Image.new("RGB", (40, 30)).save(call.folder / f"{number}.png")
    call.ask({"question": "Alike?", "images": [f"{number}.png" for number in range(4)]})
    loaded, load, first = [], images.load_image, threading.Lock()

    def stopping(source: object) -> Image.Image:
        loaded.append(source)
        if not first.acquire(blocking=False):  # one of those that are read at the same time
            return load(source)
        handler = signal.getsignal(signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        while signal.getsignal(signal.SIGINT) is handler:  # the main thread has not run it yet
            # It may have begun to wait for this thread before it could: another signal wakes it.
            signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)
            time.sleep(1e-3)
        return load(source)

    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    with monkeypatch.context() as patch:
        patch.setattr(images, "load_image", stopping)
        patch.setattr(image_loader, "usable_cpus", lambda: 2)
        assert call()[0] == 130
    signal.signal(signal.SIGUSR1, before)
    assert len(loaded) < 4
    assert call("--resume")[0] == 0
    known, results = [], Journal.results

    def stopping_too(self: Journal, problem: str) -> list:
        known.append(problem)
        os.kill(os.getpid(), signal.SIGINT)
        return results(self, problem)

    call.ask(*QUESTIONS * 20)
    other = call.folder / "other.jsonl"
    assert call("--max-tokens", "1", out=other)[0] == 1
    monkeypatch.setattr(Journal, "results", stopping_too)
    assert call("--max-tokens", "1", "--resume", out=other)[0] == 130
    assert len(known) == 1
