"""The engine on a model of hashes: a rollout's tokens do not depend on what else runs."""

from collections import Counter
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.errors import InputError
from pacore_sched.engine.engine import Engine
from pacore_sched.engine.stopping import Stopping
from pacore_sched.sched.policy import ORACLES, POLICIES
from pacore_sched.sched.request import Group, Rollout, Sampling
from tests.support.fake_executor import (
    EOS,
    VOCABULARY,
    FakeExecutor,
    expected,
    segment,
    top_logprobs,
)

NAMES = [name for name in POLICIES if name not in ORACLES]


class Letters:
    """A tokenizer with one letter per id."""

    def token_bytes(self, id: int) -> bytes:
        return bytes([ord("a") + id % 26])


def engine_of(executor: FakeExecutor, **options: object) -> Engine:
    return Engine(executor, Stopping(Letters(), [EOS]), **options)


def run(engine: Engine, groups: list[Group]) -> list[Rollout]:
    """All rollouts in the order in which they end; checks the tree at every step."""
    ended = []
    for step in count():
        if not engine.busy:
            break
        assert step < 20_000
        ended += engine.step()
        engine.scheduler.check_integrity()
    for batch in engine.executor.launched:
        rows = len(batch.decode) + sum(map(len, batch.drafts))
        rows += sum(chunk.stop - chunk.start for chunk in batch.chunks)
        assert 0 < rows <= engine.scheduler.token_budget
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    assert Counter(ended) == Counter(rollouts)
    assert engine.scheduler.tree.free_pages == engine.executor.num_pages
    assert engine.stats.generated == sum(len(rollout.tokens) for rollout in rollouts)
    return ended


@st.composite
def cases(draw):
    """An engine with too little memory, and the groups submitted to it."""
    vocabulary = draw(st.sampled_from([VOCABULARY, VOCABULARY, 6]))
    pages = draw(st.integers(12, 20))
    executor = FakeExecutor(pages, 4, draw(st.integers(1, 12)), vocabulary)
    engine = engine_of(
        executor,
        policy=draw(st.sampled_from(NAMES)),
        max_running=draw(st.sampled_from([None, None, 3])),
        token_budget=draw(st.integers(1, 24)),
        ahead=draw(st.booleans()),
        speculate=draw(st.sampled_from([0, 0, 2, 8])),
        host_pages=draw(st.sampled_from([0, 0, 6, 100])),
    )
    ids = st.lists(st.integers(1, 99), min_size=0, max_size=9)
    groups = []
    for problem in range(draw(st.integers(1, 5))):
        head = segment(draw(ids))
        for round_ in range(draw(st.integers(1, 2))):
            width = draw(st.integers(1, 8))
            groups.append(
                engine.submit(
                    [head, segment(draw(ids))],
                    draw(st.integers(1, 99)),
                    {index: draw(st.integers(0, 9)) for index in range(width)},
                    Sampling(
                        max_tokens=draw(st.sampled_from([1, 7, 20, 24])),
                        top_logprobs=draw(st.sampled_from([0, 0, 2, 5])),
                    ),
                    problem=problem,
                    round=round_,
                    need=draw(st.sampled_from([None, width, 1])),
                )
            )
    return engine, groups


@settings(max_examples=300, derandomize=True, deadline=None)
@given(cases())
def test_tokens_are_those_of_a_rollout_alone(case):
    """Preempted, moved to the host, drafted, pipelined, under any policy: every rollout has the
    tokens that it would have alone, with their alternatives, and cancelled ones a prefix of
    those."""
    engine, groups = case
    run(engine, groups)
    for group in groups:
        for rollout in group.rollouts:
            undisturbed = expected(group, rollout, vocabulary=engine.executor.vocabulary)
            count, start = group.sampling.top_logprobs, group.prompt_tokens
            assert (
                rollout.top_logprobs
                == [
                    top_logprobs(token, start + i, count) for i, token in enumerate(rollout.tokens)
                ][: None if count else 0]
            )
            if rollout.finish_reason == "cancelled":
                assert rollout.tokens == undisturbed[: len(rollout.tokens)]
            else:
                assert rollout.tokens == undisturbed
                assert rollout.finish_reason == ("stop" if undisturbed[-1] == EOS else "length")
                assert len(rollout.logprobs) == len(undisturbed)
        assert sum(r.finish_reason != "cancelled" for r in group.rollouts) == group.need


