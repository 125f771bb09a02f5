"""PaCoRe over one engine: the rounds of many problems at once, each on its own way to its answer.

    for each width: prompt -> rollouts in parallel -> compacted messages -> the next round's prompt

A problem's next round is submitted in the very step in which its last round is done; the engine
mixes it with whatever else there is. The images stand first in every round's prompt, in a segment
of their own that is encoded and prefilled once for all rounds. A problem that fails, by a prompt
that is too long or a broken image, fails alone.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict, Unpack

from kernels.runtime.arithmetic import cdiv
from model.errors import InputError
from model.kv_cache import PAGE_SIZE, page_bytes
from pacore_sched.answers.journal import RolloutResult
from pacore_sched.answers.problem_run import Problem, ProblemRun, Settings
from pacore_sched.answers.rounds import compact, round_widths
from pacore_sched.engine.engine import Engine
from pacore_sched.engine.executor import ModelExecutor
from pacore_sched.engine.kv_memory import free_bytes
from pacore_sched.engine.stopping import Stopping
from pacore_sched.sched.policy import LaterRoundFirst
from pacore_sched.sched.request import Group, Rollout, Sampling

if TYPE_CHECKING:
    import torch
    from jinja2 import Template

    from model.step3vl import Step3VL
    from model.vision.image import Views

AHEAD = 1024  # rollouts submitted at a time, at least: policies choose among them
IMAGES_AHEAD = 4  # problems whose images are read before their turn comes


@dataclass(frozen=True)
class Round:
    """One round as it happened, its rollouts by index."""

    prompt_tokens: int
    rollouts: tuple[RolloutResult, ...]


@dataclass(frozen=True)
class Answer:
    """How a problem ended: `text` is the compacted message of the synthesis, "" without one.

    `error` says why there is no answer: what was wrong with the problem, and then its last rounds
    are missing, or that all rollouts of the last round failed.
    """

    problem: str
    text: str
    error: str | None
    rounds: tuple[Round, ...]


class Pacore:
    """Answers problems, any number of them at once, on an engine."""

    def __init__(
        self,
        model: "Step3VL",
        engine: Engine[ModelExecutor],
        widths: Sequence[int],
        sampling: Sampling,
        *,
        seed: int = 0,
        template: "Template | None" = None,
        min_messages: int | None = None,
        synthesis: bool = True,
    ) -> None:
        """`widths` are the exploring rounds'; a last round of one rollout follows them, unless
        `synthesis` is false. With `min_messages` an exploring round is done when so many of its
        rollouts have ended; the others are cancelled.

        Raises InputError if `min_messages` is not positive.
        """
        if min_messages is not None and min_messages < 1:
            raise InputError(f"at least one message must be waited for, not {min_messages}")
        self.model, self.engine = model, engine
        widths = round_widths(widths) if synthesis else tuple(widths)
        needs = [min(min_messages or width, width) for width in widths]
        self.settings = Settings(widths, needs, sampling, seed, template)
        self.synthesis = synthesis

    @property
    def prefix_tokens_saved(self) -> int:
        """Prompt tokens whose KV rollouts found, less those that were prefilled: over all time."""
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
        """The answer to one conversation whose image parts are `views`, in order.

        Raises InputError for a prompt that leaves no room in the model's context, or whose KV
        cannot fit into memory.
        """
        problem = Problem(messages, (lambda: views) if views else None)
        (answer,) = self.answers([problem], on_rollout=on_rollout, on_step=on_step)
        if answer.error and len(answer.rounds) < len(self.settings.widths):
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
        """Answers as they come. Problems are taken in as the engine has room for them.

        known: what ended in an earlier run, by the problem's id: it is not run again
        on_rollout: called for every other rollout as it ends
        on_step: called after every step with the number of tokens generated by it

        Whoever stops early, by an exception from a callback too, leaves an engine without work.
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
        """`answers` one step of the engine at a time, each with the answers that it has led to."""
        arrivals = _Arrivals(self, problems, known)
        live: dict[Group, ProblemRun] = {}
        try:
            while True:
                answers: list[Answer] = []
                for run in self._admitted(arrivals, live):
                    answers += self._proceed(run, live)
                if not live:  # nor has anybody else come
                    yield answers
                    return
                stats = self.engine.stats
                generated = stats.generated
                done = self._note(self.engine.step(), live, on_rollout)
                on_step(stats.generated - generated)
                for group in done:
                    answers += self._proceed(live.pop(group), live)
                answers += self._broken(live)
                yield answers
        finally:
            arrivals.close()
            for group, run in live.items():
                self.engine.cancel(group)
                run.release()

    def _admitted(
        self, arrivals: "_Arrivals", live: dict[Group, ProblemRun]
    ) -> Iterator[ProblemRun]:
        """Problems that are to start now: as long as there is room, and the next one is ready."""
        room = max(AHEAD, 2 * self.engine.scheduler.max_running)
        while not arrivals.over and sum(run.pending for run in live.values()) < room:
            if live and not arrivals.ready():
                return
            yield arrivals.take()

    def _proceed(self, run: ProblemRun, live: dict[Group, ProblemRun]) -> Iterator[Answer]:
        """Submit a problem's next round; its answer, if there is none or it fails."""
        try:
            group = run.next_round()
        except InputError as error:
            run.release()
            yield self._answer(run, str(error))
            return
        if group is None:
            run.release()
            yield self._answer(run, None)
        else:
            live[group] = run

    def _broken(self, live: dict[Group, ProblemRun]) -> Iterator[Answer]:
        """End the problems whose images cannot be encoded."""
        for group in [group for group, run in live.items() if run.error]:
            run = live.pop(group)
            answer = self._answer(run, run.error)
            self.engine.cancel(group)
            run.release()
            yield answer

    def _note(
        self,
        ended: Iterable[Rollout],
        live: dict[Group, ProblemRun],
        on_rollout: Callable[[RolloutResult], None],
    ) -> list[Group]:
        """Take in the rollouts of a step; the groups that are done by them."""
        done = []
        for rollout in ended:
            run = live[rollout.group]
            on_rollout(run.take(rollout))
            if not run.pending:
                done.append(rollout.group)
        return done

    def _answer(self, run: ProblemRun, error: str | None) -> Answer:
        rounds = tuple(Round(results[0].prompt_tokens, tuple(results)) for results in run.rounds)
        last = rounds[-1].rollouts if rounds else ()
        if error is None and all(result.finish_reason == "error" for result in last):
            error = "the last round failed: its logits were not finite"
        text = compact(last[0].text) if self.synthesis and not error else ""
        return Answer(run.id, text, error, rounds)


