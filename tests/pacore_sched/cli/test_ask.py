"""`python -m pacore_sched ask`: its JSON document, its text output, and one line per mistake."""

import json
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from kernels.runtime import dispatch
from model.config import SamplingConfig
from model.process.run import run_command
from model.step3vl import Step3VL
from model.terminal import Parser
from pacore_sched.__main__ import main
from pacore_sched.answers.journal_lines import RolloutResult
from pacore_sched.cli import options
from pacore_sched.cli.ask import print_rollout
from pacore_sched.sched.request import Sampling
from tests.support import ROOT

TINY = ["--model", "tiny", "--max-tokens", "8"]


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Run the command in this process; returns (exit code, stdout, stderr)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["pacore_sched", "ask", *arguments])
        with pytest.raises(SystemExit) as exit:
            run_command(main)
        return exit.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def photo(tmp_path: Path) -> str:
    path = tmp_path / "photo.png"
    Image.effect_noise((640, 300), 60).convert("RGB").save(path)
    return str(path)


def test_messages_that_do_not_fit_are_named(ask):
    """Messages that are shortened or left out without a word."""
    arguments = ["Hi", "--model", "tiny", "--max-tokens", "60", "--seed", "1"]
    arguments += ["--widths", "6", "--kv-tokens", "1024"]
    code, out, err = ask(*arguments, "--json")
    assert (code, err) == (0, "")
    first, last = json.loads(out)["rounds"]
    assert (first["cut"], first["dropped"]) == ([], [])
    assert last["cut"]
    assert last["dropped"]
    cut, dropped = (
        ", ".join(str(index + 1) for index in last[name]) for name in ("cut", "dropped")
    )
    line = f"messages {cut} without their beginnings; {dropped} left out"
    assert f"--- round 2's prompt, to fit: {line}\n" in ask(*arguments)[1]
    assert "to fit" not in ask(*arguments[:-2])[1]


def test_json(ask, photo: str):
    """Changed keys, which are a public interface, or a document that its seed does not fix."""
    arguments = ["How many?", *TINY, "--widths", "3,2", "--image", photo, "--json", "--seed", "5"]
    code, out, err = ask(*arguments)
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert [len(round_["rollouts"]) for round_ in document["rounds"]] == [3, 2, 1]
    for round_ in document["rounds"]:
        for rollout in round_["rollouts"]:
            assert set(rollout) == {"text", "tokens", "seed", "finish_reason"}
            assert 1 <= rollout["tokens"] <= 8
            assert rollout["finish_reason"] in ("stop", "length")
    assert document["tokens_per_second"] > 0
    assert document["error"] is None
    first, second, last = (round_["prompt_tokens"] for round_ in document["rounds"])
    assert document["prefix_tokens_saved"] > 2 * first + second
    again = json.loads(ask(*arguments)[1])
    assert again["rounds"] == document["rounds"]
    assert again["answer"] == document["answer"]
    other = json.loads(ask(*arguments[:-1], "6")[1])
    assert other["rounds"] != document["rounds"]


def test_text(ask):
    """A text output without a rollout, the answer, the speed, or what sharing saved."""
    code, out, _ = ask("Count.", *TINY, "--widths", "2")
    assert code == 0
    assert out.count("--- round 1, rollout") == 2
    assert "--- synthesis" in out
    assert "=== answer" in out
    summary = r"=== 3 rollouts, \d+ tokens in \d+\.\d s \(\d+\.\d tokens/s\)"
    assert re.fullmatch(summary, out.splitlines()[-2])
    assert "shared prompts" in out.splitlines()[-1]


def test_shown_texts_have_no_blank_ends(capsys: pytest.CaptureFixture):
    """Blank lines before or after a shown text, from line ends in the generated text."""
    rollout = RolloutResult(
        "", 0, 0, 0, 9, "stop", "\n<think>\nHm.\n</think>\n\nFour.\n\n", 9, -1.0
    )
    print_rollout(rollout, last=False)
    assert capsys.readouterr().out.splitlines() == [
        "--- round 1, rollout 1: 9 tokens, stop",
        "<think>",
        "Hm.",
        "</think>",
        "",
        "Four.",
        "    message: Four.",
    ]
    print_rollout(replace(rollout, text="Four.\n"), last=True)
    assert capsys.readouterr().out == "--- synthesis: 9 tokens, stop\nFour.\n"


@pytest.mark.parametrize(
    ("arguments", "sampling"),
    [
        ([], Sampling(512, 0.2, 5, 0.9)),
        (["--temperature", "1", "--top-p", "1"], Sampling(512, 1.0, 5, 1.0)),
        (["--temperature", "0", "--top-k", "0"], Sampling(512, 0.0, 0, 0.9)),
    ],
)
def test_options_override_the_models_sampling(arguments: list, sampling: Sampling):
    """An option, also one of 0, that is overridden by the model's sampling settings."""
    parser = Parser()
    options.add_sampling_options(parser)
    default = SamplingConfig(temperature=0.2, top_p=0.9, top_k=5)
    assert options.sampling_for(parser.parse_args(arguments), default) == sampling


