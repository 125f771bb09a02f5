"""How much encoding images may slow decoding: the vision tower rests when it has done so too much.

The tower runs in slices. While rollouts decode, an account holds the time that the tower may still
take: a slice of r costs r; decoding that would take d undisturbed earns s * d, for d of work that
was done during slices, and (s - 1) * d for a rest, in which decoding has the machine for itself. So
a step takes s times as long on average at most, however the two share the machine. If decoding
makes no progress during slices, the tower gets a share 1 - 1/s of the time; if each gets half of
the machine and s is 2, it never rests. How long a step takes undisturbed is measured: when no step
without a slice has ended for a while, the tower rests for one. Every rest is limited, so an engine
that stops can delay the images but not block them.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import inf
from statistics import median
from threading import Lock

from model.errors import InputError
from pacore_sched.sched.view_queue import VISION_BUDGETS

BETWEEN_STEPS_S = 0.05  # a step that begins so soon after another continues decoding
SAMPLES = 3  # undisturbed steps, of which the median counts: a step may have read a prompt
SAMPLE_AGE_S = 1.0  # after which the number of rollouts may be another
SAMPLING_S, SAMPLING_POLL_S = 0.5, 0.002  # the longest rest for a sample


def slowdown_of(budget: str) -> float:
    """The slowdown of a name in VISION_BUDGETS. Raises InputError for another name."""
    if budget not in VISION_BUDGETS:
        raise InputError(
            f"unknown vision budget {budget!r}; choose one of: {', '.join(VISION_BUDGETS)}"
        )
    return VISION_BUDGETS[budget]


class VisionPace:
    """Rests for the thread that encodes images while another thread decodes.

    slowdown: how much longer a decode step may take, more than 1; inf: the tower never rests
    clock, sleep: in seconds
    """

    def __init__(
        self,
        slowdown: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._slowdown, self._clock, self._sleep = slowdown, clock, sleep
        self._in_flight = 0
        self._last_end = -inf
        self._lock = Lock()  # of all below
        self._owed = 0.0  # seconds that the tower has taken and decoding has not earned
        self._slice_start: float | None = None  # of the slice that runs
        self._ran = 0.0  # length of all slices before it
        self._step = (0.0, 0.0)  # start of the oldest step in flight, and the tower's time then
        self._undisturbed: deque[float] = deque(maxlen=SAMPLES)  # lengths of steps
        self._sampled = -inf  # when the last of them ended, or a rest for one

    @property
    def applies(self) -> bool:
        """Whether rollouts decode and may be slowed only so much."""
        if self._slowdown == inf:
            return False
        return self._in_flight > 0 or self._clock() - self._last_end < BETWEEN_STEPS_S

    @contextmanager
    def launch(self, decodes: bool) -> Iterator[None]:
        """Context around the launch of a step; decodes: whether rollouts decode in it."""
        if decodes and not self._in_flight:
            self._mark_step(first=self._clock() - self._last_end >= BETWEEN_STEPS_S)
        self._in_flight += decodes
        try:
            yield
        except BaseException:
            self.idle()
            raise

    def step_ended(self) -> None:
        """The oldest step in flight in which rollouts decode has ended."""
        self._in_flight = max(0, self._in_flight - 1)
        start, ran_before = self._step
        now = self._last_end = self._mark_step()
        length, tower_s = now - start, self._step[1] - ran_before
        with self._lock:
            if not tower_s:
                self._undisturbed.append(length)
                self._sampled = now
            elif self._slowdown < inf:
                step = min(self._step_s(), length)
                self._owed -= self._slowdown * max(0.0, step - (length - tower_s))

    def idle(self) -> None:
        """Nothing decodes, whatever has been launched: ends a rest."""
        self._in_flight, self._last_end = 0, -inf

    def begin(self) -> None:
        """In the encoder's thread: a slice begins."""
        with self._lock:
            self._slice_start = self._clock()

    def end(self) -> None:
        """In the encoder's thread: the slice has ended."""
        with self._lock:
            if self._slice_start is None:
                return
            length = self._clock() - self._slice_start
            self._slice_start = None
            self._ran += length
            # What a step has earned is for the next one: it does not add up.
            self._owed = max(self._owed + length, -self._slowdown * self._step_s())

    def rest(self) -> None:
        """In the encoder's thread, between slices: let decoding catch up."""
        began = self._clock()
        while self.applies:
            start, owed = self._clock(), self._owed  # a step that ends may change it
            if owed > 1e-9:  # no shorter time passes on a clock
                self._sleep(min(owed / (self._slowdown - 1), BETWEEN_STEPS_S))
            elif start - self._sampled <= SAMPLE_AGE_S:
                break
            elif start - began < SAMPLING_S:
                self._sleep(SAMPLING_POLL_S)
            else:  # steps are too long to wait for
                self._sampled = start
                break
            with self._lock:
                self._owed -= (self._clock() - start) * (self._slowdown - 1)
        if not self.applies:
            self._owed = 0.0

    def _step_s(self) -> float:
        """Seconds of an undisturbed step; 0: not known."""
        return median(self._undisturbed) if self._undisturbed else 0.0

    def _mark_step(self, first: bool = False) -> float:
        """Note that a step begins now, when another ends or nothing was in flight. What runs of a
        slice before the first one costs decoding nothing."""
        with self._lock:
            now = self._clock()
            running = 0.0 if self._slice_start is None else now - self._slice_start
            self._step = now, self._ran + running
            if first and self._slice_start is not None:
                self._slice_start, self._ran = now, self._ran + running
        return now
