"""`python -m pacore_sched batch` and `sample`: results, mistakes, and resuming after a kill."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from model.step3vl import Step3VL
from model.terminal import run_command
from pacore_sched.__main__ import main
from pacore_sched.answers import journal as journal_module
from pacore_sched.answers.journal import Journal
from pacore_sched.answers.problem_run import rollout_seed
from pacore_sched.cli import jobs
from tests.support import ROOT

TINY = ["--model", "tiny", "--max-tokens", "8", "--kv-tokens", "4096"]
QUESTIONS = [{"question": "Who?"}, {"id": "when", "question": "When?"}, {"question": "Why?"}]


class Call:
    """The command in this process, on a file of questions in `folder`."""

    def __init__(
        self, folder: Path, patch: pytest.MonkeyPatch, capture: pytest.CaptureFixture
    ) -> None:
        self.folder, self._patch, self._capture = folder, patch, capture
        self.questions, self.out = folder / "questions.jsonl", folder / "results.jsonl"
        self.journal = folder / "results.journal.jsonl"
        self.command = "batch"
        self.ask(*QUESTIONS)

    def ask(self, *lines: object) -> None:
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        self.questions.write_text("\n".join(texts))

    def arguments(self, *more: str, out: Path | None = None) -> list[str]:
        paths = [str(self.questions), "--out", str(out or self.out)]
        widths = ["--widths", "3"] if self.command == "batch" else ["--n", "3"]
        return ["pacore_sched", self.command, *paths, *widths, *TINY, *more]

    def __call__(self, *more: str, out: Path | None = None) -> tuple[int, str, str]:
        """(exit code, stdout, stderr)"""
        self._patch.setattr(sys, "argv", self.arguments(*more, out=out))
        with pytest.raises(SystemExit) as exit:
            run_command(main)
        return exit.value.code, *self._capture.readouterr()

    def results(self, out: Path | None = None) -> list[dict]:
        return [json.loads(line) for line in (out or self.out).read_text().splitlines()]


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Call:
    return Call(tmp_path, monkeypatch, capsys)


def test_results(call: Call):
    """A missing question or rollout, another order, or a changed key of the public format."""
    code, out, err = call("--widths", "3,2", "--seed", "7")
    assert (code, err) == (0, "")
    assert "3 of 3 problems ended, 0 of them failed; 18 rollouts" in out
    results = call.results()
    assert [result["id"] for result in results] == ["1", "when", "3"]
    for result in results:
        assert set(result) == {"id", "answer", "failed", "error", "rounds"}
        assert (result["failed"], result["error"]) == (False, None)
        assert [len(round_["rollouts"]) for round_ in result["rounds"]] == [3, 2, 1]
        for number, round_ in enumerate(result["rounds"]):
            assert round_["prompt_tokens"] > 0
            for index, rollout in enumerate(round_["rollouts"]):
                assert set(rollout) == {"text", "tokens", "seed", "finish_reason"}
                assert rollout["seed"] == rollout_seed(7, number, index, result["id"])
                assert 1 <= rollout["tokens"] <= 8
        last = result["rounds"][-1]["rollouts"][0]["text"]
        assert result["answer"] == last.rpartition("</think>")[2]


def test_json(call: Call):
    """Anything but one document on stdout, or wrong counts in it."""
    code, out, err = call("--json")
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert document["problems"] == document["ended"] == 3
    assert (document["failed"], document["rollouts"], document["resumed_rollouts"]) == (0, 12, 0)
    rollouts = [r for result in call.results() for round_ in result["rounds"] for r in
                round_["rollouts"]]  # fmt: skip
    assert document["tokens"] == sum(rollout["tokens"] for rollout in rollouts)
    assert document["tokens_per_second"] == pytest.approx(document["tokens"] / document["seconds"])
    assert (document["out"], document["journal"]) == (str(call.out), str(call.journal))
    assert document["preemptions"] == 0
    assert document["kv_tokens_read_unshared"] > document["kv_tokens_read"] > 0


def test_a_result_depends_on_its_question_alone(call: Call):
    """A result that depends on other questions, on the policy, or on how many rollouts run."""
    call()
    whole = {result["id"]: result for result in call.results()}
    call.ask(QUESTIONS[1], {"question": "Where?"})
    for options in (
        ["--max-running", "2"],
        ["--policy", "one-at-a-time"],
        ["--kv-tokens", "960"],
        ["--speculate", "8"],
    ):
        other = call.folder / f"{options[1]}.jsonl"
        assert call(*options, out=other)[0] == 0
        assert call.results(other)[0] == whole["when"]


def test_an_invalid_question_fails_alone(call: Call):
    """A malformed line, an empty question, a duplicate id, a missing or broken image, or a prompt
    beyond the context that fails without line number and reason, or that changes other answers."""
    call()
    expected = call.results()
    photo = call.folder / "photo.png"
    Image.effect_noise((640, 300), 60).convert("RGB").save(photo)
    (call.folder / "broken.png").write_bytes(b"not an image")
    wrong = [
        ("{", "line 4: not JSON"),
        ({"question": " "}, "line 5: the question is empty"),
        ({"id": "when", "question": "When?"}, "line 6: id 'when' is already used by line 2"),
        ({"question": "How many?", "image": "cats.png"}, "line 7: no image file 'cats.png'"),
        ({"question": "How many?", "image": "broken.png"}, "line 8: "),
        ({"question": "x" * 9000}, "line 9: the prompt has"),
    ]
    photo_question = {"id": "photo", "question": "How many?", "image": "photo.png"}
    call.ask(*QUESTIONS, *(line for line, _ in wrong), photo_question)
    out = call.folder / "others.jsonl"
    code, _, err = call(out=out)
    assert code == 1
    results = call.results(out)
    assert results[:3] == expected
    for result, (_, reason) in zip(results[3:9], wrong, strict=True):
        assert result["failed"]
        assert result["error"].startswith(reason)
        assert (result["answer"], result["rounds"]) == ("", [])
        assert f"failed: {result['error']}" in err.splitlines()
    assert "broken.png" in results[7]["error"]
    assert (results[9]["id"], results[9]["failed"]) == ("photo", False)
    assert err.count("\n") == len(wrong)


def test_many_failures_are_not_all_shown(call: Call):
    """A terminal flooded with errors, or an output that lacks some of them."""
    call.ask(*["{"] * 30, {"question": "Who?"})
    code, _, err = call()
    assert code == 1
    assert err.count("\n") == jobs.SHOWN_FAILURES + 1
    assert err.endswith("failed: 20 more\n")
    assert sum(result["failed"] for result in call.results()) == 30


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
    with Journal(call.journal, _header_of(call), resume=False):
        pass
    before = call.journal.read_bytes()
    code, _, err = call("--resume", *options)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert call.journal.read_bytes() == before


def test_the_journal_holds_the_models_sampling_settings(call: Call):
    """A header without the values of omitted options: the run would be resumed after a change of
    generation_config.json, or not resumed with the same values as explicit options."""
    checkpoint = call.folder / "checkpoint"
    Step3VL.from_preset("tiny").save_pretrained(checkpoint)
    generation = checkpoint / "generation_config.json"
    generation.write_text('{"temperature": 0.5, "top_k": 9}')
    options = ["--model", str(checkpoint), "--top-p", "0.75"]
    assert call(*options)[0] == 0
    header = json.loads(call.journal.read_text().splitlines()[0])
    assert (header["temperature"], header["top_k"], header["top_p"]) == (0.5, 9, 0.75)
    generation.write_text('{"temperature": 2}')
    code, _, err = call("--resume", *options)
    assert (code, "temperature 0.5, which is 2 now" in err) == (2, True)
    assert call("--resume", *options, "--temperature", "0.5", "--top-k", "9")[0] == 0


def test_the_chat_template_is_chosen_by_name_or_file(call: Call, monkeypatch: pytest.MonkeyPatch):
    """An ignored --chat-template, a name that is not found without saying which there are, or a
    run that is resumed with another template."""
    checkpoint = call.folder / "checkpoint"
    Step3VL.from_preset("tiny").save_pretrained(checkpoint)
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    named = [
        {"name": "short", "template": template},
        {"name": "long", "template": "long " + template},
    ]
    (checkpoint / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    file = call.folder / "mine.jinja"
    file.write_text(template)
    call.ask({"question": "Who?"})
    model = ["--model", str(checkpoint), "--chat-template"]
    monkeypatch.chdir(call.folder)  # where a folder has the name of a template
    Path("short").mkdir()
    assert call(*model, "short")[0] == 0
    (result,) = call.results()
    assert result["rounds"][0]["prompt_tokens"] == len("Who?")
    assert call("--resume", *model, str(file))[0] == 0  # the same text
    code, _, err = call("--resume", *model, "long")
    assert (code, "chat_template_sha256" in err) == (2, True)
    for choice, message in (
        ("best", "there is no such file, and the chat templates of .*checkpoint are: long, short"),
        (str(call.folder), "there is no such file, and the chat templates of"),
        ("best.jinja", "best.jinja: there is no such file"),
    ):
        code, _, err = call(*model, choice, out=call.folder / "other.jsonl")
        assert (code, err.count("\n"), bool(re.search(message, err))) == (2, 1, True)
    code, _, err = call(*model[:2], out=call.folder / "other.jsonl")
    assert (code, "choose one with --chat-template: long, short" in err) == (2, True)


def _header_of(call: Call) -> dict:
    """The journal header of a run with default options."""
    out = call.folder / "for_header.jsonl"
    assert call(out=out)[0] == 0
    first = json.loads(out.with_suffix(".journal.jsonl").read_text().splitlines()[0])
    return {key: value for key, value in first.items() if key not in ("kind", "format")}


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


def test_samples(call: Call):
    """Samples for RL that lack a token's id or log-probability, or are equal to each other."""
    call.command = "sample"
    code, _, err = call()
    assert (code, err) == (0, "")
    results = call.results()
    assert [result["id"] for result in results] == ["1", "when", "3"]
    for result in results:
        assert set(result) == {"id", "failed", "error", "prompt_tokens", "samples"}
        assert len(result["samples"]) == 3
        assert len({tuple(sample["tokens"]) for sample in result["samples"]}) == 3
        for index, sample in enumerate(result["samples"]):
            assert set(sample) == {"text", "tokens", "logprobs", "seed", "finish_reason"}
            assert sample["seed"] == rollout_seed(0, 0, index, result["id"])
            assert len(sample["tokens"]) == len(sample["logprobs"]) <= 8
            assert all(logprob <= 0 for logprob in sample["logprobs"])


