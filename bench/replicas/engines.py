"""The engines of the studies: each on a core of its own, in a replica or in a plain process."""

import fcntl
import os
import pickle
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import BinaryIO

import torch

from bench.measure.timing import keep_freed_memory
from bench.studies.replay import Shapes
from model.errors import InputError
from model.step3vl import Step3VL
from pacore_sched.answers.pacore import Pacore, engine_for
from pacore_sched.engine.engine import Engine
from pacore_sched.engine.stopping import Stopping
from pacore_sched.sched.request import Rollout, Sampling
from pacore_sched.sim.cost_model import StepShape

MODELS = ("tiny", "smollm2-135m")
MAX_RUNNING, TOKEN_BUDGET, KV_TOKENS = 32, 512, 16_384  # of each engine


@dataclass(frozen=True)
class Build:
    """Makes an engine on a core of its own, as replicas/actors.py asks for. Rounds are single:
    the prompts of later rounds depend on texts, so no two runs with pinned lengths have the same.

    cores: a folder that all engines which may run at the same time share
    lengths: problem -> tokens of its rollouts; empty: as many as the sampling allows
    samples: a folder for the shapes and times of steps
    """

    model: str
    width: int
    max_tokens: int
    cores: str
    lengths: Mapping[int, Sequence[int]]
    samples: str | None = None

    def __call__(self, model: Step3VL | None = None, kv_tokens: int | None = None) -> Pacore:
        take_core(self.cores)
        torch.set_num_threads(1)
        keep_freed_memory()
        model = model or Step3VL.from_preset(self.model, device="cpu", dtype=torch.float32)
        engine = engine_for(
            model,
            max_running=MAX_RUNNING,
            kv_tokens=kv_tokens or KV_TOKENS,
            token_budget=TOKEN_BUDGET,
            prefix_cache=False,  # which the simulator does not have
        )
        if self.lengths:
            engine.stopping = _PinnedLengths(model, self.lengths)
        if self.samples:
            _StepRecorder(engine, Path(self.samples) / str(os.getpid()))
        sampling = Sampling(self.max_tokens, ignore_eos=True)
        return Pacore(model, engine, (self.width,), sampling, synthesis=False)


def settings(pacore: Pacore) -> dict[str, object]:
    """What replicas must agree on."""
    return {"model": pacore.model.config.name}


@cache
def take_core(folder: str) -> int:
    """Pin this process to a core that no other process of the folder has taken.

    Raises InputError if there is none.
    """
    for core in sorted(os.sched_getaffinity(0)):
        file = os.open(Path(folder) / str(core), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until this process ends
        except BlockingIOError:
            os.close(file)
            continue
        os.sched_setaffinity(0, {core})
        return core
    raise InputError("there are fewer cores than engines")


class _PinnedLengths(Stopping):
    """Ends rollouts at given lengths. Limits on their tokens, which policies see, stay as they
    are."""

    def __init__(self, model: Step3VL, lengths: Mapping[int, Sequence[int]]) -> None:
        super().__init__(model.tokenizer, ())
        self._lengths = lengths

    def reason(self, rollout: Rollout) -> str | None:
        length = self._lengths[rollout.group.problem][rollout.index]
        return "length" if len(rollout.tokens) >= length else None


@dataclass(frozen=True)
class StepSample:
    """A step of an engine: when it ended (time.monotonic), and the seconds since the step before,
    or if there was no work in between, since its start. So they include what a replica does between
    steps."""

    ended: float
    shape: StepShape
    seconds: float


class _StepRecorder:
    """Writes samples of an engine's steps to a file; they are complete when it has no work."""

    def __init__(self, engine: Engine, path: Path) -> None:
        self._engine, self._step, self._shapes = engine, engine.step, Shapes(engine)
        self._file, self._last = path.open("wb"), 0.0
        engine.step = self._timed_step  # type: ignore[method-assign]

    def _timed_step(self) -> list[Rollout]:
        start = self._last or time.monotonic()
        ended = self._step()
        now = time.monotonic()
        if self._shapes.last:
            pickle.dump(StepSample(now, self._shapes.last, now - start), self._file)
            self._shapes.last = None
        self._last = now if self._engine.busy else 0.0
        if not self._last:
            self._file.flush()
        return ended


def read_samples(folder: Path) -> list[StepSample]:
    """The samples of all engines."""
    return [sample for path in folder.iterdir() for sample in _read(path)]


def _read(path: Path) -> Iterator[StepSample]:
    with path.open("rb") as file:
        while (sample := _next(file)) is not None:
            yield sample


def _next(file: BinaryIO) -> StepSample | None:
    try:
        return pickle.load(file)
    except EOFError:
        return None
