"""One problem on its way: what its next round is asked, and what has come of those before.

A round is an entry of `Settings.widths`. It is done when as many of its rollouts have ended as
`needs` says; those that had not by then are cancelled, and pass nothing on.
"""

import random
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kernels.runtime.spans import begin
from model.errors import InputError
from model.text.prompt import build_prompt, image_head_length
from pacore_sched.answers.journal import RolloutResult
from pacore_sched.answers.rounds import round_messages
from pacore_sched.engine.engine import Engine
from pacore_sched.sched.request import Group, Rollout, Sampling, Segment

if TYPE_CHECKING:
    from jinja2 import Template

    from model.step3vl import Step3VL
    from model.vision.image import Views
    from pacore_sched.engine.executor import ModelExecutor
    from pacore_sched.engine.image_encoder import Features


@dataclass(frozen=True)
class Problem:
    """A conversation to be answered.

    `id` goes into the seeds of the rollouts if there is one. `load`, called once and in another
    thread, gives the images of the conversation's image parts, in order; it may raise InputError.
    """

    messages: Sequence[dict]
    load: "Callable[[], Sequence[Views]] | None" = None
    id: str = ""


@dataclass(frozen=True)
class Settings:
    """What is the same for all problems; `widths` and `needs` have an entry per round."""

    widths: Sequence[int]
    needs: Sequence[int]
    sampling: Sampling
    seed: int = 0
    template: "Template | None" = None


@dataclass(frozen=True)
class _Layout:
    """Of an image, what its place in a prompt depends on: the pixels are not kept."""

    newlines: tuple[bool, ...]