def test_log_probabilities_of_samples(call: Call):
    """Log-probabilities that are not of the distribution that tokens are drawn from, though that is
    the default and promised; or an option that changes the tokens, or nothing."""
    call.command = "sample"

    def samples(*options: str) -> tuple[list[list[int]], list[list[float]]]:
        out = call.folder / f"{len(list(call.folder.iterdir()))}.jsonl"
        assert call(*options, out=out)[0] == 0
        drawn = [sample for result in call.results(out) for sample in result["samples"]]
        return [sample["tokens"] for sample in drawn], [sample["logprobs"] for sample in drawn]

    tokens, certain = samples("--top-k", "1")
    assert str(certain) == str([[0.0] * len(sample) for sample in tokens])
    same, raw = samples("--top-k", "1", "--logprobs", "raw")
    assert same == tokens and max(map(max, raw)) < 0
    assert samples("--temperature", "1") == samples("--temperature", "1", "--logprobs", "raw")


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
    with Journal(call.journal, _header_of(call), resume=False):
        pass
    before = call.journal.read_bytes()
    code, _, err = call(*options)
    assert (code, err.count("\n"), message in err) == (2, 1, True)
    assert call.journal.read_bytes() == before


def test_fp8_kv(call: Call):
    """--kv-dtype fp8 that fails, or that changes the seeds."""
    assert call("--kv-dtype", "fp8")[0] == 0
    fp8, other = call.results(), call.folder / "other.jsonl"
    assert call(out=other)[0] == 0
    assert not any(result["failed"] for result in fp8)
    assert [r["rounds"][0]["rollouts"][0]["seed"] for r in fp8] == [
        r["rounds"][0]["rollouts"][0]["seed"] for r in call.results(other)
    ]


