"""The simulator's error against the engine: `python -m bench replay`.

Problems with pinned lengths run through the engine on a real model, and through the simulator,
whose cost model is fitted to the steps of other runs: other problems, widths, lengths and numbers
of rollouts. Makespan and mean time to answer are compared. All runs, including those for fitting,
alternate step by step, each on a clock that counts only its own steps, so a slow minute of the
machine slows all of them. Prompts are random ids with the workload's lengths.
Requests with photos run alone, on the wall clock, as a thread encodes their images meanwhile. The
cost of the vision tower is fitted to photos of other sizes. Cutting photos into views is not timed.
"""

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import inf
from statistics import fmean, median

import numpy as np
import torch

from bench.inputs.presets import vision_of
from bench.inputs.views import views_of
from bench.measure.devices import MAIN_DTYPE
from bench.measure.origin import origin
from bench.studies import images
from bench.studies.packing import ALL, MODELS, SETUPS, Setup
from kernels.runtime.dtypes import dtype_name
from model.step3vl import Step3VL
from model.terminal import progress
from model.text.prompt import image_ids
from model.vision.image import Views, load_image, preprocess
from pacore_sched.answers.pacore import engine_for
from pacore_sched.engine.engine import Engine, find_policy
from pacore_sched.sched.prefix_tree import PrefixTree
from pacore_sched.sched.request import Batch, Group, Sampling, Segment
from pacore_sched.sched.view_queue import DEFAULT_VISION_BUDGET, MAX_PATCHES, VISION_BUDGETS
from pacore_sched.sim.calibration import FittedCost, fit, fit_vision
from pacore_sched.sim.cost_model import StepShape, StepWork
from pacore_sched.sim.executor import step_shape
from pacore_sched.sim.machine import Machine
from pacore_sched.sim.simulator import Record, Replica
from pacore_sched.sim.vision.cost import VisionWork
from pacore_sched.sim.vision.encoder import SimEncoder
from pacore_sched.sim.workload import Photo, SimProblem, Workload

KV_TOKENS, TOKEN_BUDGET = 24_576, 512
# The workload that is judged, and those that the cost model is fitted to: they share nothing.
JUDGED = Workload("judged", 8, (8,), 60, (), 40, max_tokens=200)
FITTED = (
    (
        Workload("fitted wide", 5, (12,), 40, (), 90, max_tokens=120),
        Setup("later-round-first", ALL),
    ),
    (Workload("fitted narrow", 3, (5,), 50, (), 25, max_tokens=120), Setup("fcfs", 10)),
    (Workload("fitted alone", 3, (4,), 40, (), 60, max_tokens=120), Setup("one-at-a-time", ALL)),
)
REQUESTS, PHOTO_SIZE, PHOTO_QUESTION, PHOTO_TOKENS = 24, (1280, 720), 40, 60
PHOTO_SETUP = Setup("later-round-first", 64)
FITTED_SIZES = ((640, 480), (1000, 1000), (1920, 1080), (1500, 2000))  # width, height
NO_HOST = Machine("no host", 1, 1, 1, host_pixel_s=0.0, link_gb_s=inf)
JUDGED_SETUPS = [setup for setup in SETUPS if not setup.speculate]
SAMPLES = list[tuple[StepShape, float]]


def run(device: torch.device) -> Iterator[dict]:
    """A row per policy, and one for requests with photos."""
    dtype = MAIN_DTYPE[device.type]
    model = Step3VL.from_preset(MODELS[device.type], device=device, dtype=dtype)
    yield from validate(model)
    if model.vision is None:
        model = Step3VL.from_preset(images.MODELS[device.type], device=device, dtype=dtype)
    yield validate_photos(model)


def validate(
    model: Step3VL,
    judged: Workload = JUDGED,
    fitted: Sequence[tuple[Workload, Setup]] = FITTED,
    setups: Sequence[Setup] = JUDGED_SETUPS,
) -> list[dict]:
    """Rows of the setups: measured and simulated seconds, and the simulator's errors."""
    problems = judged.draw(seed=0)
    runs = {setup: Replay(model, setup, problems) for setup in setups}
    fitting_runs = [Replay(model, setup, workload.draw(seed=1)) for workload, setup in fitted]
    _alternate([*runs.values(), *fitting_runs])
    samples = [sample for run in fitting_runs for sample in run.samples]
    cost = fit(samples, StepWork(model.config.decoder))
    residual = median(abs(cost.seconds(shape) / seconds - 1) for shape, seconds in samples)
    rows = []
    for setup, measured in runs.items():
        simulated = simulate(cost, setup, problems, judged.max_tokens)
        rows.append(
            {
                "op": "replay",
                "case": f"{model.config.name} {judged.problems} x {list(judged.widths)}",
                "impl": setup.name,
                "dtype": dtype_name(model.dtype),
                **_compared("makespan", max(measured.answers), max(simulated.answers)),
                **_compared("tta_mean", fmean(measured.answers), fmean(simulated.answers)),
                "steps": len(measured.samples),
                "steps_simulated": simulated.steps,
                "fitted_steps": len(samples),
                "fit_residual": residual,
                "failure": None,
                **origin(model.device),
            }
        )
    return rows