class EngineOptions(TypedDict, total=False):
    """What `engine_for` passes on to Engine, which says what it is."""

    policy: LaterRoundFirst | str
    token_budget: int
    ahead: bool | None
    speculate: int
    host_pages: int


def engine_for(
    model: "Step3VL",
    *,
    kv_dtype: "torch.dtype | None" = None,
    kv_tokens: int | None = None,
    most_tokens: int | None = None,
    max_running: int = 256,
    **options: Unpack[EngineOptions],
) -> Engine[ModelExecutor]:
    """An engine on a model.

    kv_dtype: of the KV pages: the model's, or torch.float8_e4m3fn
    kv_tokens: of which there is room for KV; the default is what free memory has
    most_tokens: no more of them than these, then
    max_running: rollouts that decode at once

    Raises InputError if there is no memory for the KV.
    """
    num_pages = cdiv(kv_tokens, PAGE_SIZE) if kv_tokens else None
    if num_pages:
        size = num_pages * page_bytes(model.config.decoder, kv_dtype or model.dtype)
        if size > (free := free_bytes(model.device)):
            raise InputError(
                f"no memory for the KV of {kv_tokens} tokens: it needs {size / 1e9:.2f} GB,"
                f" {free / 1e9:.2f} GB are free"
            )
    executor = ModelExecutor(
        model,
        num_pages=num_pages,
        kv_dtype=kv_dtype,
        max_running=max_running,
        max_kv_tokens=most_tokens,
    )
    stopping = Stopping(_Vocabulary(model), model.config.tokens.eos)
    return Engine(executor, stopping, **options)


@dataclass(frozen=True)
class _Vocabulary:
    """A model's tokens as bytes. Its tokenizer is loaded when asked for: GPU nodes may lack one."""

    model: "Step3VL"

    def token_bytes(self, id: int) -> bytes:
        return self.model.tokenizer.token_bytes(id)


class _Arrivals:
    """The problems that have not started yet; the images of the first few are being read."""

    def __init__(
        self,
        pacore: Pacore,
        problems: Iterable[Problem],
        known: Callable[[str], Iterable[RolloutResult]],
    ) -> None:
        self._pacore, self._known = pacore, known
        self._problems = enumerate(problems)
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="images")
        self._queue: deque[tuple[ProblemRun, Future | None]] = deque()
        self._fill()

    @property
    def over(self) -> bool:
        return not self._queue

    def ready(self) -> bool:
        """Whether `take` would not wait."""
        loading = self._queue[0][1]
        return loading is None or loading.done()

    def take(self) -> ProblemRun:
        """The next problem, its images read."""
        run, loading = self._queue.popleft()
        if loading is not None:
            run.set_images(loading)
        self._fill()
        return run

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)

    def _fill(self) -> None:
        while len(self._queue) < IMAGES_AHEAD:
            arrival = next(self._problems, None)
            if arrival is None:
                return
            number, problem = arrival
            pacore, known = self._pacore, self._known(problem.id)
            run = ProblemRun(pacore.model, pacore.engine, pacore.settings, problem, number, known)
            load = problem.load if not run.over else None
            self._queue.append((run, self._threads.submit(load) if load else None))
