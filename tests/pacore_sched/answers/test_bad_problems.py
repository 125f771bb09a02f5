"""One bad problem: whatever is raised for it, at any stage, is its error and nothing else's."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from model.errors import InputError
from model.vision.image import Views
from pacore_sched.answers import problem_run
from pacore_sched.answers.live import Answer
from pacore_sched.answers.pacore import Pacore
from pacore_sched.answers.problem_run import Problem
from pacore_sched.answers.rounds import SynthesisTemplate
from pacore_sched.sched.prefix_tree import PrefixTree
from pacore_sched.sched.request import Batch, Rollout, SampledTokens
from tests.pacore_sched.answers.hashed_pacore import (
    by_problem,
    hashed,
    is_idle,
    questions,
    with_image,
)

BAD = "a bad question"


class Panic(BaseException):
    """Like pyo3_runtime.PanicException, which tokenizers raises: no Exception."""


ERRORS = [
    RecursionError("maximum recursion depth exceeded"),
    MemoryError(),
    AssertionError("two\nlines"),
    UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed"),
    torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20 GiB"),
    Panic("index out of bounds"),
]


class Features(SimpleNamespace):
    """Images that are encoded, or fail to be, or are given up."""

    error: BaseException | None = None
    cancelled = False

    def ready(self) -> bool:
        return not self.error

    def release(self) -> None:
        self.cancelled = True


class Stages:
    """A Pacore in which one stage of the problem BAD fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stage: str, error: BaseException) -> None:
        self.pacore = hashed(ahead=True)
        self.encoded: list[Features] = []
        self._error, self._patch = error, monkeypatch
        self.problem = Problem([{"role": "user", "content": BAD}], id="bad")
        engine = self.pacore.engine
        monkeypatch.setattr(engine.executor, "encode", self._encode)
        if stage in ("load", "encode", "encoding", "segment"):
            image = {"type": "image"}, {"type": "text", "text": BAD}
            self.problem = replace(
                self.problem, messages=[{"role": "user", "content": image}], load=self._load
            )
        self._stage = stage
        self._wrap(
            engine.executor, "segment", lambda *args, **named: stage == "segment" and args[1:]
        )
        self._wrap(engine, "text", lambda rollout: stage == "text" and self._is_bad(rollout))
        self._wrap(engine, "submit", lambda *_, problem, **__: stage == "submit" and problem == 1)
        self._wrap(problem_run, "build_prompt", self._prompt_fails)
        self._wrap(problem_run, "round_messages", self._template_fails)

    def run(self, **options: Callable) -> dict[str, Answer]:
        first, *others = questions(3)
        return by_problem(self.pacore.answers([first, self.problem, *others], **options))

    def _wrap(self, owner: object, name: str, fails: Callable[..., object]) -> None:
        function = getattr(owner, name)

        def failing(*args: object, **named: object) -> object:
            if fails(*args, **named):
                raise self._error
            return function(*args, **named)

        self._patch.setattr(owner, name, failing)

    def _load(self) -> list[SimpleNamespace]:
        if self._stage == "load":
            raise self._error
        return [SimpleNamespace(newlines=(False,), all=())]

    def _encode(self, views: list, salt: str) -> Features:
        if self._stage == "encode":
            raise self._error
        self.encoded.append(Features(error=self._error if self._stage == "encoding" else None))
        return self.encoded[-1]

    def _is_bad(self, rollout: Rollout) -> bool:
        return rollout.group.problem == 1 and rollout.group.round == 1

    def _prompt_fails(self, messages: list, *_: object, **__: object) -> bool:
        later = BAD in str(messages) and len(str(messages)) > 200
        return BAD in str(messages) and (
            self._stage == "prompt" or (self._stage == "later prompt" and later)
        )

    def _template_fails(self, messages: list, *_: object, **__: object) -> bool:
        return self._stage == "template" and BAD in str(messages)


EARLY = ("load", "prompt", "encode", "encoding", "segment", "submit")
LATE = ("template", "later prompt", "text")


WITH_IMAGE = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": BAD}]}]