def test_a_prompt_is_written_once():
    """Eight rollouts of one prompt prefill it once, and the next round finds the image in KV."""
    executor = FakeExecutor(200)
    engine = engine_of(executor)
    head = segment(range(1, 31))
    engine.scheduler.keep(head)
    for round_ in range(2):
        seeds = dict(enumerate(range(8)))
        path = [head, segment(range(5, 15))]
        group = engine.submit(path, 7, seeds, Sampling(max_tokens=3), round=round_)
        while engine.busy:
            engine.step()
        assert engine.scheduler.counts.prefilled == 30 + 10 * (round_ + 1)
        assert [r.tokens for r in group.rollouts] == [expected(group, r) for r in group.rollouts]
    assert engine.scheduler.tree.free_pages == 200 - 8
    engine.scheduler.drop(head)
    assert engine.scheduler.tree.free_pages == 200


def test_siblings_wait_until_the_prompt_is_written():
    """No rollout starts, and no step reads its prompt, before the prompt's last chunk is
    written."""
    executor = FakeExecutor(200)
    engine = engine_of(executor, token_budget=16)
    engine.submit([segment(range(1, 41))], 7, {0: 0, 1: 1}, Sampling(max_tokens=2))
    while engine.busy:
        engine.step()
    work = [(len(b.decode), [c.stop - c.start for c in b.chunks]) for b in executor.launched]
    assert work[:4] == [(0, [16]), (0, [16]), (0, [8]), (2, [])]


def test_images_are_waited_for_while_others_decode():
    """A prompt whose images are not encoded yet must not block others, and must not be
    forgotten."""
    executor = FakeExecutor(200)
    engine = engine_of(executor)
    encoded = False
    late = segment(range(1, 9))
    late.ready = lambda: encoded
    first = engine.submit([late], 7, {0: 0}, Sampling(max_tokens=4), problem=0)
    second = engine.submit([segment([1])], 7, {0: 0}, Sampling(max_tokens=4), problem=1)
    for _ in range(8):
        engine.step()
    assert second.rollouts[0].finish_reason and not first.rollouts[0].tokens
    encoded = True
    while engine.busy:
        engine.step()
    assert first.rollouts[0].tokens == expected(first, first.rollouts[0])


@pytest.mark.parametrize("ahead", [False, True])
def test_cancel(ahead: bool):
    """A cancelled group returns every page at once; the others continue undisturbed."""
    executor = FakeExecutor(200)
    engine = engine_of(executor, ahead=ahead)
    sampling = Sampling(max_tokens=30)
    groups = [
        engine.submit([segment([1, 2, 3])], 7, {0: 3, 1: 4}, sampling, problem=problem)
        for problem in range(2)
    ]
    for _ in range(5):
        engine.step()
    assert {r.finish_reason for r in engine.cancel(groups[0])} == {"cancelled"}
    assert engine.cancel(groups[0]) == []
    engine.scheduler.check_integrity()
    while engine.busy:
        engine.step()
    for rollout in groups[1].rollouts:
        assert rollout.tokens == expected(groups[1], rollout)
    assert engine.scheduler.tree.free_pages == 200


def test_errors_end_a_rollout_alone():
    """A row of NaN is token -1: only that rollout ends, with "error" and no text."""

    class Broken(FakeExecutor):
        def launch(self, tree, batch):
            sampled = super().launch(tree, batch)
            pairs = zip(batch.sampled, sampled.tokens, strict=True)
            return sampled._replace(tokens=[-1 if r.seed == 5 else t for r, t in pairs])

    engine = engine_of(Broken(200))
    group = engine.submit([segment([1])], 7, {0: 4, 1: 5}, Sampling(max_tokens=6))
    run(engine, [group])
    assert [r.finish_reason == "error" for r in group.rollouts] == [False, True]
    assert engine.text(group.rollouts[1]) == ""
    assert group.rollouts[1].tokens == []