def _compared(name: str, measured: float, simulated: float) -> dict:
    return {
        f"{name}_s": measured,
        f"{name}_simulated_s": simulated,
        f"{name.removesuffix('_mean')}_error": simulated / measured - 1,
    }


def validate_photos(
    model: Step3VL,
    requests: int = REQUESTS,
    fitted: Sequence[tuple[Workload, Setup]] = FITTED,
    repeats: int = 5,
) -> dict:
    """The row of single rollouts, each over two photos, which all arrive together."""
    PhotoReplay(model, 1).run()  # warm-up
    run = PhotoReplay(model, requests)
    fitting_runs = [Replay(model, setup, workload.draw(seed=1)) for workload, setup in fitted]
    _alternate(fitting_runs)
    steps = [sample for fitting in fitting_runs for sample in fitting.samples]
    cost = fit(steps, StepWork(model.config.decoder))
    tower = tower_samples(model, repeats)
    vision = fit_vision(tower, VisionWork(vision_of(model.config), model.config.decoder.hidden))
    run.run()
    max_patches = MAX_PATCHES if model.device.type == "cuda" else 0  # as in engine_for
    encoder = SimEncoder(vision, NO_HOST, VISION_BUDGETS[DEFAULT_VISION_BUDGET], max_patches)
    simulated = simulate(cost, PHOTO_SETUP, run.problems, PHOTO_TOKENS, encoder)
    return {
        "op": "replay",
        "case": f"{model.config.name} {requests} x two photos",
        "impl": PHOTO_SETUP.name,
        "dtype": dtype_name(model.dtype),
        **_compared("makespan", max(run.answers), max(simulated.answers)),
        **_compared("tta_mean", fmean(run.answers), fmean(simulated.answers)),
        **_compared("ttft_mean", fmean(run.first_tokens), fmean(simulated.first_tokens)),
        "steps": run.steps,
        "steps_simulated": simulated.steps,
        "fitted_steps": len(steps),
        "fit_residual": median(abs(cost.seconds(shape) / s - 1) for shape, s in steps),
        "vision_fit_residual": median(abs(vision.seconds(views) / s - 1) for views, s in tower),
        "failure": None,
        **origin(model.device),
    }


