"""The engine: rollouts over a shared prompt node, their independence, and their pages."""

import pytest
import torch

from model.step3vl import Step3VL
from pacore_sched.engine import Engine, Rollout, Sampling
from pacore_sched.prefix_tree import OutOfPages

PROMPT = [*range(1, 71)]  # ends inside its second page
SAMPLING = Sampling(max_tokens=70)  # rollouts cross into a second page


@pytest.fixture(scope="module")
def tiny() -> Step3VL:
    return Step3VL.from_preset("tiny", seed=1)


def run(
    model: Step3VL, seeds: list[int], sampling: Sampling = SAMPLING, pages: int = 40
) -> dict[int, Rollout]:
    """Rollouts by seed; pages and holds are checked after every step and at the end."""
    engine = Engine(model, pages)
    prompt, hidden = engine.prefill(model.decoder.embed(torch.tensor(PROMPT)))
    done = {}
    steps = []

    def on_step(tokens: int) -> None:
        steps.append(tokens)
        engine.tree.check_integrity()

    for rollout in engine.decode(prompt, hidden, seeds, sampling, on_step):
        done[rollout.seed] = rollout
    engine.tree.check_integrity({prompt: 1})
    engine.tree.release(prompt)
    assert engine.tree.free_pages == pages
    assert sum(steps) == engine.stats.generated == sum(len(r.tokens) for r in done.values())
    return done


def test_a_rollout_does_not_depend_on_its_neighbours(tiny: Step3VL):
    """The same seed gives the same text alone, in any company and at any place in the batch."""
    together = run(tiny, [11, 12, 13, 14, 15])
    assert len({tuple(r.tokens) for r in together.values()}) == 5
    for seeds in ([13], [15, 11], [14, 12, 13]):
        for seed, rollout in run(tiny, seeds).items():
            assert rollout.tokens == together[seed].tokens
            assert rollout.logprobs == pytest.approx(together[seed].logprobs, abs=1e-5)


def test_ends(tiny: Step3VL):
    """An eos id ends a rollout and is its last token; otherwise max_tokens does."""
    eos = tiny.config.tokens.eos
    done = run(tiny, list(range(24))).values()
    assert {rollout.finish_reason for rollout in done} == {"stop", "length"}
    for rollout in done:
        assert not set(rollout.tokens[:-1]) & set(eos)
        if rollout.finish_reason == "stop":
            assert rollout.tokens[-1] in eos
        else:
            assert len(rollout.tokens) == SAMPLING.max_tokens


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_equals_generate(tiny: Step3VL, temperature: float):
    """The engine's batch and the model's own loop over one sequence say the same."""
    sampling = Sampling(max_tokens=30, temperature=temperature)
    expected = tiny.generate(PROMPT, max_tokens=30, temperature=temperature, seed=7)
    assert run(tiny, [7], sampling)[7].tokens == expected


def test_eager_says_the_same(tiny: Step3VL):
    """Every op at its definition: the fast forms change no text."""
    eager = Step3VL.from_preset("tiny", seed=1, impl="eager")
    sampling = Sampling(max_tokens=12)
    fast, slow = run(tiny, [1, 2, 3], sampling), run(eager, [1, 2, 3], sampling)
    assert [fast[seed].tokens for seed in (1, 2, 3)] == [slow[seed].tokens for seed in (1, 2, 3)]


def test_logprobs_are_the_models(tiny: Step3VL):
    """Log-probabilities of a rollout, against one forward over prompt and rollout."""
    rollout = run(tiny, [5], Sampling(max_tokens=10))[5]
    logits = tiny(PROMPT + rollout.tokens[:-1])[len(PROMPT) - 1 :]
    expected = logits.log_softmax(-1)[range(len(rollout.tokens)), rollout.tokens]
    assert rollout.logprobs == pytest.approx(expected.tolist(), abs=1e-4)


def test_stopping_early_frees_the_pages(tiny: Step3VL):
    """A caller that takes one rollout and leaves must not leak the others' pages."""
    engine = Engine(tiny, 40)
    prompt, hidden = engine.prefill(tiny.decoder.embed(torch.tensor(PROMPT)))
    rollouts = engine.decode(prompt, hidden, range(24), SAMPLING)
    next(rollouts)
    rollouts.close()
    engine.tree.check_integrity({prompt: 1})
    assert engine.tree.free_pages == 38


def test_too_few_pages(tiny: Step3VL):
    """Running out is an exception that leaves no page behind, in prefill and in decode."""
    engine = Engine(tiny, 3)
    with pytest.raises(OutOfPages):
        engine.prefill(torch.zeros(200, tiny.config.decoder.hidden))
    assert engine.tree.free_pages == 3
    prompt, hidden = engine.prefill(tiny.decoder.embed(torch.tensor(PROMPT)))
    with pytest.raises(OutOfPages):
        list(engine.decode(prompt, hidden, [1, 2], SAMPLING))
    engine.tree.release(prompt)
    assert engine.tree.free_pages == 3


def test_counts_of_shared_reads(tiny: Step3VL):
    """What sharing saves is counted from the plan: the prompt once per step, not per rollout."""
    engine = Engine(tiny, 40)
    prompt, hidden = engine.prefill(tiny.decoder.embed(torch.tensor(PROMPT)))
    sampling = Sampling(max_tokens=3, temperature=0.0)
    done = list(engine.decode(prompt, hidden, [1, 2, 3, 4], sampling))
    assert [len(rollout.tokens) for rollout in done] == [3] * 4  # greedy meets no eos here
    own = 4 * (1 + 2)  # after the first token of each, two decode steps
    assert engine.stats.prefilled == 70
    assert engine.stats.kv_read == 2 * 70 + own
    assert engine.stats.kv_read_unshared == 4 * 2 * 70 + own
