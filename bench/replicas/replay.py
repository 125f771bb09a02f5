"""The simulated cluster against replicas on Ray: `python -m bench replicas replay`.

Problems with pinned lengths run on two replicas, with and without moving rollouts in the tail, and
in the simulator, whose cost model is fitted to the steps of other runs on the same replicas. Those
alternate with the judged ones, so that a slow minute of the machine slows both. Prompts are real,
and the simulator is told their numbers of tokens. Problems have one round: the prompt of a second
one would depend on the texts of the first.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median

import torch

from bench.measure.origin import origin
from bench.replicas.engines import (
    KV_TOKENS,
    MAX_RUNNING,
    TOKEN_BUDGET,
    Build,
    StepSample,
    read_samples,
)
from bench.replicas.runs import Run, fault, folders, run_replicas, started
from model.config import Config
from model.errors import InputError
from model.kv_cache import PAGE_SIZE
from model.step3vl import Step3VL
from model.terminal import progress, usable_cpus
from model.text.prompt import build_prompt
from pacore_sched.replicas.coordinator import SECONDS
from pacore_sched.sim.calibration import FittedCost, fit
from pacore_sched.sim.cluster import Setting, SimResult, simulate
from pacore_sched.sim.cost_model import StepWork
from pacore_sched.sim.tail_moves import TailMoves
from pacore_sched.sim.workload import SimProblem, Workload

REPLICAS, WIDTH, MAX_TOKENS = 2, 8, 1024
MEAN_TOKENS = 150  # of the judged problems
# The cost model is fitted to runs with full batches, and to runs with few rollouts.
FITTED = (
    Workload("full", 10, (WIDTH,), 90, (), 0, max_tokens=MAX_TOKENS),
    Workload("few", 3, (WIDTH,), 120, (), 0, max_tokens=MAX_TOKENS),
)
FIRST_FITTED = 1_000_000  # problems of the fitted runs are numbered from here
FORMS = {"without moves": False, "with moves": True}


@dataclass(frozen=True)
class Pinned:
    """Problems, by number: their conversations, and the same for the simulator."""

    conversations: Mapping[int, Sequence[dict]]
    problems: Mapping[int, SimProblem]

    @property
    def lengths(self) -> dict[int, tuple[int, ...]]:
        return {number: problem.lengths[0] for number, problem in self.problems.items()}

    @property
    def tokens(self) -> int:
        return sum(problem.tokens for problem in self.problems.values())


def pinned(model: Step3VL, workload: Workload, seed: int, first: int) -> Pinned:
    """The problems of a workload, numbered from `first`, with prompts of different lengths."""
    conversations, problems = {}, {}
    for number, drawn in enumerate(workload.draw(seed), first):
        words = random.Random(number).randrange(2, 30)
        messages = [{"role": "user", "content": f"Problem {number}:" + " solve" * words}]
        tokens = len(build_prompt(messages, model.tokenizer, model.config, []))
        conversations[number] = messages
        problems[number] = replace(drawn, question_tokens=tokens, lengths=drawn.lengths[:1])
    return Pinned(conversations, problems)


def run(model: str, problems: int, repeats: int, *, migrate: bool) -> Iterator[dict]:
    """A row without moves and, unless `migrate` is false, one with them."""
    if usable_cpus() < REPLICAS:
        raise InputError(f"replay needs {REPLICAS} cores, and this process may use only one")
    loaded = Step3VL.from_preset(model)
    workload = Workload("judged", problems, (WIDTH,), MEAN_TOKENS, (), 0, max_tokens=MAX_TOKENS)
    judged = pinned(loaded, workload, 0, 0)
    fitted = [pinned(loaded, w, 1, FIRST_FITTED * n) for n, w in enumerate(FITTED, 1)]
    forms = {form: moves for form, moves in FORMS.items() if migrate or not moves}
    runs, steps = measure(model, judged, fitted, forms, repeats)
    cost = fit([(step.shape, step.seconds) for step in steps], StepWork(loaded.config.decoder))
    residual = median(abs(cost.seconds(step.shape) / step.seconds - 1) for step in steps)
    for form, moves in forms.items():
        simulated = simulate_replicas(judged, cost, loaded.config, migrate=moves)
        yield {
            **row(f"{model} {problems} x [{WIDTH}]", form, judged, runs[form], simulated),
            "fitted_steps": len(steps),
            "fit_residual": residual,
            **origin(torch.device("cpu")),
        }


def measure(
    model: str,
    judged: Pinned,
    fitted: Sequence[Pinned],
    forms: Mapping[str, bool],
    repeats: int,
) -> tuple[dict[str, list[Run]], list[StepSample]]:
    """The judged runs of every form, and the steps of the fitted runs."""
    lengths = judged.lengths
    for other in fitted:
        lengths |= other.lengths
    runs: dict[str, list[Run]] = {form: [] for form in forms}
    spans = []
    with folders("cores", "samples") as (cores, samples):
        build = Build(model, WIDTH, MAX_TOKENS, cores, lengths, samples)
        turns = repeats * (len(forms) + len(fitted))
        with started(build, REPLICAS) as replicas, progress("replay", turns) as advance:
            for _ in range(repeats):
                for other in fitted:
                    done = run_replicas(replicas.actors, other.conversations, REPLICAS)
                    spans.append((done.start, done.start + done.seconds))
                    advance(1)
                for form, moves in forms.items():
                    policy = TailMoves() if moves else None
                    done = run_replicas(replicas.actors, judged.conversations, REPLICAS, policy)
                    runs[form].append(done)
                    advance(1)
        steps = read_samples(Path(samples))
    return runs, [s for s in steps if any(start < s.ended <= end for start, end in spans)]


def simulate_replicas(
    judged: Pinned, cost: FittedCost, config: Config, *, migrate: bool
) -> SimResult:
    """The same problems on the virtual clock."""
    setting = Setting(
        gpus=REPLICAS,
        config=config,
        max_running=MAX_RUNNING,
        token_budget=TOKEN_BUDGET,
        page_size=PAGE_SIZE,
        max_tokens=MAX_TOKENS,
        migrate=migrate,
        move_period_s=SECONDS,
        num_pages=KV_TOKENS // PAGE_SIZE,
        cost=cost,
    )
    return simulate(list(judged.problems.values()), setting)


def row(case: str, form: str, judged: Pinned, runs: Sequence[Run], simulated: SimResult) -> dict:
    """The row of one form: medians of its runs, and the simulator's errors."""
    makespan = median(run.seconds for run in runs)
    mean = median(fmean(run.answers.values()) for run in runs)
    makespan_simulated, mean_simulated = max(simulated.answered_s), fmean(simulated.answered_s)
    return {
        "op": "replica_replay",
        "case": case,
        "impl": form,
        "dtype": "float32",
        "makespan_s": makespan,
        "makespan_min_s": min(run.seconds for run in runs),
        "makespan_max_s": max(run.seconds for run in runs),
        "makespan_simulated_s": makespan_simulated,
        "makespan_error": makespan_simulated / makespan - 1,
        "tta_mean_s": mean,
        "tta_mean_simulated_s": mean_simulated,
        "tta_error": mean_simulated / mean - 1,
        "moved": median(run.moved for run in runs),
        "moved_simulated": simulated.moved_rollouts,
        "repeats": len(runs),
        "failure": fault(runs, judged.tokens),
    }