class PhotoReplay:
    """Pinned requests with photos, all submitted at the start of `run`, through an engine.

    answers, first_tokens: seconds from the start, in the order in which they came
    """

    def __init__(self, model: Step3VL, requests: int) -> None:
        self._model = model
        self.engine = engine_for(
            model,
            policy=PHOTO_SETUP.policy,
            max_running=PHOTO_SETUP.max_running,
            kv_tokens=KV_TOKENS,
            token_budget=TOKEN_BUDGET,
            prefix_cache=False,
        )
        self._views = [[random_photo(model, PHOTO_SIZE) for _ in range(2)] for _ in range(requests)]
        config, draw = model.config, random.Random(0)
        self._image_ids = [i for view in self._views[0] for i in image_ids(view.newlines, config)]
        photo = Photo(0, len(self._image_ids) // 2, len(self._views[0][0].newlines))
        self.problems = [
            SimProblem(
                0.0,
                len(self._image_ids),
                PHOTO_QUESTION,
                ((draw.randint(1, PHOTO_TOKENS),),),
                photos=(photo, photo),
            )
            for _ in range(requests)
        ]
        self.answers: list[float] = []
        self.first_tokens: list[float] = []
        self.steps = 0

    def run(self) -> None:
        """All requests, to their ends."""
        engine, start = self.engine, time.perf_counter()
        waiting = {self._submit(number) for number in range(len(self.problems))}
        while engine.busy:
            ended = engine.step()
            now = time.perf_counter() - start
            started = {group for group in waiting if group.rollouts[0].tokens}
            waiting -= started
            self.first_tokens += [now] * len(started)
            self.answers += [now] * len(ended)
        self.steps = engine.stats.steps
        engine.executor.close()

    def _submit(self, number: int) -> Group:
        executor = self.engine.executor
        features = executor.encode(self._views[number])
        image = executor.segment(self._image_ids, features)
        return _submit(self.engine, number, self.problems[number], 0, [image])


def tower_samples(model: Step3VL, repeats: int) -> list[tuple[list[int], float]]:
    """The patches of an image's views, and the seconds of encoding them, for each of FITTED_SIZES
    in turn, `repeats` times after a warm-up."""
    vision = vision_of(model.config)
    samples = []
    for _ in range(1 + repeats):
        for size in FITTED_SIZES:
            photo = random_photo(model, size)
            views = [rows * columns for rows, columns in views_of(*size, vision)]
            start = time.perf_counter()
            model.encode_images([photo]).cpu()  # waits for a GPU
            samples.append((views, time.perf_counter() - start))
    return samples[len(FITTED_SIZES) :]


def random_photo(model: Step3VL, size: tuple[int, int]) -> Views:
    """The views of an image of width x height pixels that the model has not seen."""
    pixels = np.random.default_rng().integers(0, 256, (*reversed(size), 3), dtype=np.uint8)
    return preprocess(load_image(pixels), vision_of(model.config))


class Replay:
    """Pinned problems, all submitted at the start, running through an engine.

    answers: when each problem was answered, in seconds of this run's own steps
    samples: the shape and the seconds of every step
    """

    def __init__(self, model: Step3VL, setup: Setup, problems: Sequence[SimProblem]) -> None:
        self.engine = engine_for(
            model,
            policy=setup.policy,
            max_running=setup.max_running,
            kv_tokens=KV_TOKENS,
            token_budget=TOKEN_BUDGET,
            prefix_cache=False,  # which the simulator does not have
        )
        self.answers: list[float] = []
        self.samples: SAMPLES = []
        self._seconds, self._tokens = 0.0, sum(problem.tokens for problem in problems)
        self._shapes = Shapes(self.engine)
        self._live = {_submit(self.engine, n, p, 0): (n, p) for n, p in enumerate(problems)}

    @property
    def progress(self) -> float:
        """The share of all tokens that have been generated."""
        return self.engine.stats.generated / self._tokens

    def step(self) -> None:
        """One step, then the next rounds of the problems whose rounds it ended."""
        start = time.perf_counter()
        ended = self.engine.step()
        done = [g for g in {r.group for r in ended} if g not in self.engine.scheduler.groups]
        answered = []
        for group in done:
            number, problem = self._live.pop(group)
            if group.round + 1 < len(problem.lengths):
                following = _submit(self.engine, number, problem, group.round + 1)
                self._live[following] = number, problem
            else:
                answered.append(number)
        seconds = time.perf_counter() - start
        self._seconds += seconds
        self.answers += [self._seconds] * len(answered)
        if self._shapes.last:
            self.samples.append((self._shapes.last, seconds))
            self._shapes.last = None


def _alternate(runs: Sequence[Replay]) -> None:
    """Run all to their ends, always stepping the one with the least progress."""
    active = [run for run in runs if run.engine.busy]
    with progress("replay", 1000 * len(runs)) as advance:
        reported = 0
        while active:
            min(active, key=lambda run: run.progress).step()
            active = [run for run in active if run.engine.busy]
            done = int(1000 * sum(run.progress for run in runs))
            advance(done - reported)
            reported = done
    for run in runs:
        run.engine.executor.close()


@dataclass(frozen=True)
class Simulated:
    """The simulator's result for one run."""

    answers: list[float]
    first_tokens: list[float]
    steps: int


def simulate(
    cost: FittedCost,
    setup: Setup,
    problems: Sequence[SimProblem],
    max_tokens: int,
    encoder: SimEncoder | None = None,
) -> Simulated:
    """Run the same problems on the virtual clock."""
    answers: list[float] = []
    first_tokens: list[float] = []

    def on_answer(number: int, seconds: float) -> None:
        answers.append(seconds)

    def on_round(records: list[Record]) -> None:
        first_tokens.extend(record.first_s for record in records)

    replica = Replica(
        find_policy(setup.policy),
        cost,
        KV_TOKENS // 64,
        64,
        max_running=setup.max_running,
        token_budget=TOKEN_BUDGET,
        max_tokens=max_tokens,
        context=KV_TOKENS,  # more than any of these problems reaches
        on_round=on_round,
        on_answer=on_answer,
        encoder=encoder,
    )
    for number, problem in enumerate(problems):
        replica.submit(number, problem)
    while replica.step():
        pass
    return Simulated(answers, first_tokens, replica.executor.usage.steps)


class Shapes:
    """Records the shape of every batch that an engine launches."""

    def __init__(self, engine: Engine) -> None:
        self.last: StepShape | None = None
        self._launch = engine.executor.launch
        engine.executor.launch = self._record_and_launch

    def _record_and_launch(self, tree: PrefixTree, batch: Batch) -> object:
        self.last = step_shape(tree, batch)
        return self._launch(tree, batch)


def _submit(
    engine: Engine,
    number: int,
    problem: SimProblem,
    round_: int,
    images: Sequence[Segment] = (),
) -> Group:
    """Submit a round of a problem, with as many random ids as its prompt has tokens after its
    images."""
    lengths = problem.lengths[round_]
    previous = problem.lengths[round_ - 1] if round_ else None
    draw = random.Random(f"{number}/{round_}")
    ids = [draw.randrange(256) for _ in range(problem.prompt_tokens(previous))]
    return engine.submit(
        [*images, engine.executor.segment(ids[:-1])],
        ids[-1],
        dict.fromkeys(range(len(lengths)), 0),
        Sampling(max(lengths), ignore_eos=True),
        problem=number,
        round=round_,
        lengths=dict(enumerate(lengths)),
    )
