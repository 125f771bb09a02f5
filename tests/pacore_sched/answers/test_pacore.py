"""PaCoRe on the engine: the prompts of each round, shared KV, and independence of problems.

Tests of tokens use the tiny model; tests of problems, rounds and rollouts use a fake model whose
tokens are hashes.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.config import TINY
from model.errors import InputError
from model.step3vl import Step3VL
from model.text.prompt import build_prompt
from model.vision.image import Views
from pacore_sched.answers import problem_run
from pacore_sched.answers.journal_lines import RolloutResult
from pacore_sched.answers.live import Answer
from pacore_sched.answers.pacore import Pacore, engine_for
from pacore_sched.answers.problem_run import Problem, rollout_seed
from pacore_sched.answers.rounds import compact, round_messages
from pacore_sched.sched.policy import ORACLES, POLICIES
from pacore_sched.sched.request import Sampling
from tests.pacore_sched.answers.hashed_pacore import (
    HASHES,
    SAMPLING,
    by_problem,
    hashed,
    is_idle,
    questions,
    with_image,
)

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many?"}]},
]
COUNT = [{"role": "user", "content": "Count."}]


@pytest.fixture(scope="module")
def tiny() -> Step3VL:
    return Step3VL.from_preset("tiny", seed=1)


@pytest.fixture(scope="module")
def photo() -> Views:
    generator = torch.Generator().manual_seed(0)
    image, crops = (
        torch.randint(0, 256, (*shape, 3), generator=generator, dtype=torch.uint8)
        for shape in ((168, 168), (2, 112, 112))
    )
    return Views(image, crops, newlines=(False, False))


def pacore_on(tiny: Step3VL, widths: list[int], sampling: Sampling = SAMPLING, **options) -> Pacore:
    return Pacore(tiny, engine_for(tiny, kv_tokens=16384), widths, sampling, **options)


def test_rollouts_equal_generate_on_each_rounds_prompt(tiny: Step3VL, photo: Views):
    """A wrong prompt, seed or token in any round, compared with the model's own loop."""
    answer = pacore_on(tiny, [3, 2], seed=4).answer(MESSAGES, [photo])
    assert [len(round_.rollouts) for round_ in answer.rounds] == [3, 2, 1]
    messages = MESSAGES
    for number, round_ in enumerate(answer.rounds):
        ids = build_prompt(messages, tiny.tokenizer, TINY, [photo])
        assert round_.prompt_tokens == len(ids)
        for index, result in enumerate(round_.rollouts):
            assert (result.round, result.index) == (number, index)
            assert result.seed == rollout_seed(4, number, index)
            options = {"max_tokens": 12, "temperature": 1.0, "seed": result.seed}
            assert list(result.tokens) == tiny.generate(ids, [photo], **options)
            assert result.num_tokens == len(result.tokens) == len(result.logprobs)
            assert result.logprob == sum(result.logprobs)
        unfinished = [f"[It was not finished.]\n{result.text}" for result in round_.rollouts]
        messages = round_messages(MESSAGES, unfinished)
    assert answer.text == compact(answer.rounds[-1].rollouts[0].text)


def test_images_are_prefilled_once(tiny: Step3VL, photo: Views, monkeypatch: pytest.MonkeyPatch):
    """System prompt and image prefilled again in each round, or tokens that sharing changes."""
    shared = pacore_on(tiny, [3])
    answer = shared.answer(MESSAGES, [photo])
    prompts = [round_.prompt_tokens for round_ in answer.rounds]
    prefilled = shared.engine.scheduler.counts.prefilled
    head = sum(prompts) - 2 - prefilled  # a prompt's last token is in the leaves
    assert head > 2 * (2 + TINY.vision.crop_tokens) + 2 + TINY.vision.image_tokens
    assert shared.prefix_tokens_saved == 2 * (prompts[0] - 1) + head
    assert is_idle(shared.engine)

    monkeypatch.setattr(problem_run, "image_head_length", lambda *_: 0)
    separate = pacore_on(tiny, [3])
    assert _texts(separate.answer(MESSAGES, [photo])) == _texts(answer)
    assert separate.engine.scheduler.counts.prefilled == sum(prompts) - 2


