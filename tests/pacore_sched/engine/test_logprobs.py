"""Alternatives' log-probabilities and prompt scores: those of the model on the whole context.

References are the model's logits of one sequence, in fp64, and `sample` itself.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels.sampling import SampleOutput, sample
from model.decoder import Step
from model.errors import InputError
from model.kv_cache import PAGE_SIZE
from model.step3vl import Step3VL
from pacore_sched.engine import logprobs
from pacore_sched.engine.engine import Engine
from pacore_sched.engine.executor import ModelExecutor
from pacore_sched.engine.logprobs import TopRows, unpacked_results
from pacore_sched.engine.step_rows import PromptScores
from pacore_sched.engine.stopping import Stopping
from pacore_sched.sched.request import (
    Batch,
    Chunk,
    Group,
    Rollout,
    SampledTokens,
    Sampling,
    TopLogprobs,
)
from tests.pacore_sched.engine.test_executor import OTHER, PROMPT, ManualEngine

VOCAB = 24
SAMPLINGS = (
    Sampling(top_logprobs=5),
    Sampling(top_logprobs=20, temperature=0.5, top_k=2),
    Sampling(),
    Sampling(top_logprobs=20, temperature=0.5, logprobs="processed"),
    Sampling(top_logprobs=20, top_k=6, logprobs="processed"),
    Sampling(top_logprobs=20, temperature=1.5, top_p=0.7, logprobs="processed"),
    Sampling(top_logprobs=20, top_k=12, top_p=0.9, logprobs="processed"),
    Sampling(top_logprobs=3, temperature=0.0, logprobs="processed"),
)


@pytest.fixture(scope="module")
def tiny() -> Step3VL:
    return Step3VL.from_preset("tiny", seed=1)


def top_of(logits: Tensor, samplings: Sequence[Sampling]) -> list[TopLogprobs]:
    """Each row's alternatives."""
    top, results = TopRows.of(samplings, logits.device), SampleOutput.of(len(logits), logits.device)
    assert top is not None
    sampled = unpacked_results(top.append(results.results.zero_(), logits))
    assert sampled[:2] == ([0] * len(logits), [0.0] * len(logits))
    return sampled.top_logprobs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_bytes", [1, 1 << 20])
def test_alternatives_are_what_could_be_sampled(
    dtype: torch.dtype, block_bytes: int, monkeypatch: pytest.MonkeyPatch
):
    """`sample`, drawing from the same logits, gives each listed token its listed log-probability,
    and never draws another one. Logits tie, also at the last token that is kept."""
    monkeypatch.setattr(logprobs, "BLOCK_BYTES", block_bytes)
    logits = (2 * torch.randn(8, VOCAB)).round(decimals=1).to(dtype)
    logits[:, 1::5], logits[:, 7] = logits[:, :1], -torch.inf
    seeds = torch.arange(3000)
    for row, sampling, top in zip(logits, SAMPLINGS, top_of(logits, SAMPLINGS), strict=True):
        draw = {n: getattr(sampling, n) for n in ("temperature", "top_k", "top_p", "logprobs")}
        tokens, values = sample(row.expand(len(seeds), -1), seeds, seeds, **draw)
        drawn = dict(zip(tokens.tolist(), values.tolist(), strict=True))
        listed = dict(top)
        order = [(-row[id].item(), id) for id in listed]
        assert order == sorted(order) and len(top) <= sampling.top_logprobs
        least = min((row[id] for id in listed), default=math.inf)
        assert all(id in listed or row[id] <= least for id in drawn) or not top
        assert all(listed.get(id, value) == pytest.approx(value, abs=1e-5)
                   for id, value in drawn.items())  # fmt: skip
        if sampling.logprobs == "processed" and sampling.temperature:
            assert set(drawn) <= set(listed)
            assert sum(map(math.exp, listed.values())) == pytest.approx(1, abs=2e-2)
            assert set(drawn) >= {id for id, value in top if value > math.log(0.01)}
    counts = [len(top) for top in top_of(logits, SAMPLINGS)]
    assert counts[:4] == [5, 20, 0, 20] and counts[7] == 1