def test_synthesis_at_m_of_n(call: Call):
    """Ignoring --min-messages, or an output without the cancelled rollouts."""
    assert call("--min-messages", "2", "--max-tokens", "40")[0] == 0
    reasons = [
        [rollout["finish_reason"] for rollout in result["rounds"][0]["rollouts"]]
        for result in call.results()
    ]
    assert all(len(round_) == 3 for round_ in reasons)
    assert any("cancelled" in round_ for round_ in reasons)


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--widths", "0"], "widths '0' must be integers from 1 to 65536"),
        (["--min-messages", "0"], "at least one message"),
        (["--policy", "best"], "unknown policy 'best'"),
        (["--policy", "oracle"], "knows lengths beforehand"),
        (["--max-running", "0"], "--max-running must be at least 1"),
        (["--kv-tokens", "0"], "--kv-tokens must be at least 1"),
        (["--stop", ""], "a stop string is empty"),
        (["--out", "nowhere/results.jsonl"], "there is no folder nowhere"),
        (["--out", "."], "--out '.' is not a file name"),
        (
            ["--kv-tokens", "99999999999999"],
            "not enough memory for the KV of 99999999999999 tokens",
        ),
        (["--template", "nowhere.jinja"], "nowhere.jinja"),
        (["--kv-dtype", "fp4"], "invalid choice: 'fp4'"),
    ],
)
def test_mistakes(call: Call, options: list[str], message: str):
    """A mistake without one line on stderr and exit code 2, or that leaves a new file."""
    code, out, err = call(*options)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert [path.name for path in call.folder.iterdir()] == ["questions.jsonl"]


def test_a_missing_question_file(call: Call):
    """A traceback instead of an error with exit code 2."""
    call.questions.unlink()
    code, _, err = call()
    assert code == 2
    assert "No such file" in err


def test_the_journal_can_be_read_during_the_run(call: Call, monkeypatch: pytest.MonkeyPatch):
    """Answers that are written only when all problems have ended."""
    seen, note = [], Journal.add_answer

    def look(self: Journal, *ending: object) -> None:
        note(self, *ending)
        lines = [json.loads(line) for line in call.journal.read_text().splitlines()]
        seen.append(sum(line["kind"] == "answer" for line in lines))

    monkeypatch.setattr(Journal, "add_answer", look)
    assert call()[0] == 0
    assert seen == [1, 2, 3]


@pytest.mark.cli
def test_a_command_loads_only_its_own_modules():
    """Importing torch-heavy modules for commands that need no model, such as --help."""
    script = "import sys, pacore_sched.__main__; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    loaded = done.stdout.split()
    assert "pacore_sched.__main__" in loaded
    assert not {"model.step3vl", "pacore_sched.engine.engine", "pacore_sched.cli.simulate"} & {
        *loaded
    }
