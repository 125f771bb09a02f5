"""Journal lines that are read back: what an edited, merged or damaged journal may not hold."""

import json
import os
import stat
from dataclasses import fields, replace
from pathlib import Path

import pytest

from model.errors import InputError
from pacore_sched.answers import journal_lines
from pacore_sched.answers.journal import Journal
from pacore_sched.answers.journal_lines import Expected, RolloutResult
from pacore_sched.answers.problem_run import rollout_seed
from pacore_sched.sched.request import Rollout

SHA256 = "0123456789abcdef" * 4
EXPECTED = Expected(
    {"a": 0, "b": None, "photo": 2},
    (3, 2, 1),
    lambda *rollout: rollout_seed(7, *rollout),
    cancels=True,
)


def rollout(problem: str = "a", number: int = 0, index: int = 0, **changes: object) -> dict:
    result = RolloutResult(
        problem=problem,
        round=number,
        index=index,
        seed=rollout_seed(7, number, index, problem),
        prompt_tokens=7,
        finish_reason="stop",
        text="4 \u20ac",
        num_tokens=2,
        logprob=-1.5,
    )
    return result.record() | changes


def images(problem: str = "photo", count: int = 2) -> dict:
    return {"kind": "images", "problem": problem, "sha256": [SHA256] * count}


def answer(problem: str = "a", error: str | None = None) -> dict:
    return {"kind": "answer", "problem": problem, "answer": "4", "error": error}


def resumed(path: Path, *lines: dict, expected: Expected = EXPECTED) -> Journal:
    """A journal that holds `lines` and was opened to be resumed."""
    Journal(path, {"seed": 7}, expected, resume=False).begin().close()
    with open(path, "a") as file:
        file.writelines(f"{json.dumps(line)}\n" for line in lines)
    return Journal(path, {"seed": 7}, expected, resume=True).begin()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "results.journal.jsonl"


def test_what_a_run_writes_is_accepted(path: Path):
    """A journal that the run that wrote it cannot resume."""
    lines = [
        rollout(),
        images(),
        rollout("photo", index=2, finish_reason="cancelled", text="", num_tokens=0, logprob=0),
        answer("photo", "no room"),
        rollout("b", number=1, index=1, cut=[0, 2], dropped=[1], finish_reason="length"),
        rollout("photo", number=2, finish_reason="error", text="", logprob=-1e-9),
        answer("photo"),
    ]
    journal = resumed(path, *lines)
    assert journal.rollouts == 4
    assert journal.results("b")[0].cut == (0, 2)
    assert journal.images("photo") == [SHA256] * 2
    assert journal.images("a") is None
    journal.close()


