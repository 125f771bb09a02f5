"""What packing many problems is worth on a real model: `python -m bench packing`.

The same questions with the same seeds, hence the same rollouts, under several policies: SmolLM2 on
a CPU, the 10B with random weights on a GPU. Real lengths: rollouts end where the model ends them.
Policies run one after the other, `repeats` times round, so that each sees the machine's good and
bad minutes alike; the median counts.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, median

import torch

from bench.ops import MAIN_DTYPE
from bench.rows import origin
from bench.show import titled
from model.step3vl import Step3VL
from model.terminal import progress
from pacore_sched.pacore import Pacore, engine_for
from pacore_sched.problem_run import Problem
from pacore_sched.request import Sampling

MODELS = {"cpu": "smollm2-135m", "cuda": "step3-vl-10b"}
WIDTHS, SAMPLING, KV_TOKENS = (8,), Sampling(max_tokens=128), 65_536
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
class Plan:
    """One way to run the questions."""

    policy: str
    max_running: int
    speculate: int = 0

    @property
    def name(self) -> str:
        drafts = f", drafts at {self.speculate} or fewer" if self.speculate else ""
        return f"{self.policy}, up to {self.max_running} rollouts{drafts}"


ALL = len(QUESTIONS) * WIDTHS[0]
PLANS = (
    Plan("one-at-a-time", ALL),
    Plan("later-round-first", ALL),
    Plan("later-round-first", ALL, speculate=8),
    Plan("fcfs", 16),
    Plan("later-round-first", 16),
)


def run(device: torch.device, repeats: int = 3) -> Iterator[dict]:
    """A row per plan."""
    name = MODELS[device.type]
    model = Step3VL.from_preset(name, device=device, dtype=MAIN_DTYPE[device.type])
    yield from compare(model, PLANS, repeats)


def compare(
    model: Step3VL,
    plans: Sequence[Plan],
    repeats: int,
    *,
    questions: Sequence[str] = QUESTIONS,
    widths: tuple[int, ...] = WIDTHS,
    sampling: Sampling = SAMPLING,
) -> list[dict]:
    """Rows of the plans, the first of which is the base line.

    `same_texts` is the share of rollouts that say what they said in the first plan: all, unless
    products of other batch sizes round so differently that a draw tips over.
    """
    made: dict[Plan, list[dict]] = {plan: [] for plan in plans}
    texts: dict[Plan, list[str]] = {}
    with progress("packing", len(plans) * repeats * len(questions)) as advance:
        for _ in range(repeats):
            for plan in plans:
                found, texts[plan] = _once(model, plan, questions, widths, sampling, advance)
                made[plan].append(found)
    rows = []
    for plan, found in made.items():
        row = {key: median(one[key] for one in found) for key in found[0] if key != "failure"}
        first = texts[plans[0]]
        same = sum(a == b for a, b in zip(texts[plan], first, strict=False))
        seconds = sorted(one["makespan_s"] for one in found)
        rows.append(
            {
                "op": "packing",
                "case": f"{model.config.name} {len(questions)} x {list(widths)}"
                f" T{sampling.max_tokens}",
                "impl": plan.name,
                "dtype": str(model.dtype).removeprefix("torch."),
                **row,
                "makespan_least_s": seconds[0],
                "makespan_most_s": seconds[-1],
                "repeats": repeats,
                "same_texts": same / len(first),
                "failure": next((one["failure"] for one in found if one["failure"]), None),
                **origin(model.device),
            }
        )
    return rows


def _once(
    model: Step3VL,
    plan: Plan,
    questions: Sequence[str],
    widths: tuple[int, ...],
    sampling: Sampling,
    advance: object,
) -> tuple[dict, list[str]]:
    """The figures of one run of all questions, and every rollout's text."""
    engine = engine_for(
        model,
        policy=plan.policy,
        max_running=plan.max_running,
        kv_tokens=KV_TOKENS,
        speculate=plan.speculate,
    )
    pacore = Pacore(model, engine, widths, sampling)
    problems = [
        Problem([{"role": "user", "content": question}], id=str(number))
        for number, question in enumerate(questions)
    ]
    answers, ends = {}, []
    start = time.perf_counter()
    for answer in pacore.answers(problems):
        ends.append(time.perf_counter() - start)
        answers[answer.problem] = answer
        advance(1)
    engine.executor.close()
    texts = [
        rollout.text
        for _, answer in sorted(answers.items())
        for round_ in answer.rounds
        for rollout in round_.rollouts
    ]
    stats, counts = engine.stats, engine.scheduler.counts
    figures = {
        "makespan_s": max(ends),
        "tta_mean_s": fmean(ends),
        "tokens_per_second": stats.generated / max(ends),
        "steps": stats.steps,
        "tokens_per_step": stats.generated / stats.steps,
        "prefilled": counts.prefilled,
        "preemptions": counts.preemptions,
        "drafted": stats.drafted,
        "accepted": stats.accepted,
        "failure": next((answer.error for answer in answers.values() if answer.error), None),
    }
    return figures, texts


def display(rows: Sequence[dict]) -> None:
    """The rows as a table, each beside the first."""
    header = ("policy", " makespan s", " least..most", " time to answer s", " tokens/s", " steps")
    header += (" x makespan", " x time to answer", " same texts", " drafts accepted")
    base = rows[0]
    lines = [
        [
            row["impl"],
            f"{row['makespan_s']:.1f}",
            f"{row['makespan_least_s']:.1f}..{row['makespan_most_s']:.1f}",
            f"{row['tta_mean_s']:.1f}",
            f"{row['tokens_per_second']:.1f}",
            f"{row['steps']:.0f}",
            f"{base['makespan_s'] / row['makespan_s']:.2f}",
            f"{base['tta_mean_s'] / row['tta_mean_s']:.2f}",
            f"{100 * row['same_texts']:.0f} %",
            f"{row['accepted']:.0f} of {row['drafted']:.0f}" if row["drafted"] else "",
        ]
        for row in rows
    ]
    titled(f"packing: {base['case']}", rows, header, lines)
