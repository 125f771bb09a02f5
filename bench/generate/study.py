"""Runs of each form of `generate`: a checked one, timed ones, and one for the peak of memory."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench import peak_memory
from bench.errors import compare
from bench.measure.devices import MAIN_DTYPE
from bench.measure.rows import measured
from bench.measure.timing import Timing
from bench.measure.verdicts import NOT_RUN, Verdict, judged
from bench.peers.peer import Unavailable, distribution, imported
from bench.studies.decode import DecodeCase
from bench.studies.prefill import random_ids
from bench.validate.transformers_judge import causal_lm
from kernels.runtime.arithmetic import cdiv
from model.config import DecoderConfig, preset
from model.errors import InputError
from model.hf import generate, patch, unpatch
from model.kv_cache import PAGE_SIZE, page_bytes
from model.memory import free_bytes
from model.step3vl import Step3VL
from model.terminal import progress

STOCK, SHARED, PATCHED = FORMS = ("transformers", "shared pages", "shared pages, patched")


@dataclass(frozen=True)
class GenerateCase:
    """`sequences` continuations of `new` tokens each, of a prompt of `prompt` tokens."""

    prompt: int
    sequences: int
    new: int

    @property
    def name(self) -> str:
        return f"P{self.prompt} W{self.sequences} T{self.new}"

    @property
    def step(self) -> DecodeCase:
        """The step in the middle; the last token of the prompt is read by the first one."""
        return DecodeCase(self.sequences, self.prompt - 1, (self.new + 1) // 2)

    def kv_bytes(self, form: str, config: DecoderConfig, dtype: torch.dtype) -> int:
        """Bytes of K and V in the last step: copies of the prompt, or pages that are shared."""
        if form == STOCK:
            tokens = self.sequences * (self.prompt + self.new - 1)
            return tokens * config.kv_bytes_per_token(dtype.itemsize)
        pages = cdiv(self.prompt - 1, PAGE_SIZE) + self.sequences * cdiv(self.new, PAGE_SIZE)
        return pages * page_bytes(config, dtype)


@dataclass(frozen=True)
class _Run:
    """What a call returned, when it began, and when each step's tokens were drawn, in seconds."""

    output: Any
    began: float
    ends: list[float]


def run(
    name: str, device: torch.device, cases: Sequence[GenerateCase], repeats: int
) -> Iterator[dict]:
    """A row per case and form. Raises InputError for cases beyond the model's context or the
    machine's memory, without transformers, and where memory cannot be measured."""
    try:
        imported("transformers")
    except Unavailable as reason:
        raise InputError(f"transformers: {reason}") from None
    peak_memory.start(device)
    config, dtype = preset(name).decoder, MAIN_DTYPE[device.type]
    for case in cases:
        if case.prompt + case.new > config.max_positions:
            raise InputError(
                f"{case.prompt:,} and {case.new:,} tokens exceed the context of {name},"
                f" {config.max_positions:,} tokens"
            )
    model = Step3VL.from_preset(name, device=device, dtype=dtype)
    with progress("generate", len(cases) * len(FORMS) * (repeats + 2)) as advance:
        peer = causal_lm(model)
        peer.generation_config.eos_token_id = None  # no continuation ends early
        for case in cases:
            # A step appends to copies of the whole cache, one layer after the other.
            needed = case.kv_bytes(STOCK, config, dtype) * (1 + 1 / config.layers)
            if needed > (free := free_bytes(device)):
                raise InputError(
                    f"{case.name}: copies of the prompt's KV need {needed / 1e9:.2f} GB,"
                    f" {free / 1e9:.2f} GB are free"
                )
            yield from _rows(case, model, peer, repeats, advance)


def _rows(
    case: GenerateCase,
    model: Step3VL,
    peer: Any,  # noqa: ANN401
    repeats: int,
    advance: Callable[[int], None],
) -> list[dict]:
    prompt = random_ids(case.prompt, model)[None]

    def call(form: str, **options: object) -> _Run:
        done = _call(form, peer, prompt, case, **options)
        advance(1)
        return done

    recorded = {"return_dict_in_generate": True, "output_logits": True}
    stock, verdicts, same = call(STOCK, **recorded).output, {STOCK: NOT_RUN}, {}
    for form in FORMS[1:]:
        ours = call(form, **recorded).output
        same[form] = count = _same_steps(stock.sequences, ours.sequences, case.prompt)
        until = slice(count + 1)  # with the logits from which the first different token is drawn
        logits = [torch.stack(output.logits[until]) for output in (ours, stock)]
        verdicts[form] = judged(compare(*logits), model.dtype)
        del ours, logits
    del stock
    runs: dict[str, list[_Run]] = {form: [] for form in FORMS}
    for index in range(repeats):
        for form in FORMS if index % 2 == 0 else FORMS[::-1]:
            runs[form].append(call(form))
    rows = []
    for form, timed in runs.items():
        before = peak_memory.start(model.device)
        call(form)
        peak = peak_memory.peak(model.device) - before
        row = _row(case, model, form, timed, verdicts[form])
        row |= {"peak_bytes": peak, "same_steps": same.get(form)}
        rows.append(row)
    return rows


@torch.inference_mode()
def _call(form: str, peer: Any, prompt: Tensor, case: GenerateCase, **options: object) -> _Run:  # noqa: ANN401
    ends: list[float] = []

    def drawn(ids: Tensor, scores: object, **kwargs: object) -> Tensor:
        if ids.is_cuda:
            torch.cuda.synchronize(ids.device)
        ends.append(time.perf_counter())
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    run: Any = peer.generate if form == STOCK else partial(generate, peer)
    if form == PATCHED:
        patch(peer)
    try:
        torch.manual_seed(0)
        began = time.perf_counter()
        output = run(
            prompt,
            attention_mask=torch.ones_like(prompt),
            num_return_sequences=case.sequences,
            max_new_tokens=case.new,
            do_sample=True,
            top_k=0,
            top_p=1.0,
            pad_token_id=0,
            stopping_criteria=[drawn],
            **options,
        )
    finally:
        unpatch(peer)
    return _Run(output, began, ends)


def _same_steps(one: Tensor, other: Tensor, prompt: int) -> int:
    """How many of the first steps drew the same tokens for all sequences."""
    same = (one == other)[:, prompt:].all(dim=0).tolist()
    return same.index(False) if False in same else len(same)


def _row(
    case: GenerateCase, model: Step3VL, form: str, runs: Sequence[_Run], verdict: Verdict
) -> dict:
    """The row of one form: its times are those of a step after the first."""
    config = model.config.decoder
    steps = [end - start for run in runs for start, end in pairwise(run.ends)]
    timing = None
    if steps:
        p20, median, p80 = (1e6 * float(x) for x in np.percentile(steps, [20, 50, 80]))
        timing = Timing(p20, median, p80, len(steps), "clock")
    row = measured(
        "generate",
        f"{model.config.name} {case.name}",
        form,
        device=model.device,
        dtype=model.dtype,
        num_bytes=case.step.bytes(config, model.dtype),
        flops=case.step.flops(config),
        verdict=verdict,
        timing=timing,
        shape={"prompt": case.prompt, "sequences": case.sequences, "new": case.new},
    )
    seconds = float(np.median([run.ends[-1] - run.began for run in runs]))
    return row | {
        "tokens_per_second": case.sequences * case.new / seconds,
        "ttft_us": 1e6 * float(np.median([run.ends[0] - run.began for run in runs])),
        "seconds": seconds,
        "steps": case.new,
        "kv_bytes": case.kv_bytes(form, config, model.dtype),
        "version": distribution("transformers")(),
    }
