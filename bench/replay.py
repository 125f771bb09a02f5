"""How far the simulator is from the engine: `python -m bench replay`.

Problems with pinned lengths run through the engine on a real model, step by step on the clock, and
through the simulator, whose cost model has been fitted to the steps of other runs: other problems,
widths, lengths and numbers of rollouts. Compared are makespan and mean time to an answer. Prompts
are random ids, of the sizes that the workload says: times do not depend on them.
"""

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, median

import torch

from bench.ops import MAIN_DTYPE
from bench.packing import ALL, MODELS, PLANS, Plan
from bench.rows import origin
from bench.show import titled
from model.step3vl import Step3VL
from model.terminal import progress
from pacore_sched.calibration import FittedCost, fit
from pacore_sched.cost_model import StepShape, StepWork
from pacore_sched.engine import Engine, policy_named
from pacore_sched.pacore import engine_for
from pacore_sched.prefix_tree import PrefixTree
from pacore_sched.request import Batch, Group, Sampling
from pacore_sched.simulator import Record, Replica, step_shape
from pacore_sched.workload import Problem, Workload

KV_TOKENS, TOKEN_BUDGET = 65_536, 512
# What is judged, and what the cost model is fitted to: nothing of the one is in the other.
JUDGED = Workload("judged", 8, (8,), 60, 0, 40, max_tokens=200)
FITTED = (
    (Workload("fitted wide", 5, (12,), 40, 0, 90, max_tokens=120), Plan("later-round-first", ALL)),
    (Workload("fitted narrow", 3, (5,), 50, 0, 25, max_tokens=120), Plan("fcfs", 10)),
    (Workload("fitted alone", 3, (4,), 40, 0, 60, max_tokens=120), Plan("one-at-a-time", ALL)),
)
JUDGED_PLANS = [plan for plan in PLANS if not plan.speculate]
SAMPLES = list[tuple[StepShape, float]]


def run(device: torch.device) -> Iterator[dict]:
    """A row per policy."""
    name = MODELS[device.type]
    model = Step3VL.from_preset(name, device=device, dtype=MAIN_DTYPE[device.type])
    yield from validate(model)


def validate(
    model: Step3VL,
    judged: Workload = JUDGED,
    fitted: Sequence[tuple[Workload, Plan]] = FITTED,
    plans: Sequence[Plan] = JUDGED_PLANS,
) -> list[dict]:
    """Rows of the plans: measured and simulated seconds, and the simulator's errors."""
    problems = judged.draw(seed=0)
    total = sum(p.tokens for w, _ in fitted for p in w.draw(seed=1))
    total += len(plans) * sum(p.tokens for p in problems)
    with progress("replay", total) as advance:
        samples: SAMPLES = []
        for workload, plan in fitted:
            samples += replay(model, plan, workload.draw(seed=1), advance).samples
        cost = fit(samples, StepWork(model.config.decoder))
        runs = {plan: replay(model, plan, problems, advance) for plan in plans}
    residual = median(abs(cost.seconds(shape) / seconds - 1) for shape, seconds in samples)
    rows = []
    for plan, measured in runs.items():
        simulated = simulate(cost, plan, problems, judged.max_tokens)
        rows.append(
            {
                "op": "replay",
                "case": f"{model.config.name} {judged.problems} x {list(judged.widths)}",
                "impl": plan.name,
                "dtype": str(model.dtype).removeprefix("torch."),
                "makespan_s": measured.makespan_s,
                "makespan_simulated_s": simulated.makespan_s,
                "makespan_error": simulated.makespan_s / measured.makespan_s - 1,
                "tta_mean_s": measured.tta_mean_s,
                "tta_mean_simulated_s": simulated.tta_mean_s,
                "tta_error": simulated.tta_mean_s / measured.tta_mean_s - 1,
                "steps": len(measured.samples),
                "steps_simulated": simulated.steps,
                "fitted_steps": len(samples),
                "fit_residual": residual,
                "failure": None,
                **origin(model.device),
            }
        )
    return rows


@dataclass
class Replayed:
    """One run of pinned problems: when each was answered, and how long steps of each shape took."""

    answers: list[float]
    samples: SAMPLES
    steps: int

    @property
    def makespan_s(self) -> float:
        return max(self.answers)

    @property
    def tta_mean_s(self) -> float:
        return fmean(self.answers)