WRONG = [
    ([{"kind": "rollouts"}], "kind 'rollouts' must be one of rollout, images, answer"),
    ([{"kind": []}], "kind [] must be one of"),
    ([{"problem": "a"}], "kind None must be one of"),
    ([rollout(extra=1)], "a line of kind rollout has no key 'extra'"),
    ([rollout(tokens=[1, 2], logprobs=[-1.0, -1.0])], "has no key 'tokens'"),
    ([{k: v for k, v in rollout().items() if k != "cut"}], "cut is missing"),
    ([rollout(round=True)], "round True must be an integer, at least 0"),
    ([rollout(index=0.0)], "index 0.0 must be an integer"),
    ([rollout(num_tokens=-1)], "num_tokens -1 must be an integer, at least 0"),
    ([rollout(text=None)], "text None must be a string"),
    ([rollout(text="\ud800")], "must be a string of valid Unicode"),
    ([rollout(finish_reason="done")], "finish_reason 'done' must be one of stop, length, cance"),
    ([rollout(finish_reason=["stop"])], "finish_reason ['stop'] must be one of"),
    ([rollout(logprob=float("nan"))], "logprob nan must be a finite number"),
    ([rollout(logprob=float("-inf"))], "logprob -inf must be a finite number"),
    ([rollout(logprob=False)], "logprob False must be a finite number"),
    ([rollout("c")], "there is no problem 'c'"),
    ([answer("c")], "there is no problem 'c'"),
    ([rollout(problem=["a"])], "problem ['a'] must be a string"),
    ([rollout(finish_reason="error")], "text must be empty, as finish_reason is error"),
    ([rollout(finish_reason="cancelled")], "text must be empty, as finish_reason is cancelled"),
    ([rollout(), rollout(index=1, prompt_tokens=8)], "prompt_tokens, cut and dropped are (8, [],"),
    (
        [rollout(number=1, cut=[0]), rollout(number=1, index=1)],
        "other rollouts of round 1 of problem 'a' have (7, [0], [])",
    ),
    ([rollout(round=3)], "round 3 must be below 3, the number of rounds"),
    ([rollout(index=3)], "index 3 must be below 3, the round's width"),
    ([rollout(number=1, index=2)], "index 2 must be below 2, the round's width"),
    ([rollout(seed=5)], "seed 5 must be "),
    ([rollout(number=1, cut=[2, 0])], "cut [2, 0] must be a list of ascending integers"),
    ([rollout(number=1, dropped=[1, 1])], "dropped [1, 1] must be a list of ascending"),
    ([rollout(number=1, cut=[True])], "cut [True] must be a list of ascending"),
    ([rollout(number=1, cut=[3])], "cut [3] must be below 3, the messages that the round reads"),
    ([rollout(dropped=[0])], "dropped [0] must be below 0, the messages"),
    ([rollout(), rollout()], "rollout 0 of round 0 of problem 'a' is there already"),
    ([answer(), answer()], "problem 'a' has an answer already"),
    ([answer(error=0)], "error 0 must be a string or null"),
    ([rollout("photo")], "the hashes of the images of problem 'photo' must be before it"),
    ([images(), rollout()], "a rollout of problem 'photo' must follow"),
    ([images(), images()], "a rollout of problem 'photo' must follow"),
    (
        [images(count=1), rollout("photo")],
        "sha256 must have 2 elements, one per image file, and has 1",
    ),
    ([images() | {"sha256": [SHA256, SHA256.upper()]}], "must be a list of SHA-256"),
    (
        [images(), rollout("photo"), images(), rollout("photo", index=1)],
        "the images of problem 'photo' must be before its first rollout, and once",
    ),
]


def test_cancelled_without_need():
    """A cancelled rollout in a round that waits for all: too few would be left to run."""
    cancelled = rollout(finish_reason="cancelled", text="", cut=[], dropped=[])
    journal_lines.check_line(cancelled, EXPECTED)
    with pytest.raises(ValueError, match="every round waits for all its rollouts"):
        journal_lines.check_line(cancelled, replace(EXPECTED, cancels=False))


@pytest.mark.parametrize(("lines", "message"), WRONG)
def test_a_wrong_line(path: Path, lines: list[dict], message: str):
    """A traceback, a round with too many rollouts, or results of another run."""
    with pytest.raises(InputError) as caught:
        resumed(path, *lines)
    number = len(path.read_text().splitlines())
    text = str(caught.value)
    assert message in text
    assert f"{path}: line " in text
    assert text.endswith(": restore the file or choose another --out")
    assert len(text.removeprefix(str(path))) < 300
    assert number == 1 + len(lines)  # the journal is as it was


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": [1]}, "tokens must have 2 elements, as num_tokens says, and has 1"),
        ({"logprobs": [-1.0]}, "logprobs must have 2 elements, as num_tokens says, and has 1"),
        ({"tokens": [1, -1]}, "tokens [1, -1] must be a list of integers, at least 0"),
        (
            {"logprobs": [-1.0, float("nan")]},
            "logprobs [-1.0, nan] must be a list of finite numbers",
        ),
        ({"logprobs": "ab"}, "logprobs 'ab' must be a list of finite numbers"),
    ],
)
def test_wrong_tokens(path: Path, changes: dict, message: str):
    """Samples for training whose tokens and log-probabilities do not belong together."""
    kept = {"tokens": [1, 2], "logprobs": [-1.0, -0.5]}
    expected = replace(EXPECTED, tokens=True)
    resumed(path, rollout(**kept), expected=expected).close()
    path.unlink()
    with pytest.raises(InputError) as caught:
        resumed(path, rollout(**kept | changes), expected=expected)
    assert f"line 2 is not of this run: {message}" in str(caught.value)
    path.unlink()
    with pytest.raises(InputError, match="tokens is missing"):
        resumed(path, rollout(), expected=expected)


