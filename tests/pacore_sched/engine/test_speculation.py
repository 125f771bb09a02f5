"""Sibling drafts: they continue the latest match, are short where they fail, and cost little."""

import random

from hypothesis import given
from hypothesis import strategies as st

from pacore_sched.engine import speculation
from pacore_sched.engine.speculation import MAX_DRAFT, SiblingDrafts
from pacore_sched.sched.request import Group, Rollout, Sampling


def group_of(*tokens: list[int]) -> Group:
    group = Group(path=(), last_token=0, sampling=Sampling())
    group.rollouts = [
        Rollout(group, index, 0, 10**6, list(written)) for index, written in enumerate(tokens)
    ]
    return group


def test_a_sibling_continues():
    """A draft is what followed the last three tokens in another rollout; nothing without
    a match."""
    group = group_of([1, 2, 3, 4, 5, 6], [9, 2, 3, 4], [7, 8])
    drafts = SiblingDrafts()
    assert drafts.draft(group.rollouts[1], 2) == (5, 6)
    assert drafts.draft(group.rollouts[2], 2) == ()
    group.rollouts[2].tokens += [3, 4]  # only two of its last tokens agree
    assert drafts.draft(group.rollouts[2], 1) == (5,)


def test_other_groups_do_not_continue():
    """Guards against one problem's tokens in another problem's drafts."""
    first, other = group_of([1, 2, 3, 4, 5]), group_of([1, 2, 3])
    drafts = SiblingDrafts()
    assert drafts.draft(first.rollouts[0], 4) == ()
    assert drafts.draft(other.rollouts[0], 4) == ()


def test_three_tokens_decide_before_two():
    """A match of three tokens is preferred to one of two, wherever it is."""
    group = group_of([1, 2, 3, 50], [9, 2, 3, 60], [1, 2, 3])
    assert SiblingDrafts().draft(group.rollouts[2], 1) == (50,)


def test_the_latest_own_match_decides():
    """A rollout that has changed its mind continues as it last did, not as others or its earlier
    self."""
    group = group_of([1, 2, 3, 40], [1, 2, 3, 50, 1, 2, 3, 60, 1, 2, 3])
    drafts = SiblingDrafts()
    assert drafts.draft(group.rollouts[1], 1) == (60,)


def test_tokens_are_seen_as_they_arrive():
    """Tokens that a sibling wrote since the last draft are available to the next one."""
    group = group_of([1, 2, 3], [4, 5, 6])
    drafts = SiblingDrafts()
    assert drafts.draft(group.rollouts[1], 3) == ()
    group.rollouts[0].tokens += [4, 5, 6, 7, 8]
    assert drafts.draft(group.rollouts[1], 2) == (7, 8)


def test_a_repetition_goes_on():
    """A match that reaches the end of its source continues from its own draft."""
    group = group_of([1, 2, 3, 1, 2, 3])
    assert SiblingDrafts().draft(group.rollouts[0], 4) == (1, 2, 3, 1)


def test_length_adapts():
    """Twice as long after a correct draft, short after a wrong one, never beyond the maximum."""
    group = group_of([*range(100)], [0, 1, 2, 3])
    rollout, drafts = group.rollouts[1], SiblingDrafts()
    assert len(drafts.draft(rollout, 100)) == MAX_DRAFT // 2
    drafts.verified(rollout, MAX_DRAFT // 2, MAX_DRAFT // 2)
    assert len(drafts.draft(rollout, 100)) == MAX_DRAFT
    drafts.verified(rollout, MAX_DRAFT, MAX_DRAFT)
    assert len(drafts.draft(rollout, 100)) == MAX_DRAFT
    assert len(drafts.draft(rollout, 3)) == 3
    assert drafts.draft(rollout, 0) == ()
    drafts.verified(rollout, MAX_DRAFT, 2)
    assert len(drafts.draft(rollout, 100)) == 3
    drafts.verified(rollout, 3, 0)
    assert len(drafts.draft(rollout, 100)) == 1
    drafts.verified(rollout, 0, 0)  # nothing was drafted: nothing is learned
    assert len(drafts.draft(rollout, 100)) == 1


def test_forgotten_groups_leave_nothing():
    """Guards against a leak of every token ever generated."""
    group, drafts = group_of([1, 2, 3, 4], [1, 2, 3]), SiblingDrafts()
    assert drafts.draft(group.rollouts[1], 1) == (4,)
    drafts.verified(group.rollouts[1], 1, 1)
    drafts.forget(group)
    assert not drafts._indexes
    assert not drafts._lengths


def test_a_long_past_is_entered_in_parts(monkeypatch):
    """Guards against a pause when drafting begins: siblings of 64k tokens appear at once."""
    monkeypatch.setattr(speculation, "CATCH_UP", 100)
    group = group_of([*range(1000, 1250)], [1200, 1201, 1202])
    drafts = SiblingDrafts()
    assert [drafts.draft(group.rollouts[1], 1) for _ in range(3)] == [(), (), (1203,)]


@given(st.lists(st.lists(st.integers(0, 3), max_size=30), min_size=1, max_size=4), st.data())
def test_drafts_are_continuations(tokens: list[list[int]], data: st.DataObject):
    """Every drafted token followed, somewhere in the group, the two tokens before it."""
    group = group_of(*tokens)
    rollout = data.draw(st.sampled_from(group.rollouts))
    draft = SiblingDrafts().draft(rollout, data.draw(st.integers(0, 10)))
    seen = {tuple(t[i : i + 3]) for t in tokens for i in range(len(t) - 2)}
    line = [*rollout.tokens[-2:], *draft]
    assert all(tuple(line[i : i + 3]) in seen for i in range(len(line) - 2))
    assert not draft or len(rollout.tokens) >= 2


def test_similar_siblings_are_predicted():
    """The purpose: for a copy of a sibling with one token in ten changed, most tokens are drafted
    correctly."""
    generator = random.Random(0)
    first = [generator.randrange(1000) for _ in range(2000)]
    second = [t if generator.random() < 0.9 else generator.randrange(1000) for t in first]
    group, drafts = group_of(first, second[:3]), SiblingDrafts()
    rollout, steps = group.rollouts[1], 0
    while len(rollout.tokens) < len(second):
        draft, rest = drafts.draft(rollout, MAX_DRAFT), second[len(rollout.tokens) :]
        pairs = zip(draft, rest, strict=False)
        accepted = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(draft), len(rest)))
        rollout.tokens += rest[: accepted + 1]
        drafts.verified(rollout, len(draft), accepted)
        steps += 1
    assert steps < len(second) / 2