def test_equal_logits_are_listed_by_id():
    """`topk` leaves the order of equal values open, and which of them it takes."""
    zeros = torch.zeros(1, 3000, dtype=torch.bfloat16)
    zeros[0, 1::2] = -0.0
    zeros[0, 1500] = 1
    ids = [id for id, _ in top_of(zeros, [Sampling(top_logprobs=20)])[0]]
    assert ids == [1500, *range(19)]


def test_fewer_tokens_than_alternatives():
    """A vocabulary of three tokens, and a row of NaN, which has none."""
    logits = torch.tensor([[1.0, 2.0, 3.0], [torch.nan] * 3])
    top, nothing = top_of(logits, [Sampling(top_logprobs=9)] * 2)
    assert [id for id, _ in top] == [2, 1, 0] and nothing == ()


def reference(model: Step3VL, ids: Sequence[int]) -> Tensor:
    """Log-probabilities fp64 [T, vocab] of what follows each token of a sequence."""
    cache = model.new_cache(len(ids) // PAGE_SIZE + 1)
    with torch.inference_mode():  # not `model(ids)`: an <im_patch> id may have been drawn
        step = Step.of_sequence(0, len(ids), cache)
        hidden = model.decoder(model.decoder.embed(torch.tensor(ids)), step, cache)
        return model.decoder.logits(hidden).double().log_softmax(-1)


def check_top(expected: Tensor, top: TopLogprobs, count: int) -> None:
    """The `count` largest of `expected` [vocab], each with its id; close ones in any order."""
    values = [value for _, value in top]
    assert len(values) == len({id for id, _ in top}) == min(count, int(expected.isfinite().sum()))
    assert values == sorted(values, reverse=True)
    assert values == pytest.approx([expected[id].item() for id, _ in top], abs=1e-4)
    assert values == pytest.approx(expected.topk(len(values)).values.tolist(), abs=1e-4)


def check_rollout(model: Step3VL, prompt: Sequence[int], rollout: Rollout) -> None:
    """Alternatives of each of a rollout's tokens. Its sampling may have a top-k, but no top-p."""
    sampling = rollout.group.sampling
    count = sampling.top_logprobs
    assert len(rollout.top_logprobs) == (len(rollout.tokens) if count else 0)
    expected = reference(model, [*prompt, rollout.group.last_token, *rollout.tokens[:-1]])
    if sampling.logprobs == "processed":
        expected = expected / sampling.temperature
        kth = expected.topk(sampling.top_k or expected.shape[1]).values[:, -1:]
        expected = expected.masked_fill(expected < kth, -torch.inf).log_softmax(-1)
    for row, top in zip(expected[len(prompt) :], rollout.top_logprobs, strict=False):
        check_top(row, top, count)


def check_scores(model: Step3VL, ids: Sequence[int], scores: PromptScores) -> None:
    """Entries of all of a prompt's tokens."""
    expected = reference(model, ids)[:-1]
    assert scores.logprobs[0] is None and len(scores.logprobs) == len(ids)
    values = expected[range(len(ids) - 1), ids[1:]].tolist()
    assert scores.logprobs[1:] == pytest.approx(values, abs=1e-4)
    assert len(scores.top_logprobs) == (len(ids) if scores.top else 0)
    assert scores.top_logprobs[:1] == [None][: scores.top]
    for row, top in zip(expected, scores.top_logprobs[1:], strict=False):
        check_top(row, top, scores.top)


@pytest.mark.parametrize(("ahead", "speculate"), [(False, 0), (True, 8)])
def test_under_the_engine(tiny: Step3VL, ahead: bool, speculate: int):
    """Rollouts that ask for 5, for 20 and for none, preempted, moved, drafted and in one batch, and
    prompts whose scores are asked for, in chunks: all as from the whole context. Tokens and their
    log-probabilities are the same bits as without asking."""

    def run(samplings: Sequence[Sampling], tops: Sequence[int | None]) -> tuple:
        executor = ModelExecutor(tiny, num_pages=11, max_running=6)
        stopping = Stopping(tiny.tokenizer, tiny.config.tokens.eos)
        options = {"ahead": ahead, "speculate": speculate, "host_pages": 1, "prefix_cache": False}
        engine = Engine(executor, stopping, token_budget=32, **options)
        groups, scores = [], []
        for ids, sampling, top in zip(prompts, samplings, tops, strict=True):
            scores.append(None if top is None else PromptScores(ids[-1], top))
            segment = executor.segment(ids[:-1], scores=scores[-1])
            seeds = dict(enumerate(range(5)))
            groups.append(engine.submit([segment], ids[-1], seeds, sampling))
        while engine.busy:
            engine.step()
            engine.scheduler.check_integrity()
        assert engine.scheduler.counts.preemptions
        assert engine.stats.accepted or not speculate
        return groups, scores

    prompts = [[*PROMPT, 7], [*OTHER, 9], [*OTHER, 8], [*PROMPT[::-1], 3]]
    samplings = [
        Sampling(90, ignore_eos=True, top_logprobs=5),
        Sampling(60, temperature=0.7, top_k=2, logprobs="processed", top_logprobs=20),
        Sampling(50, ignore_eos=True),
        Sampling(80, temperature=0.7, top_logprobs=20),
    ]
    groups, scores = run(samplings, [None, 0, 3, 20])
    for ids, group in zip(prompts, groups, strict=True):
        for rollout in group.rollouts:
            check_rollout(tiny, ids[:-1], rollout)
    for ids, filled in zip(prompts[1:], scores[1:], strict=True):
        check_scores(tiny, ids, filled)
    plain, _ = run([replace(sampling, top_logprobs=0) for sampling in samplings], [None] * 4)
    assert [(r.tokens, r.logprobs) for group in groups for r in group.rollouts] == [
        (r.tokens, r.logprobs) for group in plain for r in group.rollouts
    ]


def test_scores_are_filled_in_once(tiny: Step3VL, monkeypatch: pytest.MonkeyPatch):
    """A prompt whose KV is dropped after a part of it was written, and again when it is complete,
    with other chunks, in blocks of 8 rows, while a rollout that asks for fewer alternatives
    decodes. What has been scored is not scored again."""
    monkeypatch.setattr(logprobs, "BLOCK_BYTES", 8 * 4 * tiny.config.decoder.vocab_size)
    head_rows, logits = [], tiny.decoder.logits
    monkeypatch.setattr(
        tiny.decoder, "logits", lambda hidden: head_rows.append(len(hidden)) or logits(hidden)
    )
    engine = ManualEngine(tiny)
    (other,) = engine.group(engine.prompt(OTHER), 9, [1], Sampling(top_logprobs=2))
    scores = PromptScores(7, 4)
    segment = engine.executor.segment(PROMPT, scores=scores)
    tops: list[TopLogprobs] = []

    def write(*sizes: int) -> None:
        for size in sizes:
            chunk = engine.write(segment, size)
            batch, pending = engine.launch(Batch((other,), (chunk,)))
            sampled = engine.executor.collect(pending)
            other.tokens.append(sampled.tokens[0])
            tops.append(sampled.top_logprobs[0])
            assert len(sampled.tokens) == len(sampled.top_logprobs) == 1

    def drop() -> None:
        engine.tree.release(segment.node)
        segment.node, segment.written = -1, 0

    write(20, 1)
    assert len(scores.logprobs) == len(scores.top_logprobs) == 22
    drop()
    write(10, 40, 20)
    first = [*scores.logprobs]
    drop()
    write(30, 40)
    assert scores.logprobs == first
    assert max(head_rows) == 8 and sum(head_rows) == len(tops) + 20 + 1 + 40 + 20
    check_scores(tiny, [*PROMPT, 7], scores)
    expected = reference(tiny, [*OTHER, 9, *other.tokens[:-1]])[len(OTHER) :]
    for row, top in zip(expected, tops, strict=True):
        check_top(row, top, 2)


def test_scores_while_kv_is_dropped(tiny: Step3VL):
    """Too few pages for all prompts: prompts are dropped while others run, and recomputed. Their
    scores are complete when the first of their rollouts has a token."""
    executor = ModelExecutor(tiny, num_pages=5, max_running=4)
    stopping = Stopping(tiny.tokenizer, tiny.config.tokens.eos)
    engine = Engine(executor, stopping, token_budget=24, ahead=True)
    entries: list[tuple[Group, list[int], PromptScores]] = []
    for number in range(3):
        ids = [*range(number + 1, number + 72 - 30 * number)]
        scores = PromptScores(ids[-1], number)
        segment = executor.segment(ids[:-1], scores=scores)
        sampling = Sampling(66, ignore_eos=True)
        group = engine.submit([segment], ids[-1], {0: 0, 1: 1}, sampling, problem=number)
        entries.append((group, ids, scores))
    while engine.busy:
        engine.step()
        for group, ids, scores in entries:
            if any(rollout.tokens for rollout in group.rollouts):
                assert len(scores.logprobs) == len(ids)
    assert engine.scheduler.counts.prefilled > sum(len(ids) - 1 for _, ids, _ in entries)
    for _, ids, scores in entries:
        check_scores(tiny, ids, scores)


def test_a_resumed_rollout(tiny: Step3VL):
    """The token that the chunk of a resumed rollout samples has its alternatives, in a step with
    another prompt's scores."""
    engine = ManualEngine(tiny)
    prompt = engine.prompt(PROMPT)
    other, preempted = engine.group(prompt, 7, [1, 2], Sampling(top_logprobs=3))
    engine.decode([other, preempted], 4)
    engine.stop(preempted)
    engine.start(preempted)
    engine.tree.append(preempted.node, 5)
    scores = PromptScores(9, 1)
    segment = engine.executor.segment(OTHER, scores=scores)
    chunks = (engine.write(segment, len(OTHER)), Chunk(preempted, 0, 5, samples=True))
    _, pending = engine.launch(Batch((other,), chunks))
    sampled = engine.executor.collect(pending)
    for rollout, top in zip((other, preempted), sampled.top_logprobs, strict=True):
        row = reference(tiny, [*PROMPT, 7, *rollout.tokens])[-1]
        check_top(row, top, 3)
    check_scores(tiny, [*OTHER, 9], scores)


def test_prompts_of_one_token():
    """Such a prompt has no segment, so nothing fills in its only entry."""
    assert (PromptScores(7).logprobs, PromptScores(7).top_logprobs) == ([None], [])
    assert PromptScores(7, 2).top_logprobs == [None]


def test_bad_input(tiny: Step3VL):
    """A number of alternatives out of range, and a last token that is not in the vocabulary, whose
    log-probability would be read out of bounds."""
    with pytest.raises(InputError, match="top_logprobs must be from 0 to 20, not 21"):
        PromptScores(7, 21)
    executor = ManualEngine(tiny).executor
    with pytest.raises(InputError, match=r"prompt id -1 is not in \[0, "):
        executor.segment([1], scores=PromptScores(-1))


@pytest.mark.gpu
def test_no_synchronisation_on_a_gpu():
    """Alternatives and scores must not make a launch wait for the device."""
    model = Step3VL.from_preset("tiny", seed=1, device="cuda", dtype=torch.bfloat16)
    with ModelExecutor(model, num_pages=40, max_running=8) as executor:
        engine = ManualEngine(model)
        engine.executor = executor
        segment = engine.prompt(OTHER)
        samplings = [s for s in SAMPLINGS if s.top_k != 2]
        rollouts = [r for s in samplings for r in engine.group(segment, 9, [1], s)]
        engine.decode(rollouts, 2)
        launched, scores = [], [PromptScores(7, 20), PromptScores(7, 20)]
        engine.launch(Batch((), (engine.write(executor.segment(PROMPT), 40),)))
        for filled, mode in zip(scores, ("default", "error"), strict=True):  # compiles at first
            prompt = executor.segment(PROMPT, scores=filled)
            torch.cuda.set_sync_debug_mode(mode)
            try:
                for chunk in (40, 30):
                    batch = Batch(tuple(rollouts), (engine.write(prompt, chunk),))
                    launched.append(engine.launch(batch))
                launched.append(engine.launch(Batch(tuple(rollouts))))
            finally:
                torch.cuda.set_sync_debug_mode("default")
        for _, pending in launched:
            sampled: SampledTokens = executor.collect(pending)
            for rollout, top in zip(rollouts, sampled.top_logprobs, strict=True):
                assert 0 < len(top) <= rollout.group.sampling.top_logprobs or not top
        assert all(len(filled.logprobs) == len(PROMPT) + 1 for filled in scores)
        assert scores[0].logprobs[1:] == pytest.approx(scores[1].logprobs[1:], abs=0.1)