def broken_image() -> list[Views]:
    raise InputError("birds.png is no image")


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (Problem([{"role": "user", "content": "x" * 9000}], id="bad"), "the context is 8192"),
        (Problem(WITH_IMAGE, broken_image, id="bad"), "birds.png is no image"),
        (Problem(WITH_IMAGE, id="bad"), "image parts in the messages: 1, images given: 0"),
        (Problem([{"role": "user", "content": 5}], id="bad"), "a string or a list of parts"),
        (Problem([{"role": "system", "content": "x"}], id="bad"), "no user message"),
    ],
)
def test_a_problem_fails_alone(problem: Problem, reason: str):
    """A failed problem that gives no reason, keeps pages or changes other answers."""
    pacore = hashed()
    answers = by_problem(pacore.answers([*questions(2), problem]))
    bad = answers.pop("bad")
    assert reason in bad.error
    assert (bad.text, bad.rounds) == ("", ())
    assert answers == by_problem(hashed().answers(questions(2)))
    assert is_idle(pacore.engine)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("stage", [*EARLY, *LATE])
def test_any_error_at_any_stage(stage: str, error: BaseException, monkeypatch: pytest.MonkeyPatch):
    """A job that ends with a traceback; rounds that are lost; other problems' texts that change;
    KV, work or images that stay in the engine."""
    stages = Stages(monkeypatch, stage, error)
    answers = stages.run()
    bad = answers.pop("bad")
    prefix = "the images cannot be encoded: " if stage == "encoding" else ""
    assert bad.error.startswith(f"{prefix}unexpected {type(error).__name__}")
    assert " ".join(str(error).split()) in bad.error or isinstance(error, UnicodeEncodeError)
    assert bad.error.isprintable()
    assert len(bad.rounds) == (0 if stage in EARLY else 1)
    stages.pacore.engine.step()  # one may be in flight
    assert is_idle(stages.pacore.engine)
    assert not stages.pacore.engine.scheduler.prompts.segments
    assert all(features.cancelled for features in stages.encoded)
    monkeypatch.undo()
    assert answers == by_problem(hashed().answers(questions(3)))


def test_samples_that_fail_fail_alone(monkeypatch: pytest.MonkeyPatch):
    """A prompt that counts as failed although one of its samples succeeded, or the reverse."""
    pacore = hashed((3,), synthesis=False)
    launch = pacore.engine.executor.launch

    def broken(tree: PrefixTree, batch: Batch) -> SampledTokens:
        sampled = launch(tree, batch)
        failed = [rollout.index in bad for rollout in batch.sampled]
        tokens = [-1 if f else t for f, t in zip(failed, sampled.tokens, strict=True)]
        return sampled._replace(tokens=tokens)

    monkeypatch.setattr(pacore.engine.executor, "launch", broken)
    for bad, error in (({0}, False), ({0, 1, 2}, True)):
        (answer,) = pacore.answers(questions(1))
        assert [o.finish_reason == "error" for o in answer.rounds[0].rollouts] == [
            index in bad for index in range(3)
        ]
        assert bool(answer.error) == error


def test_a_synthesis_that_fails_fails_alone():
    """A template that fails on one problem's messages, and ends the whole job or loses the rounds
    that had ended."""
    source = "{{ original_prompt }}{% if '1?' in original_prompt %}{{ 1 // 0 }}{% endif %}"
    pacore = hashed(template=SynthesisTemplate("template t", source))
    answers = by_problem(pacore.answers(questions(3)))
    errors = {name: answer.error for name, answer in answers.items()}
    reason = "template t failed: integer division or modulo by zero"
    assert errors == {"p0": None, "p1": reason, "p2": None}
    assert [len(round_.rollouts) for round_ in answers["p1"].rounds] == [3]
    assert is_idle(pacore.engine)


@pytest.mark.parametrize("stage", ["template", "text"])
def test_a_stop_is_no_error_of_a_problem(stage: str, monkeypatch: pytest.MonkeyPatch):
    """Ctrl-C that becomes one problem's error while the run goes on, or keeps its images' KV."""
    stages = Stages(monkeypatch, stage, KeyboardInterrupt())
    stages.problem = with_image(BAD)
    with pytest.raises(KeyboardInterrupt):
        stages.run()
    stages.pacore.engine.step()
    assert is_idle(stages.pacore.engine)
    assert [features.cancelled for features in stages.encoded] == [True]


