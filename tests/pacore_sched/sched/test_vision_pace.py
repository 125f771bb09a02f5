"""The tower's share of the time while rollouts decode, by a fake clock."""

from collections.abc import Iterator
from contextlib import ExitStack
from math import inf

import pytest

from model.errors import InputError
from pacore_sched.sched.view_queue import DEFAULT_VISION_BUDGET, VISION_BUDGETS
from pacore_sched.sched.vision_pace import BETWEEN_STEPS_S, VisionPace, slowdown_of


class Clock:
    """Time that passes when somebody works or sleeps. `events`: time -> what happens then."""

    def __init__(self) -> None:
        self.now, self.slept = 100.0, 0.0
        self.events: dict[float, object] = {}

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds
        self.slept += seconds
        for time in [time for time in self.events if time <= self.now]:
            self.events.pop(time)()


def pace_of(slowdown: float) -> tuple[VisionPace, Clock]:
    clock = Clock()
    return VisionPace(slowdown, clock, clock.sleep), clock


def slices(pace: VisionPace, clock: Clock, seconds: float, count: int) -> Iterator[float]:
    """Pauses of the tower after slices of a length."""
    pace.begin()
    for _ in range(count):
        clock.now += seconds
        slept = clock.slept
        pace.wait()
        yield clock.slept - slept


@pytest.mark.parametrize("seconds", [0.001, 0.3])
@pytest.mark.parametrize("budget", ["latency", "balanced"])
def test_a_step_takes_as_much_longer_as_the_budget_says(budget: str, seconds: float):
    """A share of the time that is the slowdown itself, or that depends on the slices' length: in
    the worst case, decoding advances only while the tower pauses."""
    slowdown = slowdown_of(budget)
    pace, clock = pace_of(slowdown)
    with pace.launch(True):
        pass
    start = clock.now
    undisturbed = sum(slices(pace, clock, seconds, 50))
    assert clock.now - start == pytest.approx(slowdown * undisturbed)


def test_when_nothing_decodes_the_tower_runs():
    """Pauses for steps that only prefill, before the first step, or long after the last one."""
    pace, clock = pace_of(1.25)
    assert [*slices(pace, clock, 1.0, 2)] == [0, 0]
    with pace.launch(False):
        assert [*slices(pace, clock, 1.0, 2)] == [0, 0]
    with pace.launch(True):
        assert next(slices(pace, clock, 1.0, 1)) == pytest.approx(4)
    pace.step_ended()
    assert pace.applies  # the next step follows at once
    clock.now += 2 * BETWEEN_STEPS_S
    assert not pace.applies
    assert [*slices(pace, clock, 1.0, 2)] == [0, 0]


def test_steps_that_overlap():
    """The next step is launched before the last one has ended."""
    pace, clock = pace_of(2.0)
    for _ in range(3):
        with pace.launch(True):
            pass
    for left in (2, 1):
        pace.step_ended()
        clock.now += 1
        assert pace.applies, left
    pace.step_ended()
    clock.now += 1
    assert not pace.applies


@pytest.mark.parametrize("how", ["ended", "failed", "idle"])
def test_a_pause_ends_with_decoding(how: str):
    """An encoder that waits for the next step of an engine that has none, or has failed."""
    pace, clock = pace_of(1.25)
    step = ExitStack()
    step.enter_context(pace.launch(True))

    def fail() -> None:
        with pytest.raises(KeyboardInterrupt), step:
            raise KeyboardInterrupt

    end = {"ended": pace.step_ended, "failed": fail, "idle": pace.idle}[how]
    clock.events[clock.now + 10.2] = end
    assert next(slices(pace, clock, 10.0, 1)) <= 0.2 + 3 * BETWEEN_STEPS_S
    clock.now += 1
    assert not pace.applies


def test_an_engine_that_never_steps_again_does_not_stop_the_tower():
    """A deadlock: a step was launched and nobody will collect it."""
    pace, clock = pace_of(1.25)
    with pace.launch(True):
        pass
    assert [*slices(pace, clock, 2.0, 3)] == pytest.approx([8, 8, 8])


def test_time_between_batches_is_not_the_towers():
    """A pause for the time in which no image was there."""
    pace, clock = pace_of(2.0)
    with pace.launch(True):
        pass
    clock.now += 1000
    assert next(slices(pace, clock, 1.0, 1)) == pytest.approx(1)


def test_budgets():
    assert slowdown_of(DEFAULT_VISION_BUDGET) == 2
    assert slowdown_of("throughput") == inf
    pace, clock = pace_of(inf)
    with pace.launch(True):
        assert not pace.applies and [*slices(pace, clock, 1.0, 2)] == [0, 0]
    with pytest.raises(InputError, match=f"'slow'; choose one of: {', '.join(VISION_BUDGETS)}"):
        slowdown_of("slow")
