"""PaCoRe on one engine: many problems at once, each going through its rounds independently.

    for each width: prompt -> rollouts in parallel -> compacted messages -> the next round's prompt

Images come first in every round's prompt, in a separate segment that is encoded and prefilled once
for all rounds. A failed problem does not affect the others (live.py). What concerns all of them
ends the run: errors of the engine's steps, of the callbacks and of the iterable of problems.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypedDict, Unpack

from kernels.runtime.arithmetic import cdiv
from model.errors import InputError
from model.kv_cache import PAGE_SIZE, page_bytes
from model.memory import free_bytes, prefill_bytes
from pacore_sched.answers.arrivals import Arrivals
from pacore_sched.answers.journal_lines import RolloutResult
from pacore_sched.answers.live import Answer, LiveProblems
from pacore_sched.answers.problem_run import Problem, ProblemRun, Settings
from pacore_sched.answers.rounds import SynthesisTemplate, round_widths
from pacore_sched.engine.engine import Engine
from pacore_sched.engine.executor import ModelExecutor
from pacore_sched.engine.kv_memory import SHARE
from pacore_sched.engine.stopping import Stopping
from pacore_sched.sched.policy import LaterRoundFirst
from pacore_sched.sched.request import Sampling
from pacore_sched.sched.scheduler import TOKEN_BUDGET
from pacore_sched.sched.view_queue import DEFAULT_VISION_BUDGET

if TYPE_CHECKING:
    import torch

    from model.step3vl import Step3VL
    from model.vision.image import Views


class Pacore:
    """Answers any number of problems at once on an engine."""

    def __init__(
        self,
        model: "Step3VL",
        engine: Engine[ModelExecutor],
        widths: Sequence[int],
        sampling: Sampling,
        *,
        seed: int = 0,
        template: SynthesisTemplate | None = None,
        min_messages: int | None = None,
        synthesis: bool = True,
    ) -> None:
        """`widths` are those of the exploring rounds; unless `synthesis` is false, a last round of
        one rollout follows. With `min_messages`, an exploring round ends when that many of its
        rollouts have ended, and the others are cancelled.

        Raises InputError if `min_messages` is not positive.
        """
        if min_messages is not None and min_messages < 1:
            raise InputError(f"a round must wait for at least one message, not {min_messages}")
        self.model, self.engine = model, engine
        widths = round_widths(widths) if synthesis else tuple(widths)
        self.settings = Settings(widths, sampling, seed, template, min_messages, synthesis)

    @property
    def prefix_tokens_saved(self) -> int:
        """Prompt tokens whose KV rollouts reused, minus those prefilled, since the engine began."""
        counts = self.engine.scheduler.counts
        return counts.prefix_hits - counts.prefilled

    def answer(
        self,
        messages: Sequence[dict],
        views: "Sequence[Views]" = (),
        *,
        on_rollout: Callable[[RolloutResult], None] = lambda result: None,
        on_step: Callable[[int], None] = lambda tokens: None,
    ) -> Answer:
        """The answer to one conversation; `views` are the images of its image parts, in order.

        Raises InputError if the problem fails in its first round, for example because its prompt
        fills the model's context or its KV cannot fit into memory. Later, the Answer has the error.
        """
        problem = Problem(messages, (lambda: views) if views else None)
        (answer,) = self.answers([problem], on_rollout=on_rollout, on_step=on_step)
        if answer.error and not answer.rounds:
            raise InputError(answer.error)
        return answer

    def answers(
        self,
        problems: Iterable[Problem],
        *,
        known: Callable[[str], Iterable[RolloutResult]] = lambda id: (),
        on_rollout: Callable[[RolloutResult], None] = lambda result: None,
        on_step: Callable[[int], None] = lambda tokens: None,
    ) -> Iterator[Answer]:
        """Yield answers as problems end. New problems are read when the engine has room for them.

        known: maps a problem's id to rollouts that ended in an earlier run; they are not run again
        on_rollout: called with every other rollout's result when it ends
        on_step: called after every step with the number of tokens that it generated

        If the caller stops early, or a callback raises, all work left in the engine is cancelled.
        """
        with closing(self.steps(problems, known, on_rollout, on_step)) as steps:
            for answers in steps:
                yield from answers

    def steps(
        self,
        problems: Iterable[Problem],
        known: Callable[[str], Iterable[RolloutResult]] = lambda id: (),
        on_rollout: Callable[[RolloutResult], None] = lambda result: None,
        on_step: Callable[[int], None] = lambda tokens: None,
    ) -> Generator[list[Answer], None, None]:
        """As `answers`, but yields once per engine step: the answers that the step completed."""
        run_of = partial(ProblemRun, self.model, self.engine, self.settings)
        arrivals = Arrivals(run_of(p, n, known(p.id)) for n, p in enumerate(problems))
        live, stats = LiveProblems(self.engine), self.engine.stats
        try:
            arrivals.fill()
            while True:
                started = map(live.start, arrivals.starting(live))
                answers = [answer for answer in started if answer]
                if not live:  # and no further problem has arrived
                    yield answers
                    return
                generated = stats.generated
                ended = live.step(lambda run, rollout, result: on_rollout(result))
                on_step(stats.generated - generated)
                yield [*answers, *(answer for _, answer in ended)]
        finally:
            arrivals.close()
            live.cancel_all()


class EngineOptions(TypedDict, total=False):
    """The options that `engine_for` passes to Engine, where they are documented."""

    policy: LaterRoundFirst | str
    token_budget: int
    ahead: bool | None
    speculate: int
    host_pages: int
    prefix_cache: bool


def engine_for(
    model: "Step3VL",
    *,
    kv_dtype: "torch.dtype | None" = None,
    kv_tokens: int | None = None,
    max_kv_tokens: int | None = None,
    image_bytes: int | None = None,
    max_running: int = 256,
    replicas: int = 1,
    vision_budget: str = DEFAULT_VISION_BUDGET,
    vision_batch: int | None = None,
    **options: Unpack[EngineOptions],
) -> Engine[ModelExecutor]:
    """An engine for a model.

    kv_dtype: dtype of the KV pages; default: the model's; torch.float8_e4m3fn halves them
    kv_tokens: capacity of the KV cache; default: what fits in free memory
    max_kv_tokens: upper limit of that default
    image_bytes: budget for the image embeddings of unfinished problems; default: 5 % of free memory
    max_running: rollouts that decode at the same time
    replicas: engines that have the device's memory in common
    vision_budget: how much encoding images may slow decoding, a name in VISION_BUDGETS
    vision_batch: patches of images that are encoded together; 0: each image alone; default: 16,384
        on a GPU, else 0

    Raises InputError if there is not enough memory for the KV, or for an unknown budget.
    """
    num_pages = cdiv(kv_tokens, PAGE_SIZE) if kv_tokens else None
    if num_pages:
        size = num_pages * page_bytes(model.config.decoder, kv_dtype or model.dtype)
        if size > (free := free_bytes(model.device)):
            raise InputError(
                f"not enough memory for the KV of {kv_tokens} tokens: it needs"
                f" {size / 1e9:.2f} GB, {free / 1e9:.2f} GB are free"
            )
    config = model.config.decoder
    rows = options.get("token_budget", TOKEN_BUDGET)
    context = max(config.max_positions, rows)
    step = prefill_bytes(config, context, rows, model.dtype, sampled=max_running)
    executor = ModelExecutor(
        model,
        num_pages=num_pages,
        kv_dtype=kv_dtype,
        max_running=max_running,
        max_kv_tokens=max_kv_tokens,
        image_bytes=image_bytes,
        keep_images=options.get("prefix_cache", True),
        share=SHARE[model.device.type] / replicas,
        step_bytes=step * replicas,
        vision_budget=vision_budget,
        vision_batch=vision_batch,
    )
    stopping = Stopping(_Vocabulary(model), model.config.tokens.eos)
    return Engine(executor, stopping, **options)


@dataclass(frozen=True)
class _Vocabulary:
    """A model's tokens as bytes. Loads the tokenizer on first use: a GPU node may have none."""

    model: "Step3VL"

    def token_bytes(self, id: int) -> bytes:
        return self.model.tokenizer.token_bytes(id)
