"""What the steps of an engine cost, measured while it runs."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from model.config import DecoderConfig
from pacore_sched.engine.engine import Engine
from pacore_sched.engine.executor import ModelExecutor
from pacore_sched.sched.prefix_tree import PrefixTree
from pacore_sched.sched.request import Batch
from pacore_sched.sim.calibration import FittedCost, fit
from pacore_sched.sim.cost_model import StepShape, StepWork
from pacore_sched.sim.executor import step_shape

SAMPLES = 256  # of the latest steps, to which the cost model is fitted
EVERY = 8  # one of so many steps is sampled: the shape of a batch of hundreds takes 0.1 ms
REFIT_S = 5.0  # seconds between fits, which take some hundredths of a second


class StepCosts:
    """Samples of an engine's steps, and the cost model fitted to them."""

    def __init__(self, engine: Engine[ModelExecutor], config: DecoderConfig) -> None:
        self._work = StepWork(config)
        self._samples: deque[tuple[StepShape, float]] = deque(maxlen=SAMPLES)
        self._shape: StepShape | None = None
        self._steps = 0
        self.measured = False
        self._model = FittedCost(self._work, (1,), (0.0,), 0.0, 0.0, 0.0)
        self._fitted = float("-inf")
        self._launch = engine.executor.launch
        engine.executor.launch = self._record_and_launch  # type: ignore[method-assign, assignment]

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Time a step of the engine. With steps launched ahead, this is the time of the one before;
        neighbours are alike."""
        self._shape, start = None, time.perf_counter()
        yield
        if self._shape:
            self._samples.append((self._shape, time.perf_counter() - start))

    def model(self) -> FittedCost:
        """The cost model of the latest steps; before the first, `measured` is false."""
        if self._samples and (now := time.monotonic()) - self._fitted >= REFIT_S:
            self._model, self._fitted = fit(list(self._samples), self._work), now
            self.measured = True
        return self._model

    def _record_and_launch(self, tree: PrefixTree, batch: Batch) -> object:
        self._steps += 1
        if batch.chunks or self._steps % EVERY == 0 or len(self._samples) < SAMPLES:
            self._shape = step_shape(tree, batch)
        return self._launch(tree, batch)
