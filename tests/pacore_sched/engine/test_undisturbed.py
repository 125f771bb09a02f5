"""A rollout's tokens do not depend on what else runs: the whole engine on the tiny model.

A token is a function of its seed, its position and the logits before it. Logits are equal up to the
rounding of sums, whose order depends on the shape of a batch: in fp32, log-probabilities agree to
1e-4, and tokens agree unless two candidates are closer than that. With FP8 KV, a different rounding
may also cross a step of FP8, so these tests compare FP8 runs with FP8 runs only.
"""

from collections.abc import Sequence

import pytest
import torch

from model.step3vl import Step3VL
from pacore_sched.engine.engine import Engine
from pacore_sched.engine.executor import ModelExecutor
from pacore_sched.engine.stopping import Stopping
from pacore_sched.sched.request import Group, Rollout, Sampling

PROMPTS = ([*range(1, 71)], [*range(30, 45)])
SAMPLING = Sampling(70, ignore_eos=True)


@pytest.fixture(scope="module")
def tiny() -> Step3VL:
    return Step3VL.from_preset("tiny", seed=1)


def engine_of(model: Step3VL, pages: int, kv_dtype: torch.dtype | None, **options: object):
    executor = ModelExecutor(model, num_pages=pages, max_running=6, kv_dtype=kv_dtype)
    return Engine(executor, Stopping(model.tokenizer, model.config.tokens.eos), **options)


def run(
    engine: Engine, seeds_by_prompt: Sequence[Sequence[int]], need: int | None = None
) -> list[Group]:
    """Submit a group for each prompt, with rollouts of the given seeds; run until all have ended
    once."""
    groups = [
        engine.submit(
            [engine.executor.segment(ids)],
            7,
            dict(enumerate(seeds)),
            SAMPLING,
            need=need,
            problem=number,
        )
        for number, (ids, seeds) in enumerate(zip(PROMPTS, seeds_by_prompt, strict=True))
        if seeds
    ]
    ended: list[Rollout] = []
    while engine.busy:
        ended += engine.step()
        engine.scheduler.check_integrity()
    assert len(ended) == len(set(ended)) == sum(len(group.rollouts) for group in groups)
    assert engine.scheduler.tree.free_pages == engine.executor.num_pages
    return groups


@pytest.fixture(scope="module")
def alone(tiny: Step3VL) -> dict:
    """Tokens and log-probabilities of each rollout: one that has the engine to itself, the others
    next to their siblings, with all the memory that they need."""
    results = {}
    for kv_dtype in (None, torch.float8_e4m3fn):
        for seeds_by_prompt in ([[0], []], [[1, 2], range(3)]):
            for group in run(engine_of(tiny, 40, kv_dtype), seeds_by_prompt):
                for rollout in group.rollouts:
                    results[kv_dtype, group.problem, rollout.seed] = (
                        rollout.tokens,
                        rollout.logprobs,
                    )
    return results


@pytest.mark.parametrize("kv_dtype", [None, torch.float8_e4m3fn])
@pytest.mark.parametrize("ahead, host_pages", [(False, 0), (True, 0), (True, 100)])
def test_under_memory_pressure(
    tiny: Step3VL, alone: dict, ahead: bool, host_pages: int, kv_dtype: torch.dtype | None
):
    """Preempted, recomputed or moved to the host, steps pipelined or not: the same tokens."""
    engine = engine_of(tiny, 7, kv_dtype, ahead=ahead, host_pages=host_pages, token_budget=24)
    groups = run(engine, [range(3)] * 2)
    counts = engine.scheduler.counts
    assert counts.preemptions and (host_pages or counts.recomputed)
    for prompt, group in enumerate(groups):
        for rollout in group.rollouts:
            tokens, logprobs = alone[kv_dtype, prompt, rollout.seed]
            assert rollout.tokens == tokens
            tolerance = 1e-4 if kv_dtype is None else 0.05
            assert rollout.logprobs == pytest.approx(logprobs, abs=tolerance)


@pytest.mark.parametrize("ahead", [False, True])
def test_cancelled_siblings(tiny: Step3VL, alone: dict, ahead: bool):
    """Two of three rollouts end a group, under pressure: a cancelled one has a prefix of its
    tokens, and its freed pages and batch index do not disturb those that continue."""
    for group in run(engine_of(tiny, 7, None, ahead=ahead, host_pages=3), [range(3)] * 2, need=2):
        complete = [r for r in group.rollouts if r.finish_reason == "length"]
        assert len(complete) == 2
        for rollout in group.rollouts:
            tokens, _ = alone[None, group.problem, rollout.seed]
            assert rollout.tokens == tokens[: len(rollout.tokens)]