def test_a_journal_of_an_older_version(path: Path):
    """A traceback, or a list of keys that are missing, for a journal of another format."""
    path.write_text('{"kind": "header", "format": 1, "seed": 7}\n{"kind": "rollout"}\n')
    with pytest.raises(InputError) as caught:
        Journal(path, {"seed": 7}, EXPECTED, resume=True)
    assert "by another version of this program, in journal format 1 instead of 2" in str(
        caught.value
    )
    assert "start a new run with another --out" in str(caught.value)


def test_lines_nested_too_deeply(path: Path):
    """A RecursionError from a damaged line."""
    resumed(path).close()
    with open(path, "a") as file:
        file.write('{"a":' * 100_000 + f"\n{json.dumps(rollout())}\n")
    with pytest.raises(InputError, match="line 2 is damaged"):
        Journal(path, {"seed": 7}, EXPECTED, resume=True)


def test_a_write_of_images_that_was_cut_off(path: Path):
    """Hashes that are kept without the rollout that was written with them: a mended image would be
    refused, though no rollout has seen the other one."""
    journal = resumed(path, rollout(), images())
    assert journal.images("photo") is None
    journal.add([RolloutResult.of_record(rollout(index=1))])
    assert journal.images("a") is None
    other = ["f" * 64] * 2
    for index in range(2):
        result = RolloutResult.of_record(rollout("photo", index=index))
        journal.add([result], images=other)
    journal.close()
    assert path.read_text().count('"kind": "images"') == 1
    with Journal(path, {"seed": 7}, EXPECTED, resume=True).begin() as journal:
        assert journal.images("photo") == other
        assert len(journal.results("photo")) == 2


def test_a_journal_is_a_regular_file(path: Path):
    """Waiting for the writer of a FIFO, or reading /dev/zero until memory ends."""
    os.mkfifo(path)
    for file, kind in ((path, "pipe, socket or device"), (path.parent, "directory")):
        with pytest.raises(InputError, match=f"is a {kind}; it must be a file"):
            Journal(file, {}, EXPECTED, resume=True)
    assert stat.S_ISFIFO(path.stat().st_mode)


def test_an_unbegun_journal_leaves_no_file(path: Path):
    """A file left by a job that failed before it began, so that the next one is refused."""
    Journal(path, {}, EXPECTED, resume=False).close()
    assert not path.exists()


def test_settings_that_are_known_later(path: Path):
    """A difference in the second part of the header that is not noticed, or a key of it that is
    missing."""
    early, late = {"seed": 7}, {"dtype": "float32", "model": {"config.json": "1", "shard": "2"}}
    Journal(path, early, EXPECTED, resume=False).begin(late).close()
    Journal(path, early, EXPECTED, resume=True).begin(late).close()
    for changes, message in (
        ({"dtype": "bfloat16"}, "dtype 'float32', which is 'bfloat16' now"),
        ({"model": {"config.json": "1"}}, "model shard '2', which is None now"),
    ):
        journal = Journal(path, early, EXPECTED, resume=True)
        with journal, pytest.raises(InputError, match=message):
            journal.begin(late | changes)


def test_every_field_of_a_rollout_is_checked():
    """A field that is added to RolloutResult and not to the keys of a line."""
    keys = {field.name for field in fields(RolloutResult)}
    assert keys == set(journal_lines._FIELDS["rollout"]) | set(journal_lines._TOKEN_FIELDS)
    reasons = Rollout.__doc__ or ""
    assert all(f'"{reason}"' in reasons for reason in journal_lines.FINISH_REASONS)