def replay(
    model: Step3VL, plan: Plan, problems: Sequence[Problem], advance: object = lambda n: None
) -> Replayed:
    """Run pinned problems, all there from the start, through the engine."""
    engine = engine_for(
        model,
        policy=plan.policy,
        max_running=plan.max_running,
        kv_tokens=KV_TOKENS,
        token_budget=TOKEN_BUDGET,
    )
    shapes = _Shapes(engine)
    live = {_submit(engine, n, p, 0): (n, p) for n, p in enumerate(problems)}
    answers, samples = [], []
    start = last = time.perf_counter()
    while engine.busy:
        ended = engine.step()
        for group in {rollout.group for rollout in ended}:
            if group in engine.scheduler.groups:
                continue
            number, problem = live.pop(group)
            if group.round + 1 < len(problem.lengths):
                live[_submit(engine, number, problem, group.round + 1)] = number, problem
            else:
                answers.append(time.perf_counter() - start)
        advance(sum(len(rollout.tokens) for rollout in ended))
        now = time.perf_counter()
        if shapes.last:
            samples.append((shapes.last, now - last))
        last, shapes.last = now, None
    engine.executor.close()
    return Replayed(answers, samples, len(samples))


def simulate(
    cost: FittedCost, plan: Plan, problems: Sequence[Problem], max_tokens: int
) -> Replayed:
    """The same problems on the virtual clock."""
    answers: list[float] = []

    def answered(number: int, seconds: float) -> None:
        answers.append(seconds)

    def over(records: list[Record]) -> None:
        """Rounds do not matter here."""

    replica = Replica(
        policy_named(plan.policy),
        cost,
        KV_TOKENS // 64,
        64,
        max_running=plan.max_running,
        token_budget=TOKEN_BUDGET,
        max_tokens=max_tokens,
        on_round=over,
        on_answer=answered,
    )
    for number, problem in enumerate(problems):
        replica.submit(number, problem)
    while replica.step():
        pass
    return Replayed(answers, [], replica.executor.usage.steps)


class _Shapes:
    """Notes the shape of every batch that an engine launches."""

    def __init__(self, engine: Engine) -> None:
        self.last: StepShape | None = None
        self._launch = engine.executor.launch
        engine.executor.launch = self._noted

    def _noted(self, tree: PrefixTree, batch: Batch) -> object:
        self.last = step_shape(tree, batch)
        return self._launch(tree, batch)


def _submit(engine: Engine, number: int, problem: Problem, round_: int) -> Group:
    """A problem's round, with random ids of as many tokens as its prompt has."""
    lengths = problem.lengths[round_]
    before = problem.lengths[round_ - 1] if round_ else None
    draw = random.Random(f"{number}/{round_}")
    ids = [draw.randrange(256) for _ in range(problem.prompt_tokens(before))]
    return engine.submit(
        [engine.executor.segment(ids[:-1])],
        ids[-1],
        dict.fromkeys(range(len(lengths)), 0),
        Sampling(max(lengths), ignore_eos=True),
        problem=number,
        round=round_,
        lengths=dict(enumerate(lengths)),
    )


def display(rows: Sequence[dict]) -> None:
    """The rows as a table."""
    header = ("policy", " makespan s", " simulated", " error", " time to answer s", " simulated")
    header += (" error", " steps", " simulated")
    lines = [
        [
            row["impl"],
            f"{row['makespan_s']:.1f}",
            f"{row['makespan_simulated_s']:.1f}",
            f"{100 * row['makespan_error']:+.1f} %",
            f"{row['tta_mean_s']:.1f}",
            f"{row['tta_mean_simulated_s']:.1f}",
            f"{100 * row['tta_error']:+.1f} %",
            str(row["steps"]),
            str(row["steps_simulated"]),
        ]
        for row in rows
    ]
    titled(f"replay: {rows[0]['case']}", rows, header, lines)
    print(
        f"cost model fitted to {rows[0]['fitted_steps']} steps of other runs,"
        f" which it misses by {100 * rows[0]['fit_residual']:.1f} % (median)"
    )