def test_what_concerns_the_run_ends_it(monkeypatch: pytest.MonkeyPatch):
    """A journal that cannot be written, or a broken engine, as one problem's error."""

    def fail(*_: object) -> None:
        raise InputError("disk full")

    pacore = hashed()
    with pytest.raises(InputError, match="disk full"):
        list(pacore.answers(questions(3), on_rollout=fail))
    assert is_idle(pacore.engine)
    monkeypatch.setattr(pacore.engine.executor, "launch", fail)
    with pytest.raises(InputError, match="disk full"):
        list(pacore.answers(questions(3)))


def test_an_iterable_of_problems_that_fails():
    """A thread that goes on loading images after the run has ended."""
    begun = threading.Event()

    def slowly() -> list:
        begun.set()
        time.sleep(0.2)
        return []

    def arriving() -> Iterator[Problem]:
        yield replace(with_image(BAD), load=slowly)
        assert begun.wait(20)
        raise InputError("disk full")

    with pytest.raises(InputError, match="disk full"):
        list(hashed().answers(arriving()))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("arrivals")]


@pytest.mark.parametrize("stage", LATE)
def test_an_answer_keeps_the_rounds_that_ended(stage: str, monkeypatch: pytest.MonkeyPatch):
    """A library's user who loses all rollouts because the synthesis failed."""
    stages = Stages(monkeypatch, stage, TypeError("no text"))
    list(stages.pacore.answers(questions(1)))  # the bad problem is number 0 below
    monkeypatch.setattr(stages, "_is_bad", lambda rollout: rollout.group.round == 1)
    answer = stages.pacore.answer(stages.problem.messages)
    assert "unexpected TypeError: no text" in answer.error
    assert [len(round_.rollouts) for round_ in answer.rounds] == [3]
    with pytest.raises(InputError, match="unexpected TypeError: no text"):
        Stages(monkeypatch, "prompt", TypeError("no text")).pacore.answer(stages.problem.messages)


@contextmanager
def prompts(monkeypatch: pytest.MonkeyPatch, before: Callable[[str], None]):
    """Calls `before` with the text of every prompt that is built."""
    build = problem_run.build_prompt

    def building(messages: list, *args: object, **named: object) -> list[int]:
        before(messages[0]["content"])
        return build(messages, *args, **named)

    with monkeypatch.context() as patch:
        patch.setattr(problem_run, "build_prompt", building)
        yield


def test_decoding_goes_on_while_a_long_question_is_tokenised(monkeypatch: pytest.MonkeyPatch):
    """An engine that stands still for 20 s while a question of 10 MB arrives."""
    monkeypatch.setattr(problem_run, "QUICK", 10)
    others_ended = threading.Event()
    long = Problem([{"role": "user", "content": "x" * 11}], id="long")

    def before(text: str) -> None:
        if text == "x" * 11:
            assert others_ended.wait(20), "the loop waited for a prompt"

    pacore = hashed((2,))
    with prompts(monkeypatch, before):
        answers = {}
        for answer in pacore.answers([*questions(2), long, *questions(3)[2:]]):
            answers[answer.problem] = answer
            if len(answers) == 2:
                others_ended.set()
    assert list(answers)[:2] in (["p0", "p1"], ["p1", "p0"])
    assert [answer.error for answer in answers.values()] == [None] * 4


def test_short_questions_start_in_the_same_step_in_every_run(monkeypatch: pytest.MonkeyPatch):
    """A run of texts alone whose batches, and so the last bits of logits, depend on how fast a
    thread builds prompts."""
    taken = threading.Event()
    next_round = problem_run.ProblemRun.next_round

    def take(run: problem_run.ProblemRun) -> object:
        if run.number == 1:
            taken.set()
        return next_round(run)

    monkeypatch.setattr(problem_run.ProblemRun, "next_round", take)
    pacore: Pacore = hashed()
    with prompts(monkeypatch, lambda text: text != "1?" or taken.wait(20)):
        list(pacore.answers(questions(2)))
    first = pacore.engine.executor.launched[0]
    assert len({chunk.owner for chunk in first.chunks}) == 2  # both prompts
