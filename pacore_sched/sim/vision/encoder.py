"""Images on their way to embeddings, on the simulator's clock: host, link and vision tower.

A pool of host workers decodes, resizes and cuts images, each on one core, in the order in which
they come. Their pixels travel to the device. The tower encodes batches of views that the engine's
queue chooses (sched/view_queue.py), on the GPU that also decodes: beside a step, for as long as the
vision budget allows; alone, when there is no step.
"""

from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from itertools import count
from math import inf

from pacore_sched.sched.view_queue import MAX_PATCHES, ViewQueue
from pacore_sched.sim.machine import Machine
from pacore_sched.sim.vision.cost import VisionCost
from pacore_sched.sim.workload import Photo

Job = tuple[int, int]  # a problem and the number of one of its images


class SimEncoder:
    """Encodes each problem's images once. Times are seconds on the executor's clock.

    slowdown: how many times longer a step may take while images are encoded. With inf, a step waits
        until the batch of views that is being encoded is complete.
    max_patches: of a batch; 0: each image is a batch
    """

    def __init__(
        self,
        cost: VisionCost,
        machine: Machine,
        slowdown: float,
        max_patches: int = MAX_PATCHES,
    ) -> None:
        self.cost, self.machine, self.slowdown = cost, machine, slowdown
        self._whole_images = not max_patches
        self._workers = [0.0] * machine.host_workers  # a heap: when each has nothing left to do
        # A heap of images that are not yet on the device: (time of arrival, number, job, views).
        self._coming: list[tuple[float, int, Job, tuple[int, ...]]] = []
        self._numbers = count()
        self._queue: ViewQueue[Job] = ViewQueue(max(1, max_patches))
        self._batch: list[tuple[Job, int, int]] = []  # in the tower: views [start, stop) of jobs
        self._batch_s = 0.0  # that the batch still takes
        self._views: dict[Job, tuple[int, ...]] = {}  # patches of each view on the device
        self._left: dict[int, int] = {}  # problem -> views that are not yet encoded

    def submit(self, problem: int, photos: Sequence[Photo], clock: float) -> Callable[[], bool]:
        """Encode a problem's images, unless that has been done; returns whether they are encoded.

        The clock must not be earlier than in the last call.
        """
        if problem not in self._left:
            self._left[problem] = 0
            for index, photo in enumerate(photos):
                views = self.cost.work.views(photo)
                self._left[problem] += len(views)
                done = max(clock, heappop(self._workers)) + photo.pixels * self.machine.host_pixel_s
                heappush(self._workers, done)
                arrival = done + self.cost.work.pixel_bytes(photo) / (1e9 * self.machine.link_gb_s)
                heappush(self._coming, (arrival, next(self._numbers), (problem, index), views))
        return lambda: self._left[problem] == 0

    def alone_s(self, photos: Sequence[Photo]) -> float:
        """Seconds until a problem's images are encoded if there are no others, and no steps."""
        encoder = SimEncoder(self.cost, self.machine, self.slowdown)
        encoded, clock = encoder.submit(0, photos, 0.0), 0.0
        while not encoded():
            clock = encoder.quiet_until(clock)
            clock += encoder.run(encoder.batch_s(clock), clock)
        return clock

    def quiet_until(self, clock: float) -> float:
        """Until when the tower has nothing to do: `clock` if it has work, inf without images."""
        self._receive(clock)
        if self._batch or self._queue:
            return clock
        return self._coming[0][0] if self._coming else inf

    def beside(self, step_s: float, clock: float) -> float:
        """Encode beside a step of `step_s` seconds that starts at `clock`; returns the seconds that
        this takes."""
        if self.slowdown == inf:
            return self.run(self.batch_s(clock), clock)
        return self.run((self.slowdown - 1) * step_s, clock)

    def batch_s(self, clock: float) -> float:
        """Seconds left of the batch in the tower, the next one if there is none; 0: no images."""
        self._receive(clock)
        if not self._batch and self._queue:
            self._batch = self._queue.next()
            views = [n for job, start, stop in self._batch for n in self._taken(job, start, stop)]
            self._batch_s = self.cost.seconds(views)
        return self._batch_s

    def run(self, limit: float, clock: float) -> float:
        """Encode for up to `limit` seconds what is on the device at `clock`; returns the seconds
        that this takes."""
        used = 0.0
        while used < limit and self.batch_s(clock):
            part = min(self._batch_s, limit - used)
            used += part
            self._batch_s -= part
            if not self._batch_s:
                for job, start, stop in self._batch:
                    self._left[job[0]] -= len(self._taken(job, start, stop))
                self._batch = []
        return used

    def _receive(self, clock: float) -> None:
        while self._coming and self._coming[0][0] <= clock:
            _, _, job, views = heappop(self._coming)
            self._views[job] = views
            self._queue.add(job, [sum(views)] if self._whole_images else views)

    def _taken(self, job: Job, start: int, stop: int) -> tuple[int, ...]:
        """The patches of the views that the queue calls `start` to `stop`."""
        return self._views[job] if self._whole_images else self._views[job][start:stop]