def test_groups_that_can_never_fit_are_refused():
    """A rollout that needs more KV than there is, is refused at once, with the numbers."""
    engine = engine_of(FakeExecutor(10))
    with pytest.raises(InputError, match="11 KV pages of 4 tokens, but there are 10:"):
        engine.submit([segment([1] * 5)], 7, {0: 0}, Sampling(max_tokens=35))
    with pytest.raises(InputError, match="0 rollouts"):
        engine.submit([], 7, {}, Sampling())
    with pytest.raises(InputError, match="max_tokens must be at least 1, not 0"):
        engine.submit([], 7, {0: 0}, Sampling(max_tokens=0))
    with pytest.raises(InputError, match="top_logprobs must be from 0 to 20, not 21"):
        engine.submit([], 7, {0: 0}, Sampling(top_logprobs=21))
    assert not engine.busy
    group = engine.submit([segment([1] * 8)], 7, {0: 0, 1: 1}, Sampling(max_tokens=32))
    run(engine, [group])


@pytest.mark.parametrize("name", [*ORACLES, "lifo"])
def test_unknown_policies(name: str):
    """The message names the unknown policy, and the known ones."""
    with pytest.raises(InputError, match=f"policy {name!r}|knows lengths"):
        engine_of(FakeExecutor(10), policy=name)


def test_counts_of_shared_reads():
    """The saving from sharing is counted from the tree: the prompt once per step, not per
    rollout."""
    engine = engine_of(FakeExecutor(200))
    seeds = {index: index for index in range(4)}
    engine.submit([segment([9] * 70)], 7, seeds, Sampling(max_tokens=3, ignore_eos=True))
    while engine.busy:
        engine.step()
    own_nodes = 4 * (1 + 2 + 3)
    assert engine.stats.kv_read == 3 * 70 + own_nodes
    assert engine.stats.kv_read_unshared == 4 * 3 * 70 + own_nodes


def test_what_a_cancelled_rollout_sampled_is_wasted():
    """Two equal rollouts reach the same draft in one step and the first ends the group: the second
    one's 1 + draft tokens of that step were counted nowhere."""
    executor = FakeExecutor(40, 4, vocabulary=6)
    engine = engine_of(executor, speculate=2)
    run(
        engine,
        [engine.submit([segment([3])], 1, {0: 5, 1: 5}, Sampling(41, ignore_eos=True), need=1)],
    )
    last = executor.launched[-1]
    assert len(last.drafts) == 2 and all(last.drafts)
    sampled = sum(len(batch.sampled) + sum(map(len, batch.drafts)) for batch in executor.launched)
    assert engine.stats.generated + engine.stats.wasted == sampled


def test_reset_after_a_failed_step(monkeypatch: pytest.MonkeyPatch):
    """A step fails with rollouts running, waiting and in flight: nothing of them is left, and the
    next groups get the tokens of a new engine."""
    engine = engine_of(FakeExecutor(20, 4, 4), ahead=True)

    def submit() -> Group:
        seeds = {index: index for index in range(8)}
        return engine.submit([segment([5, 6, 7, 8, 9])], 3, seeds, Sampling(max_tokens=20))

    submit()
    for _ in range(4):
        engine.step()
    steps, generated = engine.scheduler.steps, engine.stats.generated
    assert engine.scheduler.running and engine.busy
    with monkeypatch.context() as patch:
        patch.setattr(engine.executor, "launch", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.step()
    engine.executor.reset()
    engine.reset()
    assert not engine.busy and engine.scheduler.tree.free_pages == 20
    assert (engine.scheduler.steps, engine.stats.generated) >= (steps, generated)
    again = submit()
    while engine.busy:
        engine.step()
        engine.scheduler.check_integrity()
    for rollout in again.rollouts:
        assert rollout.tokens == expected(again, rollout)