@pytest.mark.cli
def test_the_readmes_question():
    """Noise instead of the right answer to the example in README.md, because SmolLM2 is not sampled
    with its model card's settings; control tokens in the output."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    example = re.search(r"pacore_sched (ask (?:.*\\\n)*.*)", readme)
    arguments = shlex.split(example[1].replace("\\\n", " "))[1:]
    assert arguments[0] == "What is the capital of France?"
    command = [sys.executable, "-m", "pacore_sched", "ask", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    answer = done.stdout.partition("=== answer\n")[2].partition("\n===")[0]
    assert "Paris" in answer
    assert "<|" not in done.stdout


def test_a_stop_string(ask):
    """Ignoring --stop, or a text that includes the stop string."""
    arguments = ["Count.", *TINY, "--widths", "", "--json"]
    text = json.loads(ask(*arguments)[1])["answer"]
    cut = json.loads(ask(*arguments, "--stop", text[3:5])[1])
    assert cut["answer"] == text[: text.index(text[3:5])]
    assert cut["rounds"][0]["rollouts"][0]["finish_reason"] == "stop"


def test_a_missing_answer_has_a_reason(ask, monkeypatch: pytest.MonkeyPatch):
    """Logits of NaN with exit code 0, or without the reason on stderr and in the document."""
    load = Step3VL.from_preset

    def broken(*arguments, **options) -> Step3VL:
        model = load(*arguments, **options)
        model.decoder.norm.fill_(float("nan"))
        return model

    monkeypatch.setattr(Step3VL, "from_preset", broken)
    code, out, err = ask("Count.", *TINY, "--widths", "2", "--json")
    assert (code, json.loads(out)["answer"]) == (1, "")
    assert "not finite" in json.loads(out)["error"]
    assert err == f"failed: {json.loads(out)['error']}\n"


def test_rounds_that_ended_are_shown(ask, tmp_path: Path):
    """Rollouts that are lost because the synthesis fails."""
    template = tmp_path / "t.jinja"
    template.write_text(
        "{{ original_prompt }}{{ ref_responses | join }}{{ 1 // (3 - ref_responses | length) }}"
    )
    code, out, err = ask("Count.", *TINY, "--widths", "3", "--json", "--template", str(template))
    report = json.loads(out)
    assert (code, report["answer"]) == (1, "")
    assert [len(round_["rollouts"]) for round_ in report["rounds"]] == [3]
    assert report["error"] == f"template {template} failed: integer division or modulo by zero"
    assert err == f"failed: {report['error']}\n"


def test_a_template(ask, tmp_path: Path):
    """Ignoring --template, or using it for another round than the synthesis."""
    template = tmp_path / "template.jinja"
    template.write_text("{{ original_prompt }}|{{ ref_responses | length }}")
    arguments = ["Count.", *TINY, "--widths", "2", "--json"]
    default = json.loads(ask(*arguments)[1])
    custom = json.loads(ask(*arguments, "--template", str(template))[1])
    assert custom["rounds"][0] == default["rounds"][0]
    assert custom["rounds"][1]["prompt_tokens"] < default["rounds"][1]["prompt_tokens"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["Count.", "--model", "tiniest"],
            "'tiniest' is neither a preset",
        ),
        (["Count.", *TINY, "--widths", "0"], "widths '0' must be integers from 1 to 65536"),
        (["Count.", *TINY, "--widths", "4,x"], "widths '4,x' must be integers from 1 to 65536"),
        (["Count.", *TINY, "--widths", "2.5"], "widths '2.5' must be integers from 1 to 65536"),
        (["Count.", *TINY, "--impl", "fast"], "impl 'fast'"),
        (["Count.", *TINY, "--impl", "triton", "--device", "cpu"], "impl 'triton'"),
        (["Count.", *TINY, "--device", "cuda:99"], "device 'cuda:99' cannot be used"),
        (["Count.", *TINY, "--device", "toaster"], "device 'toaster' cannot be used"),
        (["Count.", *TINY, "--device", "meta"], "device 'meta' cannot be used"),
        (["  ", *TINY], "the question is empty"),
        (["Count.", *TINY, "--image", "nowhere.png"], "nowhere.png"),
        (["Count.", *TINY, "--template", "nowhere.jinja"], "nowhere.jinja"),
        (["Count.", *TINY, "--max-tokens", "0"], "--max-tokens: '0' is not an integer from 1 to"),
        (["Count.", *TINY, "--temperature", "-1"], "'-1' is not a number from 0 to 1,000,000"),
        (["Count.", *TINY, "--temperature", "1e-39"], "1e-39 is neither 0 nor a number from 1e-6"),
        (["Count.", *TINY, "--top-p", "0"], "'0' is not a number above 0 and at most 1"),
        (["Count.", *TINY, "--stop", ""], "a stop string is empty"),
        (["Count.", *TINY, "--policy", "best"], "unknown policy 'best'"),
        (["Count.", *TINY, "--kv-tokens", "64"], "KV pages of 64 tokens, but there are 1:"),
        (["x" * 9000, *TINY], "the context is 8192"),
        ([], "required: question"),
    ],
)
def test_mistakes(ask, arguments: list[str], message: str, monkeypatch):
    """A mistake without one line on stderr and exit code 2, or with output on stdout."""
    monkeypatch.setattr(dispatch, "_interpreting", lambda: False)  # users run compiled Triton
    code, out, err = ask(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


def test_an_image_for_a_text_model(ask, photo: str):
    """Answering without looking at the image because SmolLM2 has no vision tower."""
    code, _, err = ask("What is this?", "--image", photo, "--max-tokens", "1")
    assert code == 2
    assert "takes no images" in err


@pytest.mark.cli
def test_as_a_process(tmp_path: Path):
    """A traceback for a corrupt image when the command runs as a process."""
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"not an image")
    command = [sys.executable, "-m", "pacore_sched", "ask", "What?", *TINY, "--image", str(bad)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert "bad.png" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_warning_is_one_line(ask, tmp_path: Path):
    """Guards against a source path and a line of code on the terminal, and a line per round."""
    model = Step3VL.from_preset("tiny")
    model.save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")  # without a template
    code, _, err = ask("Hi", "--model", str(tmp_path), "--widths", "2", "--max-tokens", "2")
    assert (code, err) == (
        0,
        "warning: tiny has no chat template: its prompts are written as ChatML\n",
    )
