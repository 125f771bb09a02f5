"""`--rope-scaling`: a model that answers beyond the length it was trained for."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from model.config import TINY
from model.process.run import run_command
from model.step3vl import Step3VL
from model.weights.random_init import random_init
from pacore_sched.__main__ import main
from tests.support.job_call import Call

YARN = '{"rope_type": "yarn", "factor": 4, "attention_factor": 1}'
CONTEXT = 128


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a context of 128 tokens."""
    path = tmp_path_factory.mktemp("short") / "checkpoint"
    config = replace(TINY, vision=None, decoder=replace(TINY.decoder, max_positions=CONTEXT))
    model = Step3VL(config, load_tokenizer=lambda: Step3VL.from_preset("tiny").tokenizer)
    random_init(model.checkpoint_tensors(), seed=0)
    model.save_pretrained(path)
    return path


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Run a command in this process; returns (exit code, stdout, stderr)."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["pacore_sched", *arguments])
        with pytest.raises(SystemExit) as exit:
            run_command(main)
        return exit.value.code, *capsys.readouterr()

    return call


@pytest.mark.parametrize("more", [[], ["--kv-dtype", "fp8"]])
def test_ask_reads_beyond_the_trained_length(run, checkpoint: Path, more: list[str]):
    """Guards the way from the option to the engine: a prompt and messages longer than the model's
    context are answered, and the synthesis gets all messages."""
    question = "What is in this text? " * 10  # a token per byte
    options = ["--model", str(checkpoint), "--widths", "3", "--max-tokens", "40", *more, "--json"]
    code, _, err = run("ask", question, *options)
    assert code == 2
    assert "the context is 128" in err
    code, out, err = run("ask", question, *options, "--rope-scaling", YARN)
    assert code == 0, err
    result = json.loads(out)
    synthesis = result["rounds"][-1]
    assert CONTEXT < len(question) < synthesis["prompt_tokens"] <= 4 * CONTEXT


def test_a_resumed_run_has_the_same_scaling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """Guards results against a mixture of rollouts of two rotations."""
    call = Call(tmp_path, monkeypatch, capsys)
    assert call("--rope-scaling", YARN)[0] == 0
    assert call("--resume", "--rope-scaling", YARN)[0] == 0
    for other in ([], ["--rope-scaling", YARN.replace("4", "2")]):
        code, _, err = call("--resume", *other)
        assert (code, "was started with rope_scaling" in err) == (2, True)


def test_simulate_plans_for_the_longer_context(run):
    """Guards the simulator's context: more messages fit into the synthesis, which is longer."""
    options = ["--workload", "math", "--policy", "fcfs", "--seeds", "1", "--problems", "1"]
    options += ["--model", "tiny", "--widths", "64", "--jobs", "1", "--json"]
    rows = []
    for more in ([], ["--rope-scaling", '{"rope_type": "yarn", "factor": 2}']):
        code, out, err = run("simulate", *options, *more)
        assert code == 0, err
        rows += json.loads(out.splitlines()[-1])["rows"]
    short, long = rows
    assert long["makespan_s"] > short["makespan_s"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("yarn", "'yarn' is not a JSON object such as"),
        ("[1]", "'[1]' is not a JSON object"),
        ('{"factor": 2}', "rope_scaling.rope_type is None; it must be linear, llama3 or yarn"),
        ('{"rope_type": "longrope"}', "rope_scaling.rope_type 'longrope' is not implemented"),
        ('{"rope_type": "yarn", "factor": 0}', "rope_scaling.factor is 0; it must be a number"),
    ],
)
@pytest.mark.parametrize("command", ["ask", "simulate"])
def test_mistakes(run, command: str, text: str, message: str):
    """Guards one line for each mistake."""
    words = ["Hi", "--model", "tiny"] if command == "ask" else ["--problems", "1"]
    code, _, err = run(command, *words, "--rope-scaling", text)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
