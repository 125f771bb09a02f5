"""How much encoding images may slow decoding: the vision tower gets a share of the time.

In the worst case, decoding makes no progress while the tower runs. A step that would take d then
takes s * d if the tower runs for a share 1 - 1/s of the time, whatever d is. The tower therefore
runs in slices, and after a slice of r pauses for r / (s - 1), if rollouts decode. Every pause is
limited by the slice before it, so an engine that stops can delay the images but not block them.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import inf

from model.errors import InputError
from pacore_sched.sched.view_queue import VISION_BUDGETS

BETWEEN_STEPS_S = 0.05  # a step that begins so soon after another continues decoding


def slowdown_of(budget: str) -> float:
    """The slowdown of a name in VISION_BUDGETS. Raises InputError for another name."""
    if budget not in VISION_BUDGETS:
        raise InputError(
            f"unknown vision budget {budget!r}; choose one of: {', '.join(VISION_BUDGETS)}"
        )
    return VISION_BUDGETS[budget]


class VisionPace:
    """Pauses the thread that encodes images while another thread decodes.

    slowdown: how much longer a decode step may take, more than 1; inf: the tower never pauses
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
        self._slice_start = clock()

    @property
    def applies(self) -> bool:
        """Whether rollouts decode and may be slowed only so much."""
        if self._slowdown == inf:
            return False
        return self._in_flight > 0 or self._clock() - self._last_end < BETWEEN_STEPS_S

    @contextmanager
    def launch(self, decodes: bool) -> Iterator[None]:
        """Context around the launch of a step; decodes: whether rollouts decode in it."""
        self._in_flight += decodes
        try:
            yield
        except BaseException:
            self.idle()
            raise

    def step_ended(self) -> None:
        """The oldest step in flight in which rollouts decode has ended."""
        self._in_flight = max(0, self._in_flight - 1)
        self._last_end = self._clock()

    def idle(self) -> None:
        """Nothing decodes, whatever has been launched: ends a pause."""
        self._in_flight, self._last_end = 0, -inf

    def begin(self) -> None:
        """In the encoder's thread: the tower begins to run."""
        self._slice_start = self._clock()

    def wait(self) -> None:
        """In the encoder's thread: pause after the slice that ends here; the next one follows."""
        now = self._clock()
        end = now + (now - self._slice_start) / (self._slowdown - 1)
        while self.applies and (left := end - self._clock()) > 0:
            self._sleep(min(left, BETWEEN_STEPS_S))
        self._slice_start = self._clock()
