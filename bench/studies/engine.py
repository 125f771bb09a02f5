"""Whole engine steps with a full batch: `python -m bench engine`.

Rollouts of one prompt, with pinned lengths, decode through scheduler, executor and CUDA graphs. A
step's time is the wall-clock time of `Engine.step`, including getting the tokens to the host. Rows
also have the bytes that the step had to move: every weight once, every node's KV once. Prompts are
random ids.
"""

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from statistics import quantiles

import torch

from bench.errors import compare
from bench.measure.devices import MAIN_DTYPE
from bench.measure.poison import PoisonedError
from bench.measure.rows import measured, with_speedups
from bench.measure.timing import Timing
from bench.measure.verdicts import MODEL_TOLERANCE, NOT_RUN, Verdict
from bench.studies.decode import FORMS, FP8, DecodeCase, forms_on
from kernels.runtime.arithmetic import cdiv
from model.cuda_graph import failed_capture
from model.kv_cache import PAGE_SIZE
from model.step3vl import Step3VL
from model.terminal import track
from pacore_sched.answers.pacore import engine_for
from pacore_sched.engine.engine import Engine
from pacore_sched.sched.request import Sampling

# Model; (batch, prompt, tokens that each rollout already has); timed steps per block; blocks.
CASES = {
    "cpu": ("smollm2-135m", [(16, 512, 16), (64, 512, 16)], 6, 3),
    "cuda": ("step3-vl-10b", [(n, 2048, 128) for n in (16, 32, 64)], 64, 4),
}
SETTLE = 3  # untimed steps at the start of a block


def run(device: torch.device) -> Iterator[dict]:
    """Rows of every case: eager, the default, and FP8 KV on a GPU.

    Raises PoisonedError after a case whose steps could not be captured.
    """
    name, cases, steps, blocks = CASES[device.type]
    model = Step3VL.from_preset(name, device=device, dtype=MAIN_DTYPE[device.type])
    for batch, prompt, suffix in track(cases, "engine"):
        case = DecodeCase(batch, prompt, suffix)
        yield from time_engine(model, case, steps, blocks)
        if why := failed_capture():  # the next case would be timed without graphs, too
            raise PoisonedError("a CUDA graph", RuntimeError(why))


def time_engine(
    model: Step3VL, case: DecodeCase, steps: int, blocks: int, names: Sequence[str] = ()
) -> list[dict]:
    """One row per form in `names` (`forms_on` the device if empty); the forms' blocks of steps
    alternate. Leaves the model with the best forms.

    `host_us` is a launch's host time apart from computing, `idle_pct` the share of time in which a
    GPU had nothing to do, `padding_pct` the share of padding rows, `graphs` whether steps ran as
    CUDA graphs. `same_tokens` is the share of tokens before a rollout first differs from the eager
    form (in 16 bits they diverge sooner or later), None if eager was not run.
    """
    total = case.suffix + blocks * (steps + SETTLE) + 2
    names = names or forms_on(model.device.type)
    loads = {name: _Load(model, case, name, total) for name in names}
    for _ in range(blocks):
        for load in loads.values():
            load.block(steps)
    rows = [load.row(name, case, loads.get("eager")) for name, load in loads.items()]
    for row in rows:
        if row["impl"] != "eager" and not row["graphs"]:
            row["failure"] = row["failure"] or failed_capture()
    for load in loads.values():
        load.engine.executor.close()
    model.set_impl(None)
    return with_speedups(rows)


