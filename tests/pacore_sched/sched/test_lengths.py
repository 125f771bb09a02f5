"""Expected lengths of rollouts, from the lengths of ended ones."""

import pytest

from pacore_sched.sched import lengths
from pacore_sched.sched.lengths import QUANTILE, EndedLengths


def test_groups_then_rounds() -> None:
    """Too few ended siblings that count, or lengths of another round or of a group that is done."""
    ended = EndedLengths()
    for tokens in (10, 20, 30):
        ended.add("group", 0, tokens)
    for tokens in (100, 200, 300):
        ended.add("other", 0, tokens)
    assert ended.expected("group", 0, 5) == 20
    assert ended.expected("group", 0, 10) == 200  # two longer siblings are too few
    assert ended.expected("new", 0, 200) is None
    assert ended.expected("new", 1, 5) is None
    ended.forget("group")
    assert ended.expected("group", 0, 5) == 100


def test_a_sample_of_a_long_run_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A list of every length that ever ended; or a sample that favours short or long ones."""
    monkeypatch.setattr(lengths, "MAX_ENDED", 100)
    ended = EndedLengths()
    for number in range(10_000):
        ended.add(number, 0, number * 37 % 1000)
        ended.forget(number)
    assert len(ended._of_round[0]) <= 100 and not ended._of_group
    assert ended.expected("new", 0, 0) == pytest.approx(QUANTILE * 1000, abs=100)