def test_images_after_the_head(tiny: Step3VL, photo: Views):
    """An image that follows text and gets the first image's embeddings."""
    other = replace(photo, image=255 - photo.image, crops=photo.crops // 2)
    parts = [{"type": "image"}, {"type": "text", "text": "or"}, {"type": "image"}]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": "?"}]}]
    (result,) = pacore_on(tiny, []).answer(messages, [photo, other]).rounds[0].rollouts
    ids = build_prompt(messages, tiny.tokenizer, TINY, [photo, other])
    options = {"max_tokens": 12, "temperature": 1.0, "seed": result.seed}
    assert list(result.tokens) == tiny.generate(ids, [photo, other], **options)
    assert list(result.tokens) != tiny.generate(ids, [photo, photo], **options)


def test_every_round_has_the_tools(tiny: Step3VL):
    """A synthesis that cannot call what the first round could."""
    tools = [{"type": "function", "function": {"name": "count"}}]
    (answer,) = pacore_on(tiny, [2]).answers([Problem(COUNT, tools=tools)])
    unfinished = [f"[It was not finished.]\n{result.text}" for result in answer.rounds[0].rollouts]
    for round_, messages in zip(
        answer.rounds, (COUNT, round_messages(COUNT, unfinished)), strict=True
    ):
        ids = build_prompt(messages, tiny.tokenizer, TINY, tools=tools)
        assert round_.prompt_tokens == len(ids)
        assert len(ids) > len(build_prompt(messages, tiny.tokenizer, TINY))


def test_many_problems_at_once(tiny: Step3VL, photo: Views):
    """An answer that depends on other problems, with and without images; seeds shared by ids."""
    problems = [
        Problem(MESSAGES, lambda: [photo], id="photo"),
        Problem(COUNT, id="count"),
        Problem([{"role": "user", "content": "Why?"}], id="why"),
    ]
    together = pacore_on(tiny, [3, 2])
    answers = {answer.problem: answer for answer in together.answers(problems)}
    assert is_idle(together.engine)
    for problem in problems:
        (alone,) = pacore_on(tiny, [3, 2]).answers([problem])
        assert _texts(answers[problem.id]) == _texts(alone)
    seeds = {o.seed for answer in answers.values() for r in answer.rounds for o in r.rollouts}
    assert len(seeds) == 3 * (3 + 2 + 1)


def test_a_rollout_does_not_depend_on_the_width(tiny: Step3VL):
    """Rollout 1 of a round of 2 that differs from rollout 1 of a round of 4."""
    narrow, wide = (pacore_on(tiny, [width], seed=9).answer(COUNT) for width in (2, 4))
    assert _texts(narrow)[0] == _texts(wide)[0][:2]


def test_a_text_only_model():
    """Questions refused because a model without a vision tower takes no images, not even none."""
    model = Step3VL.from_preset("tiny", seed=1)
    model.config, model.vision = replace(model.config, vision=None), None
    (answer,) = pacore_on(model, [2]).answers([Problem(COUNT)])
    assert answer.error is None
    assert len(answer.rounds) == 2


def test_no_widths_is_one_rollout(tiny: Step3VL):
    """Sequential mode with anything but the unmodified question and one generation."""
    pacore = pacore_on(tiny, [])
    answer = pacore.answer(COUNT)
    assert [len(round_.rollouts) for round_ in answer.rounds] == [1]
    assert pacore.prefix_tokens_saved == 0


def test_a_failed_rollout_is_reported():
    """A rollout with NaN logits that passes on a message or becomes the answer."""
    broken = Step3VL.from_preset("tiny", seed=1)
    broken.decoder.norm.fill_(float("nan"))
    answer = pacore_on(broken, [2]).answer(COUNT)
    assert "not finite" in answer.error
    assert answer.text == ""
    for round_ in answer.rounds:
        assert {(o.finish_reason, o.text) for o in round_.rollouts} == {("error", "")}


def test_limits_are_named(tiny: Step3VL):
    """A prompt beyond the context, or KV beyond memory, that is not refused before any work."""
    long = [{"role": "user", "content": "x" * 9000}]
    pacore = pacore_on(tiny, [2])
    with pytest.raises(InputError, match="the context is 8192"):
        pacore.answer(long)
    assert is_idle(pacore.engine)
    small = Pacore(tiny, engine_for(tiny, kv_tokens=512), [2], Sampling(max_tokens=8000))
    with pytest.raises(InputError, match="8000 need .* pages of 64 tokens, but there are 8:"):
        small.answer(COUNT)


def test_rollouts_fill_the_context_and_no_more():
    """A max_tokens that is not limited to the context left by the prompt."""
    near = [{"role": "user", "content": "x" * 8100}]
    pacore = Pacore(HASHES, hashed().engine, [], Sampling(max_tokens=1000, ignore_eos=True))
    (round_,) = pacore.answer(near).rounds
    assert round_.prompt_tokens + round_.rollouts[0].num_tokens == TINY.decoder.max_positions


def test_a_stop_string_ends_rollouts(tiny: Step3VL):
    """A text with its stop string, or other tokens before it, or tokens after it."""
    sampling = Sampling(max_tokens=40)
    whole = pacore_on(tiny, [], sampling).answer(COUNT).rounds[0].rollouts[0]
    stop = whole.text[10:13]
    cut = pacore_on(tiny, [], replace(sampling, stop=(stop,))).answer(COUNT).rounds[0].rollouts[0]
    assert cut.finish_reason == "stop"
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.tokens == whole.tokens[: cut.num_tokens]
    assert cut.num_tokens < whole.num_tokens


@settings(max_examples=40)
@given(
    policy=st.sampled_from([name for name in POLICIES if name not in ORACLES]),
    ahead=st.booleans(),
    pages=st.integers(150, 400),
    max_running=st.integers(1, 16),
    ended=st.integers(0, 30),
)
def test_known_results_are_not_run_again(policy, ahead, pages, max_running, ended):
    """A resumed run, under any policy and amount of memory, that runs a finished rollout again or
    gives other answers than the whole run."""
    before: list[RolloutResult] = []
    whole = by_problem(hashed().answers(questions(5), on_rollout=before.append))
    assert len(before) == 5 * 6
    kept, again = before[:ended], []
    pacore = hashed(policy=policy, ahead=ahead, pages=pages, max_running=max_running)
    resumed = pacore.answers(
        questions(5),
        known=lambda id: [result for result in kept if result.problem == id],
        on_rollout=again.append,
    )
    assert by_problem(resumed) == whole
    assert len(again) == 30 - ended
    assert is_idle(pacore.engine)


def test_rollouts_arrive_as_they_end():
    """A rollout reported twice or not in order of ending; an answer not ordered by index."""
    seen: list[RolloutResult] = []
    (answer,) = hashed((6,)).answers(questions(1), on_rollout=seen.append)
    first = [result for result in seen if result.round == 0]
    assert sorted(o.index for o in first) == list(range(6))
    assert [o.num_tokens for o in first] == sorted(o.num_tokens for o in first)
    assert seen[-1] == answer.rounds[1].rollouts[0]
    assert [o.index for o in answer.rounds[0].rollouts] == list(range(6))


def test_policies_see_problems_and_rounds():
    """Groups whose problem or round number, by which policies order them, is wrong."""
    pacore = hashed((2, 2))
    answers = by_problem(pacore.answers(questions(3)))
    assert len(answers) == 3
    groups = {r.group for batch in pacore.engine.executor.launched for r in batch.sampled}
    pairs = sorted((group.problem, group.round) for group in groups)
    assert pairs == [(problem, number) for problem in range(3) for number in range(3)]


def test_answers_arrive_as_problems_end():
    """Answers that are held back until later problems have ended."""
    pacore, running = hashed(max_running=3), []
    for _ in pacore.answers(questions(8)):
        running.append(len(pacore.engine.scheduler.groups))
    assert len(running) == 8
    assert running[0] > 0


def test_problems_are_read_when_there_is_room(monkeypatch: pytest.MonkeyPatch):
    """Reading all problems and their images before the first answer."""
    monkeypatch.setattr("pacore_sched.answers.live.AHEAD", 12)
    taken, unanswered = [], []

    def arriving():
        for problem in questions(40):
            taken.append(problem)
            yield problem

    for ended, _ in enumerate(hashed(max_running=4).answers(arriving())):
        unanswered.append(len(taken) - ended)
    assert len(taken) == 40
    # In the engine with one rollout each, with loading images, and between the two.
    assert max(unanswered) <= 12 + 4 + 2


def test_synthesis_at_m_of_n():
    """A round that waits for all its rollouts, or cancelled rollouts that pass on a message or are
    missing from the answer."""
    (answer,) = hashed((5,), min_messages=2).answers(questions(1))
    reasons = [result.finish_reason for result in answer.rounds[0].rollouts]
    assert reasons.count("cancelled") == 3
    cancelled = [o for o in answer.rounds[0].rollouts if o.finish_reason == "cancelled"]
    assert {o.text for o in cancelled} == {""}
    assert [o.finish_reason for o in answer.rounds[1].rollouts] != ["cancelled"]
    with pytest.raises(InputError, match="at least one message"):
        hashed(min_messages=0)


def test_a_round_cut_off_between_its_end_and_its_cancellations():
    """A round that runs again although the journal has enough messages, because it lacks the
    cancelled rollouts."""
    before: list[RolloutResult] = []
    pacore = hashed((5,), min_messages=2)
    (whole,) = pacore.answers(questions(1), on_rollout=before.append)
    kept = [result for result in before if result.finish_reason != "cancelled"][:2]
    again: list[RolloutResult] = []
    (resumed,) = hashed((5,), min_messages=2).answers(
        questions(1), known=lambda id: kept, on_rollout=again.append
    )
    assert [result.round for result in again] == [1]
    assert resumed.text == whole.text
    pairs = zip(resumed.rounds[0].rollouts, whole.rounds[0].rollouts, strict=True)
    assert all((a.index, a.seed, a.text) == (b.index, b.seed, b.text) for a, b in pairs)


def test_a_resumed_round_waits_for_what_is_missing():
    """A resumed round that waits for all `min_messages` although the journal has one of them."""
    before: list[RolloutResult] = []
    options = {"min_messages": 2, "max_running": 1}
    (whole,) = hashed((5,), **options).answers(questions(1), on_rollout=before.append)
    (resumed,) = hashed((5,), **options).answers(questions(1), known=lambda id: before[:1])
    reasons = [result.finish_reason for result in resumed.rounds[0].rollouts]
    assert reasons.count("cancelled") == 3
    assert resumed.text == whole.text


def test_samples_without_a_synthesis():
    """A synthesis or an answer text where only samples were requested."""
    (answer,) = hashed((4,), synthesis=False).answers(questions(1))
    assert [len(round_.rollouts) for round_ in answer.rounds] == [4]
    assert (answer.text, answer.error) == ("", None)


def test_images_that_load_slowly():
    """Ending the run because there is no other work while the only problem's images still load."""

    def slowly() -> list:
        time.sleep(0.2)
        return [SimpleNamespace(newlines=(False,), all=())]

    (answer,) = hashed().answers([replace(with_image("How many?"), load=slowly)])
    assert (answer.problem, answer.error) == ("photo", None)


@pytest.mark.parametrize("ahead", [False, True])
def test_stopping_early_leaves_an_idle_engine(ahead: bool):
    """Pages or work left in the engine after leaving the loop or an exception from a callback."""
    pacore = hashed(ahead=ahead)

    def stop_at(count: int) -> Callable[[object], None]:
        seen = []

        def stop(what: object) -> None:
            seen.append(what)
            if len(seen) == count:
                raise KeyboardInterrupt

        return stop

    for callbacks in ({"on_rollout": stop_at(7)}, {"on_step": stop_at(5)}):
        with pytest.raises(KeyboardInterrupt):
            list(pacore.answers([with_image("How many?"), *questions(6)], **callbacks))
        assert not pacore.engine.scheduler.groups
        pacore.engine.step()  # one may be in flight
        assert is_idle(pacore.engine)
    answers = pacore.answers([*questions(6), with_image("How many?")])
    next(answers)
    answers.close()
    assert not pacore.engine.scheduler.groups
    pacore.engine.step()
    assert is_idle(pacore.engine)
    assert by_problem(pacore.answers(questions(2))) == by_problem(hashed().answers(questions(2)))


def test_seeds_differ_between_problems():
    """Equal seeds for ids that look like parts of other seeds' names."""
    seeds = {
        rollout_seed(seed, number, index, problem)
        for seed in (0, 1)
        for number in (0, 1)
        for index in (0, 1)
        for problem in ("", "1", "0/1", "1/0")
    }
    assert len(seeds) == 2 * 2 * 2 * 4


def _texts(answer: Answer) -> list[list[str]]:
    return [[result.text for result in round_.rollouts] for round_ in answer.rounds]
