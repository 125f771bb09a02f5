"""The simulator's error against the engine: `python -m bench replay`.

Problems with pinned lengths run through the engine on a real model, and through the simulator,
whose cost model is fitted to the steps of other runs: other problems, widths, lengths and numbers
of rollouts. Makespan and mean time to answer are compared. All runs, including those for fitting,
alternate step by step, each on a clock that counts only its own steps, so a slow minute of the
machine slows all of them. Prompts are random ids with the workload's lengths.
"""

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, median

import torch

from bench.measure.devices import MAIN_DTYPE
from bench.measure.origin import origin
from bench.studies.packing import ALL, MODELS, SETUPS, Setup
from kernels.runtime.dtypes import dtype_name
from model.step3vl import Step3VL
from model.terminal import progress
from pacore_sched.answers.pacore import engine_for
from pacore_sched.engine.engine import Engine, find_policy
from pacore_sched.sched.prefix_tree import PrefixTree
from pacore_sched.sched.request import Batch, Group, Sampling
from pacore_sched.sim.calibration import FittedCost, fit
from pacore_sched.sim.cost_model import StepShape, StepWork
from pacore_sched.sim.executor import step_shape
from pacore_sched.sim.simulator import Record, Replica
from pacore_sched.sim.workload import SimProblem, Workload

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
JUDGED_SETUPS = [setup for setup in SETUPS if not setup.speculate]
SAMPLES = list[tuple[StepShape, float]]


def run(device: torch.device) -> Iterator[dict]:
    """A row per policy."""
    name = MODELS[device.type]
    model = Step3VL.from_preset(name, device=device, dtype=MAIN_DTYPE[device.type])
    yield from validate(model)


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
        makespans = max(measured.answers), max(simulated.answers)
        means = fmean(measured.answers), fmean(simulated.answers)
        rows.append(
            {
                "op": "replay",
                "case": f"{model.config.name} {judged.problems} x {list(judged.widths)}",
                "impl": setup.name,
                "dtype": dtype_name(model.dtype),
                "makespan_s": makespans[0],
                "makespan_simulated_s": makespans[1],
                "makespan_error": makespans[1] / makespans[0] - 1,
                "tta_mean_s": means[0],
                "tta_mean_simulated_s": means[1],
                "tta_error": means[1] / means[0] - 1,
                "steps": len(measured.samples),
                "steps_simulated": simulated.steps,
                "fitted_steps": len(samples),
                "fit_residual": residual,
                "failure": None,
                **origin(model.device),
            }
        )
    return rows


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
    steps: int


def simulate(
    cost: FittedCost, setup: Setup, problems: Sequence[SimProblem], max_tokens: int
) -> Simulated:
    """Run the same problems on the virtual clock."""
    answers: list[float] = []

    def on_answer(number: int, seconds: float) -> None:
        answers.append(seconds)

    def on_round(records: list[Record]) -> None:
        """Rounds are not compared."""

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
    )
    for number, problem in enumerate(problems):
        replica.submit(number, problem)
    while replica.step():
        pass
    return Simulated(answers, replica.executor.usage.steps)


class Shapes:
    """Records the shape of every batch that an engine launches."""

    def __init__(self, engine: Engine) -> None:
        self.last: StepShape | None = None
        self._launch = engine.executor.launch
        engine.executor.launch = self._record_and_launch

    def _record_and_launch(self, tree: PrefixTree, batch: Batch) -> object:
        self.last = step_shape(tree, batch)
        return self._launch(tree, batch)


def _submit(engine: Engine, number: int, problem: SimProblem, round_: int) -> Group:
    """Submit a round of a problem, with as many random ids as its prompt has tokens."""
    lengths = problem.lengths[round_]
    previous = problem.lengths[round_ - 1] if round_ else None
    draw = random.Random(f"{number}/{round_}")
    ids = [draw.randrange(256) for _ in range(problem.prompt_tokens(previous))]
    return engine.submit(
        [engine.executor.segment(ids[:-1])],
        ids[-1],
        dict.fromkeys(range(len(lengths)), 0),
        Sampling(max(lengths), ignore_eos=True),
        problem=number,
        round=round_,
        lengths=dict(enumerate(lengths)),
    )
