"""PaCoRe over the engine on the tiny model: what each round is asked, and what is shared."""

import pytest
import torch

from model.config import TINY
from model.image import Views
from model.prompt import build_prompt
from model.step3vl import Step3VL
from model.terminal import InputError
from pacore_sched import pacore as pacore_module
from pacore_sched.engine import Sampling
from pacore_sched.pacore import Pacore, rollout_seed
from pacore_sched.rounds import compact, round_messages

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many?"}]},
]
SAMPLING = Sampling(max_tokens=12)


@pytest.fixture(scope="module")
def tiny() -> Step3VL:
    return Step3VL.from_preset("tiny", seed=1)


@pytest.fixture(scope="module")
def photo() -> Views:
    generator = torch.Generator().manual_seed(0)
    return Views(
        image=torch.randn(3, 168, 168, generator=generator),
        crops=torch.randn(2, 3, 112, 112, generator=generator),
        newlines=(False, False),
    )


def test_rounds_ask_what_they_should(tiny: Step3VL, photo: Views):
    """Every rollout equals the model's own loop on its round's prompt, image included."""
    answer = Pacore(tiny, [3, 2], SAMPLING, seed=4).answer(MESSAGES, [photo])
    assert [len(round_.rollouts) for round_ in answer.rounds] == [3, 2, 1]
    asked = MESSAGES
    for number, round_ in enumerate(answer.rounds):
        ids = build_prompt(asked, tiny.tokenizer, TINY, [photo])
        assert round_.prompt_tokens == len(ids)
        for index, rollout in enumerate(round_.rollouts):
            assert rollout.seed == rollout_seed(4, number, index)
            options = {"max_tokens": 12, "temperature": 1.0, "seed": rollout.seed}
            assert rollout.tokens == tiny.generate(ids, [photo], **options)
        asked = round_messages(MESSAGES, round_.texts)
    assert answer.text == compact(answer.rounds[-1].texts[0])


def test_images_are_prefilled_once(tiny: Step3VL, photo: Views, monkeypatch: pytest.MonkeyPatch):
    """System prompt and image stay in the tree for all rounds, and sharing changes no token."""
    shared = Pacore(tiny, [3], SAMPLING)
    answer = shared.answer(MESSAGES, [photo])
    prompts = [round_.prompt_tokens for round_ in answer.rounds]
    prefilled = shared.engine.stats.prefilled
    head = sum(prompts) - prefilled
    assert head > 2 * (2 + TINY.vision.crop_tokens) + 2 + TINY.vision.image_tokens
    assert answer.prefix_tokens_saved == 2 * prompts[0] + head
    assert shared.engine.tree.free_pages == shared.engine.tree.num_pages

    monkeypatch.setattr(pacore_module, "image_head_length", lambda *_: 0)
    separate = Pacore(tiny, [3], SAMPLING)
    assert separate.answer(MESSAGES, [photo]).rounds[-1].texts == answer.rounds[-1].texts
    assert separate.engine.stats.prefilled == sum(prompts)


def test_rollouts_arrive_as_they_end(tiny: Step3VL):
    """The callback sees each rollout once, in order of ending; the answer holds all by index."""
    seen = []
    sampling = Sampling(max_tokens=200)
    messages = [{"role": "user", "content": "Count."}]
    answer = Pacore(tiny, [6], sampling).answer(
        messages, on_rollout=lambda number, rollout, text: seen.append((number, rollout.index))
    )
    first = [index for number, index in seen if number == 0]
    assert sorted(first) == list(range(6))
    lengths = [len(answer.rounds[0].rollouts[index].tokens) for index in first]
    assert lengths == sorted(lengths)
    assert len(set(lengths)) > 1
    assert seen[-1] == (1, 0)


def test_other_widths_leave_a_rollout_alone(tiny: Step3VL):
    """Rollout 1 of a round of 2 is rollout 1 of a round of 4."""
    messages = [{"role": "user", "content": "Count."}]
    narrow, wide = (Pacore(tiny, [width], SAMPLING, seed=9).answer(messages) for width in (2, 4))
    assert narrow.rounds[0].texts == wide.rounds[0].texts[:2]


def test_no_widths_is_one_rollout(tiny: Step3VL):
    """Sequential mode: the question unmodified, one generation."""
    messages = [{"role": "user", "content": "Count."}]
    answer = Pacore(tiny, [], SAMPLING).answer(messages)
    assert [len(round_.rollouts) for round_ in answer.rounds] == [1]
    assert answer.prefix_tokens_saved == 0


def test_a_failed_rollout_is_reported(tiny: Step3VL):
    """Logits of NaN end a rollout with a reason; it passes on no message, nor is it an answer."""
    broken = Step3VL.from_preset("tiny", seed=1)
    broken.decoder.norm.fill_(float("nan"))
    messages = [{"role": "user", "content": "Count."}]
    answer = Pacore(broken, [2], SAMPLING).answer(messages)
    assert answer.failed
    assert answer.text == ""
    for round_ in answer.rounds:
        assert {rollout.finish_reason for rollout in round_.rollouts} == {"error"}
    assert not Pacore(tiny, [2], SAMPLING).answer(messages).failed


def test_limits_are_named(tiny: Step3VL):
    """A prompt beyond the context, and KV beyond memory, end before any work with a reason."""
    long = [{"role": "user", "content": "x" * 9000}]
    pacore = Pacore(tiny, [2], SAMPLING)
    with pytest.raises(InputError, match="the context is 8192"):
        pacore.answer(long)
    assert pacore.engine.tree.free_pages == pacore.engine.tree.num_pages
    with pytest.raises(InputError, match="GB of KV.*lower the widths or max_tokens"):
        Pacore(tiny, [10**6], Sampling(max_tokens=8000))
    near = [{"role": "user", "content": "x" * 8150}]
    answer = Pacore(tiny, [], Sampling(max_tokens=1000, temperature=0.0)).answer(near)
    assert answer.rounds[0].prompt_tokens + len(answer.rounds[0].rollouts[0].tokens) <= 8192
