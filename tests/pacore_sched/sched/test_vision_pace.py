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
    for _ in range(count):
        pace.begin()
        clock.now += seconds
        pace.end()
        slept = clock.slept
        pace.rest()
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
    assert clock.now - start <= slowdown * undisturbed * 1.000001


class Sharing(Clock):
    """Decoding in steps of `step` seconds, which advances at full speed while the tower rests, and
    at a share of it while the tower runs."""

    def __init__(self, slowdown: float, step: float, share: float) -> None:
        super().__init__()
        self.pace = VisionPace(slowdown, self, self.sleep)
        self.step, self.left, self.share, self.done = step, step, share, 0.0
        self._launch()

    def advance(self, seconds: float, speed: float) -> None:
        while speed * seconds >= self.left:
            self.now += self.left / speed
            seconds -= self.left / speed
            self.done, self.left = self.done + self.left, self.step
            self.pace.step_ended()
            self._launch()
        self.now += seconds
        self.done, self.left = self.done + speed * seconds, self.left - speed * seconds

    def sleep(self, seconds: float) -> None:
        self.slept += seconds
        self.advance(seconds, 1.0)

    def encode(self, slice_s: float, count: int) -> None:
        for _ in range(count):
            self.pace.begin()
            self.advance(slice_s, self.share)
            self.pace.end()
            self.pace.rest()

    def slowed_by(self, slice_s: float, count: int) -> float:
        """How much longer decoding takes while the tower encodes."""
        start, done = self.now, self.done
        self.encode(slice_s, count)
        return (self.now - start) / (self.done - done)

    def _launch(self) -> None:
        with self.pace.launch(True):
            pass


@pytest.mark.parametrize("slice_s", [0.0004, 0.02, 0.3])
@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("slowdown", [1.25, 2.0])
def test_the_slowdown_is_used_and_not_exceeded(slowdown: float, share: float, slice_s: float):
    """A tower that rests although decoding advances, or that relies on steps it has slowed."""
    machine = Sharing(slowdown, step=0.01, share=share)
    machine.advance(0.1, 1.0)
    machine.encode(slice_s, count=round(0.6 / slice_s))  # what a step earns shows at its end
    slept = machine.slept
    slowed = machine.slowed_by(slice_s, count=round(6 / slice_s))
    assert slowed == pytest.approx(min(slowdown, 1 / share), rel=0.02)
    if 1 / share < slowdown:
        assert machine.slept - slept <= 7 * 2 * 0.01  # for a sample per second


@pytest.mark.parametrize("step", [0.004, 0.03])
def test_steps_become_shorter_or_longer(step: float):
    """Rollouts end or join while images keep coming: the length of an undisturbed step measured
    once, at the beginning."""
    machine = Sharing(2.0, step=0.01, share=0.4)
    machine.advance(0.1, 1.0)
    machine.encode(0.001, count=500)
    machine.step = step
    machine.encode(0.001, count=3000)
    assert machine.slowed_by(0.001, count=3000) == pytest.approx(2.0, rel=0.05)


def test_a_slice_before_the_first_step():
    """Decoding that begins in a long slice gets back what it did not lose."""
    pace, clock = pace_of(2.0)
    pace.begin()
    clock.now += 10
    with pace.launch(True):
        pass
    clock.now += 0.1
    pace.step_ended()
    pace.end()
    with pace.launch(True):
        pass
    slept = clock.slept
    pace.rest()
    assert clock.slept - slept < 1


def test_the_first_steps_are_slowed_ones():
    """Steps that the tower has slowed taken for undisturbed ones, when no other is known."""
    machine = Sharing(2.0, step=0.01, share=0.1)
    assert machine.slowed_by(0.02, count=300) <= 2.05


def test_a_step_that_also_read_a_prompt():
    """Its length taken for that of all steps."""
    machine = Sharing(2.0, step=1.0, share=0.1)
    machine.step = 0.01
    machine.advance(1.025, 1.0)
    assert machine.slowed_by(0.02, count=300) <= 2.05


def test_the_first_step_after_a_while():
    """The time in which nothing decoded taken for a part of the step."""
    machine = Sharing(2.0, step=0.01, share=0.1)
    machine.pace.idle()
    machine.now += 1000
    machine._launch()
    machine.advance(0.01, 1.0)
    assert machine.slowed_by(0.02, count=300) <= 2.05


def test_what_steps_earn_does_not_add_up():
    """A minute in which decoding was hardly slowed, followed by one without a rest."""
    machine = Sharing(2.0, step=0.01, share=0.9)
    machine.advance(0.1, 1.0)
    machine.encode(0.001, count=5000)
    machine.share = 0.001
    start, slept = machine.now, machine.slept
    machine.encode(0.001, count=50)
    assert machine.slept > slept
    assert machine.now - start - (machine.slept - slept) <= machine.slept - slept + 3 * 0.01


def test_time_without_decoding_is_not_owed():
    """Slices before the first step, or a rest cut short by the last step's end, that a later step
    waits for."""
    pace, clock = pace_of(2.0)
    assert [*slices(pace, clock, 5.0, 1)] == [0]
    with pace.launch(True):
        pass
    clock.events[clock.now + 2.0] = pace.idle
    assert next(slices(pace, clock, 1.9, 1)) < 0.2
    with pace.launch(True):
        pass
    assert next(slices(pace, clock, 1.0, 1)) == pytest.approx(1)


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
    """A deadlock: a step was launched and will never be collected."""
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