class ProblemRun:
    """A problem between rounds. `rounds` are those that are done, each its results by index."""

    def __init__(
        self,
        model: "Step3VL",
        engine: "Engine[ModelExecutor]",
        settings: Settings,
        problem: Problem,
        number: int,
        known: Iterable[RolloutResult] = (),
    ) -> None:
        """`number` counts problems as they arrive; `known` are results of an earlier run."""
        self.id, self.number = problem.id, number
        self.rounds: list[list[RolloutResult]] = []
        self.pending = 0  # rollouts of the current round that have not ended
        self._model, self._engine, self._settings = model, engine, settings
        self._messages = problem.messages
        self._images: Future | None = None
        self._layouts: list[_Layout] = []
        self._features: Features | None = None
        self._head: Segment | None = None
        self._head_ids: list[int] = []
        self._known = {(result.round, result.index): result for result in known}
        self._current: dict[int, RolloutResult] = {}
        self._on_end = ExitStack()  # of the current round
        self._begin_round()

    @property
    def over(self) -> bool:
        """Whether all rounds are done."""
        return len(self.rounds) == len(self._settings.widths)

    @property
    def error(self) -> str | None:
        """Why the current round will never start: its images could not be encoded."""
        error = self._features.error if self._features else None
        return f"the images cannot be encoded: {error}" if error else None

    def set_images(self, images: Future) -> None:
        """Where the images are: `next_round` waits for them, and raises what they raised."""
        self._images = images

    def next_round(self) -> Group | None:
        """Submit what is missing of the current round; None if there is no round left.

        Raises InputError if the images or the prompt cannot be used, or never fit.
        """
        if self.over:
            return None
        self._encode()
        ids = self._prompt()
        number, settings = len(self.rounds), self._settings
        width = settings.widths[number]
        missing = [index for index in range(width) if index not in self._current]
        group = self._engine.submit(
            self._path(ids),
            ids[-1],
            {i: rollout_seed(settings.seed, number, i, self.id) for i in missing},
            self._fitting(len(ids)),
            problem=self.number,
            round=number,
            need=settings.needs[number] - self._ended(),
        )
        self.pending = len(missing)
        self._on_end.callback(begin("round", f"{number} of problem {self.id or self.number}"))
        return group

    def take(self, rollout: Rollout) -> RolloutResult:
        """Note that a rollout of the current round has ended."""
        reason = rollout.finish_reason
        assert reason is not None
        passes_on = reason in ("stop", "length")
        result = RolloutResult(
            problem=self.id,
            round=len(self.rounds),
            index=rollout.index,
            seed=rollout.seed,
            prompt_tokens=rollout.group.prompt_tokens,
            finish_reason=reason,
            text=self._engine.text(rollout) if passes_on else "",
            num_tokens=len(rollout.tokens),
            logprob=sum(rollout.logprobs),
            tokens=tuple(rollout.tokens),
            logprobs=tuple(rollout.logprobs),
        )
        self._current[rollout.index] = result
        self.pending -= 1
        if not self.pending:
            self._on_end.close()
            self._end_round()
        return result

    def release(self) -> None:
        """Give back what is held from round to round."""
        if self._head is not None:
            self._engine.scheduler.drop(self._head)
        self._head = self._features = None
        self._on_end.close()

    def _begin_round(self) -> None:
        """Take what is known of the current round, and of those after it while that is enough."""
        number = len(self.rounds)
        if number < len(self._settings.widths):
            known = (self._known.get((number, i)) for i in range(self._settings.widths[number]))
            self._current = {result.index: result for result in known if result}
            if self._ended() >= self._settings.needs[number]:
                self._end_round()

    def _end_round(self) -> None:
        """Close the current round; rollouts that nothing is known of were cancelled."""
        number, settings = len(self.rounds), self._settings
        some = next(iter(self._current.values()))
        cancelled = replace(
            some, finish_reason="cancelled", text="", num_tokens=0, logprob=0.0,
            tokens=(), logprobs=(),
        )  # fmt: skip
        self.rounds.append(
            [
                self._current.get(index)
                or replace(
                    cancelled,
                    index=index,
                    seed=rollout_seed(settings.seed, number, index, self.id),
                )
                for index in range(settings.widths[number])
            ]
        )
        self._begin_round()

    def _ended(self) -> int:
        """Rollouts of the current round that have ended by themselves."""
        return sum(o.finish_reason != "cancelled" for o in self._current.values())

    def _encode(self) -> None:
        """Encode the images, the first time: from then on only their layout is needed."""
        if self._images is None:
            return
        views, self._images = self._images.result(), None
        self._layouts = [_Layout(view.newlines) for view in views]
        self._features = self._engine.executor.encode(views)

    def _prompt(self) -> list[int]:
        """The ids of the current round's prompt."""
        asked = self._messages
        if self.rounds:
            texts = [result.text for result in self.rounds[-1]]
            asked = round_messages(asked, texts, template=self._settings.template)
        return build_prompt(asked, self._model.tokenizer, self._model.config, self._layouts)

    def _path(self, ids: list[int]) -> list[Segment]:
        """The prompt's segments but for its last token: the images that open it, and the rest."""
        tokens, executor = self._model.config.tokens, self._engine.executor
        if self._features is None:
            return [executor.segment(ids[:-1])]
        if self._head is None:
            head = image_head_length(ids, self._model.tokenizer, tokens)
            self._head_ids = ids[:head]
            self._head = executor.segment(ids[:head], self._features)
            self._engine.scheduler.keep(self._head)
        head = len(self._head_ids)
        if ids[:head] != self._head_ids:  # a chat template that rewrites what it has said
            return [executor.segment(ids[:-1], self._features)]
        first = self._head_ids.count(tokens.im_patch)
        return [self._head, executor.segment(ids[head:-1], self._features, first)]

    def _fitting(self, prompt_tokens: int) -> Sampling:
        """The sampling options, with max_tokens cut to what the context leaves room for."""
        sampling, context = self._settings.sampling, self._model.config.decoder.max_positions
        if prompt_tokens >= context:
            raise InputError(f"the prompt has {prompt_tokens} tokens, the context is {context}")
        return replace(sampling, max_tokens=min(sampling.max_tokens, context - prompt_tokens))


def rollout_seed(seed: int, number: int, index: int, problem: str = "") -> int:
    """The seed of rollout `index` in round `number`: the same whatever the widths are, and the
    other problems. Different for every `problem` that has an id."""
    name = f"{seed}/{number}/{index}"
    return random.Random(f"{name}/{problem}" if problem else name).getrandbits(63)