class _Load:
    """An engine in one form, all of whose rollouts decode."""

    def __init__(
        self,
        model: Step3VL,
        case: DecodeCase,
        form: str,
        total: int,
    ) -> None:
        self.model, self.impl, self.fp8 = model, FORMS.get(form), form == FP8
        model.set_impl(self.impl)
        pages = cdiv(case.prefix, PAGE_SIZE) + case.batch * (cdiv(total, PAGE_SIZE) + 1)
        self.engine: Engine = engine_for(
            model,
            kv_dtype=torch.float8_e4m3fn if self.fp8 else None,
            kv_tokens=pages * PAGE_SIZE,
            max_running=case.batch,
        )
        draw = random.Random(0)
        ids = [draw.randrange(256) for _ in range(case.prefix + 1)]
        self.group = self.engine.submit(
            [self.engine.executor.segment(ids[:-1])],
            ids[-1],
            {index: index for index in range(case.batch)},
            Sampling(total, ignore_eos=True),
        )
        self.seconds: list[float] = []
        self.kv_tokens = self.steps = self.padding = 0
        self.host_s = self.idle_s = 0.0
        while any(len(r.tokens) < case.suffix for r in self.group.rollouts):
            self.engine.step()

    def block(self, steps: int) -> None:
        """Time `steps` consecutive steps."""
        self.model.set_impl(self.impl)
        stats = self.engine.stats
        for _ in range(SETTLE):
            self.engine.step()
        executor = self.engine.executor.stats
        before, kv_before = replace(executor), stats.kv_read
        for _ in range(steps):
            start = time.perf_counter()
            self.engine.step()
            self.seconds.append(time.perf_counter() - start)
        self.kv_tokens += stats.kv_read - kv_before
        self.steps += steps
        self.host_s += executor.host_s - before.host_s
        self.idle_s += executor.idle_s - before.idle_s
        self.padding += executor.padding_rows - before.padding_rows

    def row(self, name: str, case: DecodeCase, eager: "_Load | None") -> dict:
        model, config = self.model, self.model.config.decoder
        mean_kv = self.kv_tokens / self.steps
        agreement: float | None = None
        verdict = NOT_RUN
        if eager:
            agreement = self._agreement(eager)
            verdict = self._verdict(eager, agreement)
        mean_case = replace(case, suffix=round((mean_kv - case.prefix) / case.batch))
        deciles = quantiles(self.seconds, n=10, method="inclusive")
        row = measured(
            "engine_step",
            f"{model.config.name} {case.name}",
            name,
            device=model.device,
            dtype=model.dtype,
            num_bytes=mean_case.bytes(config, model.dtype, self.fp8),
            flops=mean_case.flops(config),
            verdict=verdict,
            timing=Timing(
                deciles[1] * 1e6, deciles[4] * 1e6, deciles[7] * 1e6, len(self.seconds), "clock"
            ),
        )
        wall = sum(self.seconds)
        return row | {
            "tokens_per_second": case.batch * self.steps / wall,
            "host_us": 1e6 * self.host_s / self.steps,
            "idle_pct": 100 * self.idle_s / wall,
            "graphs": len(self.engine.executor.graphs) > 0,
            "padding_pct": 100 * self.padding / max(1, self.padding + case.batch * self.steps),
            "same_tokens": agreement,
        }

    def _verdict(self, eager: "_Load", agreement: float) -> Verdict:
        """Errors of the log-probabilities of tokens before rollouts diverge. In fp32 with fp32 KV,
        90 % of the tokens and the log-probabilities must agree."""
        pairs = []
        for rollout, reference in zip(self.group.rollouts, eager.group.rollouts, strict=True):
            for index, (a, b) in enumerate(zip(rollout.tokens, reference.tokens, strict=False)):
                if a != b:
                    break
                pairs.append((rollout.logprobs[index], reference.logprobs[index]))
        error = compare(*torch.tensor(pairs or [(0.0, 0.0)]).T)
        failure = None
        exact = self.model.dtype == torch.float32 and not self.fp8
        if exact and not (error.max <= MODEL_TOLERANCE and agreement >= 0.9):
            failure = (
                f"{agreement:.0%} of tokens agree with eager, at least 90 % must; log-probability"
                f" error {error.max:.1e}, at most {MODEL_TOLERANCE:.0e} is allowed"
            )
        return Verdict(error.max, error.rms, failure)

    def _agreement(self, other: "_Load") -> float:
        """The share of tokens before a rollout first differs from the one in `other`."""
        agree = total = 0
        for rollout, reference in zip(self.group.rollouts, other.group.rollouts, strict=True):
            pairs = list(zip(rollout.tokens, reference.tokens, strict=False))
            total += len(pairs)
            agree += next((index for index, (a, b) in enumerate(pairs) if a != b), len(pairs))
        return agree / total
