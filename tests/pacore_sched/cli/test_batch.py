"""`python -m pacore_sched batch` and `sample`: results and mistakes."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from model.step3vl import Step3VL
from pacore_sched.answers.journal import Journal
from pacore_sched.answers.problem_run import rollout_seed
from pacore_sched.cli import batch, jobs
from tests.support import ROOT
from tests.support.job_call import QUESTIONS, Call


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
        (
            {"question": "How many?", "image": "cats.png"},
            "line 7: image cats.png cannot be",
        ),
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


def test_an_output_line_that_cannot_be_written_fails_alone(
    call: Call, monkeypatch: pytest.MonkeyPatch
):
    """A traceback at the end of a long run, because of one problem's line; or exit code 0."""
    line = batch.result_line

    def failing(question, result, rollouts):
        if question.id == "when" and rollouts:
            raise MemoryError
        return line(question, result, rollouts)

    monkeypatch.setattr(batch, "result_line", failing)
    code, _, err = call()
    assert code == 1
    failed = {result["id"]: result["error"] for result in call.results() if result["failed"]}
    assert list(failed) == ["when"]
    assert failed["when"].startswith("line 2: unexpected MemoryError (test_batch.py")
    assert err == f"failed: {failed['when']}\n"


def test_many_failures_are_not_all_shown(call: Call):
    """A terminal flooded with errors, or an output that lacks some of them."""
    call.ask(*["{"] * 30, {"question": "Who?"})
    code, _, err = call()
    assert code == 1
    assert err.count("\n") == jobs.SHOWN_FAILURES + 1
    assert err.endswith("failed: 20 more\n")
    assert sum(result["failed"] for result in call.results()) == 30


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
        ("best", "and the chat templates for .*checkpoint are: chatml, long, short"),
        (str(call.folder), "there is no such file, and the chat templates for"),
        ("best.jinja", "best.jinja: there is no such file"),
    ):
        code, _, err = call(*model, choice, out=call.folder / "other.jsonl")
        assert (code, err.count("\n"), bool(re.search(message, err))) == (2, 1, True)
    assert call(*model, "chatml", out=call.folder / "chatml.jsonl")[0] == 0
    (result,) = call.results(call.folder / "chatml.jsonl")
    assert result["rounds"][0]["prompt_tokens"] == len("<user\nWho?>\n<assistant\n")
    code, _, err = call(*model[:2], out=call.folder / "other.jsonl")
    assert (code, "choose one with --chat-template: long, short" in err) == (2, True)


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--widths", "0"], "widths '0' must be integers from 1 to 65536"),
        (["--min-messages", "0"], "--min-messages: '0' is not an integer from 1 to 65,536"),
        (["--policy", "best"], "unknown policy 'best'"),
        (["--policy", "oracle"], "knows lengths beforehand"),
        (["--stop", ""], "a stop string is empty"),
        (["--out", "nowhere/results.jsonl"], "there is no folder nowhere"),
        (["--out", "."], "--out '.' is not a file name"),
        (["--kv-tokens", "999999999"], "not enough memory for the KV of 999999999 tokens"),
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
