"""Gain from running many problems together on a real model: `python -m bench packing`.

Runs the same questions with the same seeds, hence the same rollouts, under several policies:
SmolLM2 on a CPU, the 10B with random weights on a GPU. Lengths are real: rollouts end where the
model ends them. All setups alternate step by step, each with its own engine and a clock that counts
only its own steps, so a slow minute of the machine slows all of them.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import eq
from statistics import fmean

import torch

from bench.measure.devices import MAIN_DTYPE
from bench.measure.origin import origin
from kernels.runtime.dtypes import dtype_name
from model.step3vl import Step3VL
from model.terminal import progress
from pacore_sched.answers.live import Answer
from pacore_sched.answers.pacore import Pacore, engine_for
from pacore_sched.answers.problem_run import Problem
from pacore_sched.sched.request import Sampling

MODELS = {"cpu": "smollm2-135m", "cuda": "step3-vl-10b"}
WIDTHS, SAMPLING, KV_TOKENS = (8,), Sampling(max_tokens=128), 24_576
QUESTIONS = (
    "What is the capital of France?",
    "Explain in a few sentences why the sky is blue.",
    "A train leaves at noon at 60 km/h, another an hour later at 90 km/h. When do they meet?",
    "Name three fruits.",
    "Write a short poem about the sea.",
    "Which is larger, 17 + 25 or 6 times 8? Show how you know.",
    "What does a scheduler of an operating system do?",
    "Translate into French: the cat sleeps on the warm roof.",
)


@dataclass(frozen=True)
class Setup:
    """A policy and its limits, under which the questions run."""

    policy: str
    max_running: int
    speculate: int = 0

    @property
    def name(self) -> str:
        drafts = f", drafts at {self.speculate} or fewer" if self.speculate else ""
        return f"{self.policy}, up to {self.max_running} rollouts{drafts}"


ALL = len(QUESTIONS) * WIDTHS[0]
SETUPS = (
    Setup("one-at-a-time", ALL),
    Setup("later-round-first", ALL),
    Setup("later-round-first", ALL, speculate=8),
    Setup("fcfs", 16),
    Setup("later-round-first", 16),
    Setup("shortest-expected", 16),
)


def run(device: torch.device) -> Iterator[dict]:
    """A row per setup."""
    name = MODELS[device.type]
    model = Step3VL.from_preset(name, device=device, dtype=MAIN_DTYPE[device.type])
    yield from compare(model, SETUPS)


def compare(
    model: Step3VL,
    setups: Sequence[Setup],
    *,
    questions: Sequence[str] = QUESTIONS,
    widths: tuple[int, ...] = WIDTHS,
    sampling: Sampling = SAMPLING,
) -> list[dict]:
    """Rows of the setups; the first is the baseline.

    `same_texts` is the share of rollouts with the same text as in the first setup: all, unless
    products of other batch sizes round so differently that a sampled token changes.
    """
    runs = [_Run(model, setup, questions, widths, sampling) for setup in setups]
    active = list(runs)
    with progress("packing", len(setups) * len(questions)) as advance:
        while active:  # step the run with the fewest tokens: all generate the same ones
            run = min(active, key=lambda run: run.engine.stats.generated)
            before = len(run.ends)
            if not run.step():
                active.remove(run)
            advance(len(run.ends) - before)
    texts = [run.texts() for run in runs]
    return [
        {
            "op": "packing",
            "case": f"{model.config.name} {len(questions)} x {list(widths)} T{sampling.max_tokens}",
            "impl": run.setup.name,
            "dtype": dtype_name(model.dtype),
            **run.figures(),
            "same_texts": sum(map(eq, run_texts, texts[0])) / len(texts[0]),
            **origin(model.device),
        }
        for run, run_texts in zip(runs, texts, strict=True)
    ]


class _Run:
    """All questions running through one setup's engine. `ends` has a time for every answer."""

    def __init__(
        self,
        model: Step3VL,
        setup: Setup,
        questions: Sequence[str],
        widths: tuple[int, ...],
        sampling: Sampling,
    ) -> None:
        self.setup = setup
        self.engine = engine_for(
            model,
            policy=setup.policy,
            max_running=setup.max_running,
            kv_tokens=KV_TOKENS,
            speculate=setup.speculate,
            prefix_cache=False,  # what is found would depend on the order of a setup
        )
        problems = [
            Problem([{"role": "user", "content": question}], id=str(number))
            for number, question in enumerate(questions)
        ]
        self._steps = Pacore(model, self.engine, widths, sampling).steps(problems)
        self._seconds = 0.0
        self._answers: dict[str, Answer] = {}
        self.ends: list[float] = []

    def step(self) -> bool:
        """Run one step of the engine; returns False if that was the last."""
        start = time.perf_counter()
        answers = next(self._steps, None)
        self._seconds += time.perf_counter() - start
        if answers is None:
            self.engine.executor.close()
            return False
        self._answers |= {answer.problem: answer for answer in answers}
        self.ends += [self._seconds] * len(answers)
        return True

    def texts(self) -> list[str]:
        """Every rollout's text, in the same order for all setups."""
        answers = (answer for _, answer in sorted(self._answers.items()))
        rounds = (round_ for answer in answers for round_ in answer.rounds)
        return [rollout.text for round_ in rounds for rollout in round_.rollouts]

    def figures(self) -> dict:
        stats, counts = self.engine.stats, self.engine.scheduler.counts
        errors = (answer.error for answer in self._answers.values() if answer.error)
        return {
            "makespan_s": max(self.ends),
            "tta_mean_s": fmean(self.ends),
            "tokens_per_second": stats.generated / max(self.ends),
            "steps": stats.steps,
            "tokens_per_step": stats.generated / stats.steps,
            "prefilled": counts.prefilled,
            "preemptions": counts.preemptions,
            "drafted": stats.drafted,
            "accepted": stats.accepted,
            "failure": next(errors, None),
        }
