"""SmolLM2 asked for needles in haystacks that fit into its context and that do not.

One prefill serves all questions about a haystack: each is a rollout of its own prompt, and all
prompts begin with the haystack's segment. A question is the beginning of the needle's sentence in a
new paragraph, and the answer is greedy. In its chat template, or in the same paragraph, this small
model finds fewer needles even in short texts (docs/log.md).
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import torch

from bench.measure.devices import MAIN_DTYPE
from bench.measure.origin import origin
from bench.needle.haystack import Haystack, build
from bench.rows.run_tables import NEEDLE_DEPTHS
from kernels.runtime.arithmetic import cdiv
from kernels.runtime.dtypes import dtype_name
from model.config import preset
from model.kv_cache import PAGE_SIZE
from model.step3vl import Step3VL
from model.terminal import progress
from pacore_sched.answers.pacore import engine_for
from pacore_sched.sched.request import Sampling

MODEL = "smollm2-135m"
QUESTION = "\n\n{} is"
ANSWER_TOKENS = 8  # a space, five digits, and what shows that the number ends
MARGIN = 32  # tokens that a question and its answer take at most
# How positions are scaled: all but the factor (`Config.with_rope_scaling`).
FORMS: dict[str, Mapping[str, Any] | None] = {
    "none": None,
    "linear": {"rope_type": "linear"},
    "yarn": {"rope_type": "yarn"},
    "yarn-no-temperature": {"rope_type": "yarn", "attention_factor": 1.0},
}


def run(
    device: torch.device, lengths: Sequence[int], forms: Sequence[str], haystacks: int
) -> Iterator[dict]:
    """A row per length and form.

    lengths: tokens of a haystack with a question and its answer
    haystacks: how many for each length, the same for all forms
    """
    with progress("needle", len(lengths) * len(forms) * haystacks) as advance:
        for tokens, form in product(lengths, forms):
            scaling = scaling_of(form, tokens)
            model = Step3VL.from_preset(
                MODEL, device=device, dtype=MAIN_DTYPE[device.type], rope_scaling=scaling
            )
            counts: Counter[str] = Counter()
            for seed in range(haystacks):
                haystack = haystack_of(model, tokens, seed)
                counts += score(haystack, ask(model, haystack))
                advance(1)
            yield {
                "op": "needle",
                "case": f"{MODEL} T{tokens}",
                "impl": form,
                "dtype": dtype_name(model.dtype),
                "factor": scaling["factor"] if scaling else None,
                **{f"found_{depth}": counts[f"found_{depth}"] for depth in NEEDLE_DEPTHS},
                **{name: counts[name] for name in ("found", "asked", "confused")},
                "failure": None,
                **origin(device),
            }


def score(haystack: Haystack, answers: Sequence[str]) -> Counter[str]:
    """How many needles were `asked` for and `found`, also at each depth (`found_5`), and how many
    answers are `confused`: another needle's number."""
    numbers = [needle.number for needle in haystack.needles]
    counts = Counter(asked=len(answers))
    for depth, number, answer in zip(NEEDLE_DEPTHS, numbers, answers, strict=True):
        answered = first_number(answer)
        if answered == number:
            counts.update(("found", f"found_{depth}"))
        elif answered in numbers:
            counts["confused"] += 1
    return counts


def scaling_of(form: str, tokens: int) -> dict[str, Any] | None:
    """The rope scaling for a context of `tokens` tokens, by a factor of at least 2; None for the
    form `none`."""
    scaling, trained = FORMS[form], preset(MODEL).decoder.max_positions
    return None if scaling is None else {**scaling, "factor": max(2.0, tokens / trained)}


def haystack_of(model: Step3VL, tokens: int, seed: int) -> Haystack:
    """The haystack number `seed` of a context of `tokens` tokens."""
    depths = [depth / 100 for depth in NEEDLE_DEPTHS]
    return build(model.tokenizer.encode, tokens - MARGIN, depths, seed)


def ask(model: Step3VL, haystack: Haystack) -> list[str]:
    """The text after each needle's question."""
    encode, greedy = model.tokenizer.encode, Sampling(max_tokens=ANSWER_TOKENS, temperature=0.0)
    questions = [encode(QUESTION.format(needle.subject)) for needle in haystack.needles]
    pages = cdiv(len(haystack.ids), PAGE_SIZE) + 2 * len(questions)
    engine = engine_for(model, kv_tokens=pages * PAGE_SIZE, max_running=len(questions))
    with engine.executor as executor:
        text = executor.segment(haystack.ids)
        groups = [  # submitted to the engine itself, which takes prompts beyond the context
            engine.submit([text, executor.segment(ids[:-1])], ids[-1], {0: 0}, greedy)
            for ids in questions
        ]
        while engine.busy:
            engine.step()
    return [engine.text(group.rollouts[0]) for group in groups]


def first_number(answer: str) -> str | None:
    """The first number of an answer, with all of its digits; None if it has none."""
    match = re.search(r"\d+", answer)
    return match[0] if match else None
