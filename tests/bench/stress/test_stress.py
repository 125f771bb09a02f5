"""The stress test: the engine passes, everything happens in it, and it finds what is wrong."""

from collections import Counter

import pytest

from bench.__main__ import main
from bench.stress.command import StressError, stress
from bench.stress.hash_model import EOS, TEXTS, HashModel, expected
from pacore_sched.sched.request import Sampling
from pacore_sched.sched.scheduler import Scheduler
from tests.bench.stress.faults import FAULTS, RARE, Planted, events_until_found


@pytest.fixture(scope="module")
def happened() -> Counter[str]:
    """What happens on a few engines. Raises for a fault of the scheduler or the engine."""
    return sum((stress(7, number) for number in range(10)), Counter())


@pytest.mark.parametrize(
    "what",
    [
        *("step", "submit", "ready", "cancel", "fail", "keep", "drop", "refused", "repeated"),
        *("ended: stop", "ended: length", "ended: cancelled", "ended: error"),
        *("preemptions", "evicted", "restored", "recomputed", "segments dropped", "wasted"),
        *("drafted", "accepted", "segment chunks", "rollout chunks", "found"),
    ],
)
def test_everything_happens(happened: Counter[str], what: str):
    """A case that never occurs is never checked."""
    assert happened[what] > 0


def test_a_run_repeats():
    """A fault could not be repeated if a run depended on anything but its seed and number."""
    assert stress(7, 3) == stress(7, 3) != stress(8, 3)


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_finds_a_planted_fault(fault: Planted):
    """A check that finds nothing is worth nothing: each of these breaks one line."""
    assert events_until_found(fault, runs=9) is not None


@pytest.mark.parametrize("fault", RARE, ids=str)
def test_rare_faults_can_be_planted(fault: Planted):
    """A line that has changed would make the fault, and its entry in the list, void."""
    with fault.active():
        pass


def test_the_command_says_how_to_repeat_a_fault(capsys: pytest.CaptureFixture):
    """A fault ends the command with its place and the command that repeats it; without one, the
    command prints what happened."""
    fault = Planted(Scheduler.finish, "group.ended >= group.need", "group.ended > group.need")
    with fault.active():
        assert main(["stress", "--events", "5000", "--seed", "3"]) == 1
    found, repeat = capsys.readouterr().out.splitlines()
    assert found.startswith("engine 0, event ")
    command = repeat.removeprefix("repeat it: python -m bench ").split()
    assert main(command) == 0
    assert "ended: stop" in capsys.readouterr().out
    with fault.active(), pytest.raises(StressError):
        stress(3, 0)


def test_expected_texts():
    """The texts against which rollouts are compared: an end token, a stop string and a length."""
    cycle = HashModel(surprise=1 << 40, failure=0)  # tokens follow each other: 1, 2, ...
    by_length = expected(cycle, [3, 0], 5, 4, Sampling())
    assert by_length.tokens == [1, 2, 3, 4] and by_length.reason == "length"
    assert by_length.text == b"".join(TEXTS[token] for token in (1, 2, 3, 4)).decode()
    stopped = expected(cycle, [3, 0], 5, 9, Sampling(stop=("bab",)))
    assert (stopped.text, stopped.reason, stopped.tokens) == ("a", "stop", [1, 2, 3])
    for seed in range(100):
        random = expected(HashModel(1, 0), [1], seed, 40, Sampling())
        assert (random.reason == "stop") == (random.tokens[-1] == EOS) == (EOS in random.tokens)
